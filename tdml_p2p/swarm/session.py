"""One seat of this peer: a worker of one stage, its claims, and what it keeps for auditors."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

import structlog
import trio

from chain.keys import PrivateKey
from chain.ledger.book import audit_id
from chain.ledger.claims import claim_id
from chain.ledger.transitions import leaves_of
from chain.state import State, Task
from tdml_p2p.swarm.inputs import Descriptor, Input, Wanted, describe_own, expected_messages, signed_input
from tdml_p2p.swarm.material import Fetch
from tdml_p2p.swarm.outbox import Outbox
from tdml_p2p.swarm.states import fetch_state
from tdml_p2p.swarm.step_material import UNSIGNED
from tdml_p2p.swarm.traces import TraceBook
from tdml_p2p.swarm.transport import SwarmTransport
from trainer.faults import COMPUTE_ERRORS
from trainer.footprint import footprint
from trainer.manifest import TaskManifest
from trainer.messages import Activation, Gradient
from trainer.stage import StageLike, stage_layout
from trainer.state import StageState
from trainer.trace import Recorder, recording
from trainer.worker import Worker
from trainer.worker_ports import DEFAULT_MEMORY_LIMIT, Compute, WorkerConfig, WorkerPorts
from trainer.worker_step import StepRecord

log = structlog.get_logger(__name__)

_GRADIENTS_SHARE = 4
"""Of the memory for a step's tensors, one part in this many is for gradients kept until audits have passed."""
SPARE_STATES = 3
"""States kept beyond the ring depth: the settled one, the current one and the pending one."""


@dataclass(frozen=True, slots=True)
class Seat:
    """A stage of a task that the chain gave to this peer, by its number in the manifest."""

    task: bytes
    client: str
    stage: int
    depth: int
    manifest: TaskManifest
    memory: int = 0
    """Bytes that the tensors of a step may take; 0 is the usual bound."""

    @property
    def on_chain(self) -> int:
        """The stage's number on chain, which counts only those that have seats."""
        return self.manifest.seated.index(self.stage)


def step_memory(memory: int, held: int, manifest: TaskManifest, index: int) -> int:
    """Return how many of `memory` bytes, of which other seats take `held`, are for a seat's step; 0 sets no bound."""
    need = footprint(manifest, index)
    return max(memory - held - need.resident, need.step) if memory else 0


class WorkerSession:
    """The work of one seat; `run` returns when the client finishes the task."""

    def __init__(
        self, seat: Seat, key: PrivateKey, transport: SwarmTransport, outbox: Outbox, stage: StageLike
    ) -> None:
        self.seat = seat
        room = (seat.memory or DEFAULT_MEMORY_LIMIT) // _GRADIENTS_SHARE
        self.book = TraceBook(seat.task, key.seed, seat.manifest.wire, room)
        self.steps = 0
        self.recorder = Recorder()
        self._key = key
        self._transport = transport
        self._outbox = outbox
        self._stage = stage
        self._worker: Worker | None = None
        self._scope = trio.CancelScope()
        self._began: float | None = None

    async def run(self, compute: Compute, fetch: Fetch) -> None:
        """Serve the seat until the client says that the task is over."""
        self._began = trio.current_time()
        config = WorkerConfig(
            client=self.seat.client,
            stage=self._stage,
            manifest=self.seat.manifest,
            ring_depth=self.seat.depth + SPARE_STATES,
            memory_limit=self.seat.memory or DEFAULT_MEMORY_LIMIT,
        )
        ports = WorkerPorts(compute=compute, fetch_state=self._fetcher(fetch), on_committed=self._on_committed)
        self._worker = Worker(config, self._transport, ports)
        with recording(self.recorder), self._scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._transport.run)
                await self._worker.run()
                nursery.cancel_scope.cancel()

    @property
    def footprint(self) -> int:
        """About how many bytes the seat takes."""
        return footprint(self.seat.manifest, self.seat.stage).total

    @property
    def peer(self) -> str:
        """The name of the peer that holds the seat."""
        return self._transport.peer

    def silence(self) -> float:
        """Return for how many seconds nothing has been heard of the client."""
        if self._began is None:
            return 0.0
        return trio.current_time() - max(self._began, self._transport.heard.get(self.seat.client, 0.0))

    @property
    def is_stopped(self) -> bool:
        """Whether `run` was told to end."""
        return self._scope.cancel_called

    def stop(self) -> None:
        """End `run`: the task is over, whatever its client says; what auditors may ask for stays."""
        self._scope.cancel()

    def on_state(self, state: State, task: Task) -> None:
        """Forget what has settled on chain, and gradients that no audit was drawn for."""
        if self._worker is not None:
            self._worker.forget(task.settled)
        self.book.forget(task.settled, task.generation)
        for claim in self.book.unreleased():
            record = state.claim(claim_id(claim, self._key.account))
            if record is not None and record.drawn:
                leaves = leaves_of(task, claim)
                audited = {leaf for leaf in leaves if state.audit(audit_id(record, leaf)) is not None}
                self.book.release(claim, leaves if task.transition in audited else audited)

    def describe(self, wanted: Wanted) -> Descriptor | None:
        """Return what this worker can say of a cell's inputs: its own cell's, or a neighbour's it sent."""
        if wanted.cell == self.seat.manifest.microbatches and wanted.stage == self.seat.stage:
            record = self.book.step_record(wanted.generation, wanted.step)
            return None if record is None else Descriptor(Input(record, self.peer, UNSIGNED), None)
        kept = self.book.cell(wanted.generation, wanted.step, wanted.cell)
        if kept is None or wanted.stage >= self.seat.manifest.stages:
            return None
        if wanted.stage == self.seat.stage:
            return describe_own(kept, self.seat.client)
        x, gy = expected_messages(wanted, self.seat.manifest)
        if wanted.stage == self.seat.stage + 1 and isinstance(x, Activation):
            sent = self.book.sent(kept, kept.record.y, kept.trace.y)
            return Descriptor(signed_input(self._key, wanted.task, x, sent), None)
        if wanted.stage == self.seat.stage - 1 and isinstance(gy, Gradient):
            sent = self.book.sent(kept, kept.record.gx, kept.trace.gx)
            return Descriptor(None, signed_input(self._key, wanted.task, gy, sent))
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
        before, after = states.get(record.step - 1), states.get(record.step)
        if before is None or after is None:
            return  # rolled back since; the chain would refuse the claim of an ended generation
        placed = replace(record, stage=self.seat.on_chain)
        try:
            claim = await trio.to_thread.run_sync(self.book.add, placed, before.root, after.manifest)
        except COMPUTE_ERRORS as error:
            log.warning("a step is not claimed", step=record.step, reason=str(error) or "too little memory")
            return
        for step in (record.step - 1, record.step):
            if step in states:
                self.book.provide_state(states[step])
        self.steps += 1
        self._outbox.put(claim)

    def _fetcher(self, fetch: Fetch) -> Callable[[bytes, tuple[str, ...]], Awaitable[StageState]]:
        size = stage_layout(self.seat.manifest, self.seat.stage).total
        return lambda root, holders: fetch_state(fetch, root, holders, size)
