"""One seat of this peer: a worker of one stage, its claims, and what it keeps for auditors."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog
import trio

from chain.keys import PrivateKey
from chain.state import Task
from tdml_p2p.swarm.inputs import Descriptor, Wanted, describe_own, expected_messages, signed_input
from tdml_p2p.swarm.outbox import Outbox
from tdml_p2p.swarm.reexecution import Fetch
from tdml_p2p.swarm.states import fetch_state
from tdml_p2p.swarm.traces import TraceBook
from tdml_p2p.swarm.transport import SwarmTransport
from trainer.manifest import TaskManifest
from trainer.messages import Activation, Gradient
from trainer.stage import StageLike, stage_layout
from trainer.state import StageState
from trainer.worker import Worker
from trainer.worker_ports import DEFAULT_MEMORY_LIMIT, Compute, WorkerConfig, WorkerPorts
from trainer.worker_step import StepRecord

log = structlog.get_logger(__name__)

SPARE_STATES = 3
"""States kept beyond the ring depth: the settled one, the current one and the pending one."""


@dataclass(frozen=True, slots=True)
class Seat:
    """A stage of a task that the chain gave to this peer."""

    task: bytes
    client: str
    stage: int
    depth: int
    manifest: TaskManifest
    memory: int = 0
    """Bytes that the tensors of a step may take; 0 is the usual bound."""


class WorkerSession:
    """The work of one seat; `run` returns when the client finishes the task."""

    def __init__(
        self, seat: Seat, key: PrivateKey, transport: SwarmTransport, outbox: Outbox, stage: StageLike
    ) -> None:
        self.seat = seat
        self.book = TraceBook(seat.task, key.seed)
        self.steps = 0
        self._key = key
        self._transport = transport
        self._outbox = outbox
        self._stage = stage
        self._worker: Worker | None = None

    async def run(self, compute: Compute, fetch: Fetch) -> None:
        """Serve the seat until the client says that the task is over."""
        config = WorkerConfig(
            client=self.seat.client,
            stage=self._stage,
            manifest=self.seat.manifest,
            ring_depth=self.seat.depth + SPARE_STATES,
            memory_limit=self.seat.memory or DEFAULT_MEMORY_LIMIT,
        )
        ports = WorkerPorts(compute=compute, fetch_state=self._fetcher(fetch), on_committed=self._on_committed)
        self._worker = Worker(config, self._transport, ports)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._transport.run)
            await self._worker.run()
            nursery.cancel_scope.cancel()

    def on_task(self, task: Task) -> None:
        """Forget what has settled on chain."""
        if self._worker is not None:
            self._worker.forget(task.settled)
        self.book.forget(task.settled, task.generation)

    def describe(self, wanted: Wanted) -> Descriptor | None:
        """Return what this worker can say of a cell's inputs: its own cell's, or a neighbour's it sent."""
        kept = self.book.cell(wanted.generation, wanted.step, wanted.cell)
        if kept is None:
            return None
        if wanted.stage == self.seat.stage:
            return describe_own(kept, self.seat.client)
        x, gy = expected_messages(wanted, self.seat.manifest)
        if wanted.stage == self.seat.stage + 1 and isinstance(x, Activation):
            return Descriptor(signed_input(self._key, wanted.task, x, kept.trace.y), None)
        if wanted.stage == self.seat.stage - 1 and isinstance(gy, Gradient):
            return Descriptor(None, signed_input(self._key, wanted.task, gy, kept.trace.gx))
        return None

    def blob(self, address: bytes) -> memoryview | None:
        """Return a tensor or state of this seat by content address, also a state that only the ring holds."""
        found = self.book.blob(address)
        if found is None and self._worker is not None:
            for state in self._worker.states:
                self.book.provide_state(state)
            found = self.book.blob(address)
        return found

    async def _on_committed(self, record: StepRecord) -> None:
        assert self._worker is not None
        states = {state.step: state for state in self._worker.states}
        before = states.get(record.step - 1)
        if before is None:
            return  # rolled back since; the chain would refuse the claim of an ended generation
        claim = await trio.to_thread.run_sync(self.book.add, record, before.root)
        for step in (record.step - 1, record.step):
            if step in states:
                self.book.provide_state(states[step])
        self.steps += 1
        if claim is not None:
            self._outbox.put(claim)

    def _fetcher(self, fetch: Fetch) -> Callable[[bytes, tuple[str, ...]], Awaitable[StageState]]:
        size = stage_layout(self.seat.manifest, self.seat.stage).total
        return lambda root, holders: fetch_state(fetch, root, holders, size)
