"""The swarm service of a peer: takes seats of open tasks, runs them, answers audits and serves material.

Torch, and all that needs it, is loaded in the compute thread with the first work.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import structlog
import trio

from chain.engine import ChainEngine, SubmitRefused
from chain.keys import account_of, peer_id
from chain.state import Audit, State, Task
from chain.transactions import Opening, TakeSeat
from tdml_p2p.requests import RequestFailed
from tdml_p2p.swarm.auditor import Auditor
from tdml_p2p.swarm.inputs import (
    MAX_REPLY_BYTES,
    MAX_REQUEST_BYTES,
    PROTOCOL,
    Descriptor,
    InputsRefused,
    Senders,
    Wanted,
    decode_wanted,
    encode,
)
from tdml_p2p.swarm.library import Library
from tdml_p2p.swarm.outbox import Outbox
from tdml_p2p.swarm.reexecution import Cell, Reexecutor, Unavailable
from tdml_p2p.swarm.transport import SwarmTransport
from trainer.manifest import TaskManifest
from trainer.runtime import prepare_memory, prepare_process
from trainer.worker_ports import ThreadCompute

if TYPE_CHECKING:
    from trio_typing import TaskStatus

    from tdml_p2p.peer import Peer
    from tdml_p2p.swarm.session import WorkerSession
    from trainer.stage import StageLike

log = structlog.get_logger(__name__)

StageFactory = Callable[[TaskManifest, int], "StageLike"]
T = TypeVar("T")
_INPUTS_SECONDS = 10.0


class _Compute(ThreadCompute):
    """Torch work in one thread; the first piece loads torch."""

    def __init__(self, threads: int) -> None:
        super().__init__()
        self._threads = threads
        self._is_ready = False

    async def __call__(self, work: Callable[[], T], /) -> T:
        """Return what `work` returns, run in a thread."""
        return await super().__call__(partial(self._prepared, work))

    def _prepared(self, work: Callable[[], T]) -> T:
        if not self._is_ready:
            prepare_process(self._threads)
            self._is_ready = True
        return work()


def _build_stage(manifest: TaskManifest, index: int) -> "StageLike":
    from trainer.stage import build_stage

    return build_stage(manifest, index)


class SwarmService:
    """Seats, sessions and audits of one peer; with `takes_seats` off it only audits."""

    def __init__(self, peer: "Peer", stage_factory: StageFactory | None = None) -> None:
        self._peer = peer
        self._engine: ChainEngine = peer.engine
        self._account = peer.key.account
        self._factory = stage_factory or _build_stage
        self._compute = _Compute(peer.config.threads)
        self.library = Library(peer.network, self._local_blob)
        self._outbox = Outbox(peer.engine.submit)
        self._auditor = Auditor(
            self._account,
            self._outbox,
            Reexecutor(self.library.fetch, self._ask, self._compute),
            self._describe_audit,
            self._open_audit,
        )
        self._sessions: dict[bytes, WorkerSession] = {}
        self._applied: set[bytes] = set()
        self._taken: set[bytes] = set()
        self._wanted: set[bytes] = set()
        self._sources: list[Callable[[bytes], memoryview | None]] = []
        self.describe_more: Callable[[Wanted], Descriptor | None] = lambda _: None

    async def run(self, *, task_status: "TaskStatus[None]" = trio.TASK_STATUS_IGNORED) -> None:
        """Follow the chain and do what it asks of this peer, until cancelled."""
        if self._peer.config.work:
            prepare_memory()  # before the threads whose arenas it forbids
        self._peer.network.on_request(PROTOCOL, self._serve_inputs, MAX_REQUEST_BYTES)
        self._peer.network.blobs.add_source(self._local_blob)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._outbox.run)
            nursery.start_soon(self._auditor.run)
            async with self._engine.subscribe() as blocks:
                task_status.started()
                self._on_state(self._engine.state, nursery)
                async for _ in blocks:
                    self._on_state(self._engine.state, nursery)

    def add_source(self, source: Callable[[bytes], memoryview | None]) -> None:
        """Serve more material by content address."""
        self._sources.append(source)

    def seats(self) -> list[dict[str, object]]:
        """Return this peer's seats for status: task, stage and committed steps."""
        return [
            {"task": task.hex(), "stage": session.seat.stage, "steps": session.steps}
            for task, session in self._sessions.items()
        ]

    def _on_state(self, state: State, nursery: trio.Nursery) -> None:
        for task in state.open_tasks():
            if task.manifest not in self._wanted:
                self._wanted.add(task.manifest)
                nursery.start_soon(self._learn, task)
            manifest = self.library.manifest(task.manifest)
            if manifest is not None:
                self._follow(state, task, manifest, nursery)
        self._forget_ended(state)
        self._auditor.on_state(state)

    def _forget_ended(self, state: State) -> None:
        """Let go of the material of closed tasks, once no audit can ask for it."""
        audited = {audit.task for audit in state.active_audits()}
        for identity in [task for task in self._sessions if task not in audited]:
            task = state.task(identity)
            if task is None or not task.is_open:
                del self._sessions[identity]

    def _follow(self, state: State, task: Task, manifest: TaskManifest, nursery: trio.Nursery) -> None:
        session = self._sessions.get(task.id)
        seat = next((w for w in state.workers(task.id) if w.account == self._account), None)
        if session is not None:
            session.on_task(task)
        if seat is not None and seat.is_seated and seat.stage >= 0 and task.id not in self._taken:
            self._taken.add(task.id)  # at once: building the stage may take longer than a block
            nursery.start_soon(self._work, task, seat.stage, manifest)
        is_free = seat is None and task.id not in self._applied and not state.account(self._account).barred
        if is_free and self._peer.config.work and peer_id(task.client) != self._peer.name:
            self._applied.add(task.id)
            nursery.start_soon(self._apply, task)

    async def _learn(self, task: Task) -> None:
        """Fetch a task's manifest from its client or whoever announces it, at every block until it is here."""
        try:
            await self.library.learn(task.manifest, task.id, peer_id(task.client))
        except Unavailable as error:
            log.info("manifest not available yet", task=task.id.hex(), reason=str(error))
            self._wanted.discard(task.manifest)

    async def _apply(self, task: Task) -> None:
        from trainer.kernel import kernel_class

        kernel = await self._compute(kernel_class)
        try:
            await self._engine.submit(TakeSeat(task.id, kernel))
        except SubmitRefused as error:
            log.warning("cannot apply for a seat yet", task=task.id.hex(), reason=error.reason)
            self._applied.discard(task.id)
            return
        log.info("applied for a seat", task=task.id.hex())

    async def _work(self, task: Task, index: int, manifest: TaskManifest) -> None:
        transport = SwarmTransport(
            task.id,
            self._peer.key,
            self._peer.name,
            self._peer.network.tensors,
            partial(self.is_member, task.id),
        )
        stage = await self._compute(partial(self._factory, manifest, index))
        from tdml_p2p.swarm.session import Seat, WorkerSession  # with torch, which is here now

        seat = Seat(task.id, peer_id(task.client), index, task.depth, manifest, self._peer.config.memory)
        session = WorkerSession(seat, self._peer.key, transport, self._outbox, stage)
        self._sessions[task.id] = session
        log.info("working", task=task.id.hex(), stage=index)
        try:
            await session.run(self._compute, self.library.fetch)
        finally:
            transport.close()
        log.info("task finished", task=task.id.hex(), steps=session.steps)

    def is_member(self, task_id: bytes, peer: str) -> bool:
        """Whether `peer` is the client or holds a seat now: an evicted peer is not."""
        state = self._engine.state
        task = state.task(task_id)
        try:
            account = account_of(peer)
        except ValueError:
            return False  # libp2p also takes keys of other kinds
        if task is None:
            return False
        return account == task.client or any(
            worker.account == account and worker.is_seated for worker in state.workers(task_id)
        )

    # what others ask for

    def _local_blob(self, address: bytes) -> memoryview | None:
        sources = [*(session.blob for session in self._sessions.values()), *self._sources]
        return next((found for source in sources if (found := source(address)) is not None), None)

    async def _serve_inputs(self, _sender: str, data: bytes) -> bytes:
        wanted = decode_wanted(data)
        session = self._sessions.get(wanted.task)
        found = session.describe(wanted) if session is not None else self.describe_more(wanted)
        if found is None:
            raise InputsRefused("this peer does not hold that cell")
        return encode(found)

    async def _ask(self, peer: str, request: bytes) -> bytes:
        if peer == self._peer.name:
            return await self._serve_inputs(peer, request)
        try:
            return await self._peer.network.request(
                peer, PROTOCOL, request, limit=MAX_REPLY_BYTES, timeout=_INPUTS_SECONDS
            )
        except RequestFailed as error:
            raise Unavailable(str(error)) from None

    # audits

    def _open_audit(self, audit: Audit) -> Opening | None:
        session = self._sessions.get(audit.task)
        if session is None:
            return None
        return session.book.opening((audit.generation, audit.step, audit.cell), audit.id, audit.key)

    def _describe_audit(self, audit: Audit) -> Cell | None:
        state = self._engine.state
        task, claim = state.task(audit.task), state.claim(audit.claim)
        manifest = self.library.manifest(task.manifest) if task is not None else None
        if task is None or claim is None or manifest is None:
            return None
        wanted = Wanted(audit.task, audit.generation, audit.step, audit.stage, audit.cell)
        stages: dict[int, list[str]] = {}
        for worker in state.workers(audit.task):
            stages.setdefault(worker.stage, []).append(peer_id(worker.account))
        client = peer_id(task.client)
        before, after = stages.get(audit.stage - 1, []), stages.get(audit.stage + 1, [])
        senders = Senders(
            frozenset(before if audit.stage else [client]),
            frozenset(after if audit.stage < task.stages - 1 else [client]),
        )
        holders = _distinct([peer_id(audit.worker), *stages.get(audit.stage, []), *before, *after, client])
        return Cell(wanted, manifest, claim.claim.state_before, holders, senders)


def _distinct(peers: Sequence[str]) -> tuple[str, ...]:
    """Return `peers` in order, each once."""
    return tuple(dict.fromkeys(peers))
