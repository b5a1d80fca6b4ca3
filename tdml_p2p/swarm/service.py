"""The swarm service of a peer: takes seats of open tasks, runs them, answers audits and serves material.

Torch, and all that needs it, is loaded in the compute thread with the first work.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import msgspec
import structlog
import trio

from chain.engine import ChainEngine, SubmitRefused
from chain.keys import account_of, peer_id
from chain.state import Audit, State, Task
from chain.transactions import LeaveSeat, Opening
from tdml_p2p.requests import RequestFailed
from tdml_p2p.swarm.admission import known_answers
from tdml_p2p.swarm.applying import Applicant
from tdml_p2p.swarm.audited import audited_cell
from tdml_p2p.swarm.auditor import Auditor
from tdml_p2p.swarm.computing import ModestCompute, TorchCompute
from tdml_p2p.swarm.discretion import may_have_gradient
from tdml_p2p.swarm.evidence import EvidenceStore, keep_evidence
from tdml_p2p.swarm.inputs import (
    MAX_REPLY_BYTES,
    MAX_REQUEST_BYTES,
    PROTOCOL,
    Descriptor,
    InputsRefused,
    Wanted,
    decode_wanted,
    encode,
)
from tdml_p2p.swarm.leaving import Leaving
from tdml_p2p.swarm.library import Library
from tdml_p2p.swarm.material import Unavailable
from tdml_p2p.swarm.outbox import Outbox
from tdml_p2p.swarm.reexecution import Cell, Reexecutor
from tdml_p2p.swarm.replay import find_case, replay
from tdml_p2p.swarm.restoring import restore_cell, restore_step
from tdml_p2p.swarm.tracing import MAX_TRACE_REQUEST_BYTES, TRACE_PROTOCOL, TraceService
from tdml_p2p.swarm.transport import SwarmTransport
from trainer.faults import COMPUTE_ERRORS
from trainer.manifest import TaskManifest
from trainer.runtime import prepare_memory, release_memory
from trainer.trace import Recorder, lane, recording, span
from trainer.worker_ports import ThreadCompute

if TYPE_CHECKING:
    from trio_typing import TaskStatus

    from tdml_p2p.peer import Peer
    from tdml_p2p.swarm.session import WorkerSession
    from trainer.stage import StageLike

log = structlog.get_logger(__name__)

StageFactory = Callable[[TaskManifest, int], "StageLike"]
_INPUTS_SECONDS = 10.0
_BASE_SECONDS = 1.0


def _builder(recompute: bool) -> StageFactory:
    def build(manifest: TaskManifest, index: int) -> "StageLike":
        from trainer.stage import build_stage

        return build_stage(manifest, index, recompute)

    return build


class SwarmService:
    """Seats, sessions and audits of one peer; with `takes_seats` off it only audits."""

    def __init__(self, peer: "Peer", stage_factory: StageFactory | None = None) -> None:
        self._peer = peer
        self._engine: ChainEngine = peer.engine
        self._account = peer.key.account
        self._factory = stage_factory or _builder(peer.config.recompute)
        self._compute = TorchCompute(peer.config.threads)
        self.library = Library(peer.network, self._local_blob)
        self._outbox = Outbox(peer.engine.submit)
        self._evidence = EvidenceStore(peer.home.evidence_path, peer.network.blobs.store)
        # audits take turns with a peer's own training, and give way to that of others
        audits = self._compute if peer.config.work else ModestCompute(peer.config.threads, self._is_behind)
        self._reexecutor = Reexecutor(self.library.fetch, self._ask, audits, self._recorder_of)
        self._auditor = Auditor(
            self._account,
            self._outbox,
            self._reexecutor,
            self._describe_audit,
            self._open_audit,
            self._evidence,
        )
        self._sessions: dict[bytes, WorkerSession] = {}
        self.leaving = Leaving(self._engine, self._account, self._sessions)
        self._recorders: dict[bytes, Recorder] = {}
        self.applicant = Applicant(
            self._engine, self._compute, peer.config.memory, self._known_answers, self._held_memory
        )
        self._is_idle = True
        self._taken: set[bytes] = set()
        self._wanted: set[bytes] = set()
        self._sources: list[Callable[[bytes], memoryview | None]] = []
        self.describe_more: Callable[[Wanted], Descriptor | None] = lambda _: None

    async def run(self, *, task_status: "TaskStatus[None]" = trio.TASK_STATUS_IGNORED) -> None:
        """Follow the chain and do what it asks of this peer, until cancelled."""
        if self._peer.config.work or self._peer.config.validate:  # whoever has stake audits
            prepare_memory()  # before the threads whose arenas it forbids
        self._peer.network.on_request(PROTOCOL, self._serve_inputs, MAX_REQUEST_BYTES)
        tracing = TraceService(self._recorder_for)
        self._peer.network.on_request(TRACE_PROTOCOL, tracing.serve, MAX_TRACE_REQUEST_BYTES)
        self._peer.network.blobs.add_source(self._local_blob)
        self._peer.network.blobs.guard(self._may_have)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._outbox.run)
            nursery.start_soon(self._auditor.run)
            nursery.start_soon(tracing.run)
            async with self._engine.subscribe() as blocks:
                task_status.started()
                self._on_state(self._engine.state, nursery)
                async for _ in blocks:
                    self._on_state(self._engine.state, nursery)

    @property
    def compute(self) -> ThreadCompute:
        """The thread that all of this peer's torch work takes turns in."""
        return self._compute

    def add_source(self, source: Callable[[bytes], memoryview | None]) -> None:
        """Serve more material by content address."""
        self._sources.append(source)

    def progress(self, task: bytes) -> dict[str, int]:
        """Return what a seat of this peer has done for status: committed steps, known answers before the first."""
        session = self._sessions.get(task)
        answers = self.applicant.answers.get(task, 0)
        return {} if session is None else {"steps": session.steps, "known_answers": answers}

    def _on_state(self, state: State, nursery: trio.Nursery) -> None:
        unmeasured = self.applicant.note_seats(state, self._account, self._sessions)
        for task in state.open_tasks():
            if task.manifest not in self._wanted:
                self._wanted.add(task.manifest)
                nursery.start_soon(self._learn, task)
            manifest = self.library.manifest(task.manifest)
            if manifest is not None and len(manifest.seated) == task.stages:
                if task.id in unmeasured:
                    nursery.start_soon(self.applicant.hold, task.id, manifest)
                self._follow(state, task, manifest, nursery)
        was_idle, self._is_idle = self._is_idle, not state.open_tasks() and next(state.active_audits(), None) is None
        if self._forget_ended(state) or (self._is_idle and not was_idle):
            nursery.start_soon(trio.to_thread.run_sync, release_memory)
        self._auditor.on_state(state)

    def _forget_ended(self, state: State) -> bool:
        """Let go of the material of closed tasks, once no audit can ask for it; return whether there was any."""
        for identity, session in self._sessions.items():
            task = state.task(identity)
            if task is None or not task.is_open or task.deadline < state.height:
                session.stop()
        known = len(self._sessions)
        audited = {audit.task for audit in state.active_audits()}
        for identity in [task for task in self._sessions if task not in audited]:
            task = state.task(identity)
            if task is None or not task.is_open:
                del self._sessions[identity]
        for identity in [task for task in self._recorders if task not in self._sessions]:
            task = state.task(identity)
            if task is None or not task.is_open:
                del self._recorders[identity]
        self.applicant.forget_closed(state, self._account)
        return len(self._sessions) < known

    def _follow(self, state: State, task: Task, manifest: TaskManifest, nursery: trio.Nursery) -> None:
        session = self._sessions.get(task.id)
        seat = next((w for w in state.workers(task.id) if w.account == self._account), None)
        if session is not None:
            session.on_state(state, task)
            is_left = session.silence() > self._peer.config.grace and not session.is_stopped
            if is_left and seat is not None and seat.is_seated:
                nursery.start_soon(self._give_up, task.id, session)
        if seat is not None and seat.is_seated and seat.stage >= 0 and task.id not in self._taken:
            self._taken.add(task.id)  # at once: building the stage may take longer than a block
            nursery.start_soon(self._work, task, manifest.seated[seat.stage], manifest)
        is_free = seat is None and not state.account(self._account).barred
        may_apply = is_free and self._peer.config.work and peer_id(task.client) != self._peer.name
        if may_apply and self.applicant.begin(task.id):
            nursery.start_soon(self.applicant.apply, task, manifest)

    async def _give_up(self, task: bytes, session: "WorkerSession") -> None:
        """Leave a seat whose client has been silent for too long; what auditors may ask for stays."""
        session.stop()
        await self._leave(task, f"the client is silent for {session.silence():.0f} s")

    async def _leave(self, task: bytes, reason: str) -> None:
        log.warning("leaves a seat", task=task.hex(), reason=reason)
        try:
            await self._engine.submit(LeaveSeat(task))
        except SubmitRefused as error:
            log.warning("the seat ends with its lease", task=task.hex(), reason=error.reason)

    async def _learn(self, task: Task) -> None:
        """Fetch a task's manifest from its client, workers or whoever announces it, at every block until it is here."""
        workers = [peer_id(worker.account) for worker in self._engine.state.workers(task.id) if worker.is_seated]
        try:
            await self.library.learn(task.manifest, task.id, [peer_id(task.client), *workers])
        except Unavailable as error:
            log.info("manifest not available yet", task=task.id.hex(), reason=str(error))
            self._wanted.discard(task.manifest)

    async def _work(self, task: Task, index: int, manifest: TaskManifest) -> None:
        transport = SwarmTransport(
            task.id,
            self._peer.key,
            self._peer.name,
            self._peer.network.tensors,
            partial(self.is_member, task.id),
        )
        try:
            stage = await self._compute(partial(self._factory, manifest, index))
            is_whole = manifest.lora is None or await self._load_base(stage, task, manifest, index)
        except COMPUTE_ERRORS as error:
            is_whole = False
            self.applicant.decline(task.id, f"its stage cannot be built: {str(error) or 'too little memory'}")
            await self._leave(task.id, self.applicant.declined[task.id])
        if not is_whole:
            transport.close()
            return
        from tdml_p2p.swarm.session import Seat, WorkerSession, step_memory  # with torch, which is here now

        room = step_memory(self._peer.config.memory, self._held_memory(task.id), manifest, index)
        seat = Seat(task.id, peer_id(task.client), index, task.depth, manifest, room)
        session = WorkerSession(seat, self._peer.key, transport, self._outbox, stage)
        session.recorder = self._recorders.setdefault(task.id, session.recorder)
        self._sessions[task.id] = session
        log.info("working", task=task.id.hex(), stage=index)
        try:
            await session.run(self._compute, self.library.fetch)
        except Exception:
            # Whatever a client has had its worker do costs this seat, not the peer; what auditors may ask for stays.
            log.exception("a seat failed", task=task.id.hex())
            session.stop()
            await self._leave(task.id, "its session failed")
            return
        finally:
            transport.close()
        log.info("task finished", task=task.id.hex(), steps=session.steps)

    def _held_memory(self, but: bytes) -> int:
        """Return about how many bytes this peer's seats of other tasks take, those included that it has applied for."""
        held = {task: size for task, size in self.applicant.reserved.items() if task not in self._sessions}
        held |= {task: one.footprint for task, one in self._sessions.items() if not one.is_stopped}
        return sum(size for task, size in held.items() if task != but)

    async def _known_answers(self, task: Task) -> int:
        """Return how many verified cells of a task this machine computes alike; raise `WrongAnswer`."""
        newest, params = partial(self._audits_of, task.id), self._engine.state.params
        async with self._engine.subscribe() as blocks:
            return await known_answers(newest, blocks, self._describe_audit, self._reexecutor, params)

    def _audits_of(self, task: bytes) -> list[Audit]:
        """Return the audits of a task's cells, without those of optimiser's steps."""
        state = self._engine.state
        found = state.task(task)
        return [audit for audit in state.audits_of(task) if found is not None and audit.cell != found.transition]

    async def _load_base(self, stage: "StageLike", task: Task, manifest: TaskManifest, index: int) -> bool:
        """Give a stage its frozen weights, asked for until they come; return whether the seat is still held then."""
        while self.leaving.is_seated(task.id):
            workers = [worker for worker in self._engine.state.workers(task.id) if worker.is_seated]
            near = sorted(workers, key=lambda worker: worker.stage != index)
            holders = [*(peer_id(worker.account) for worker in near), peer_id(task.client)]
            try:
                stage.load_base(await self._reexecutor.bases.get(manifest, index, holders))
            except Unavailable as error:
                log.info("frozen weights not available yet", task=task.id.hex(), reason=str(error))
                await trio.sleep(_BASE_SECONDS)
            else:
                return True
        return False

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
        sources = [*(session.blob for session in self._sessions.values()), self._reexecutor.bases.blob, *self._sources]
        return next((found for source in sources if (found := source(address)) is not None), None)

    def _may_have(self, sender: str, address: bytes) -> bool:
        claimed = [one for session in self._sessions.values() for one in session.book.gradients(address)]
        try:
            account = account_of(sender)
        except ValueError:
            return not claimed
        state = self._engine.state
        allowed = (may_have_gradient(state, claim, self._account, cell, account) for claim, cell in claimed)
        return not claimed or any(allowed)

    async def _serve_inputs(self, _sender: str, data: bytes) -> bytes:
        wanted = decode_wanted(data)
        session = self._sessions.get(wanted.task)
        if session is not None and wanted.cell == session.seat.manifest.microbatches:
            await restore_step(session, wanted, self._reexecutor)
        found = session.describe(wanted) if session is not None else self.describe_more(wanted)
        found = found or await trio.to_thread.run_sync(self._evidence.describe, wanted)
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

    def _is_behind(self) -> bool:
        return self._auditor.is_behind

    async def _open_audit(self, audit: Audit) -> Opening | None:
        session = self._sessions.get(audit.task)
        if session is None:
            return None
        place = (audit.generation, audit.step, audit.cell)
        wanted = Wanted(audit.task, audit.generation, audit.step, session.seat.stage, audit.cell)
        await restore_cell(session, wanted, self._reexecutor)
        with recording(session.recorder), lane("openings"), span("open", audit.step, audit.cell):
            opening = await trio.to_thread.run_sync(session.book.opening, place, audit.id, audit.key)
        signed = session.describe(wanted)
        if opening is None or signed is None or audit.cell == session.seat.manifest.microbatches:
            return opening
        return msgspec.structs.replace(opening, inputs=encode(signed))

    def _recorder_for(self, sender: str, task: bytes) -> Recorder | None:
        """Return the recorder of an open task, a seat here or not yet, for its client, who alone may look at it."""
        found = self._engine.state.task(task)
        if found is None or not found.is_open or peer_id(found.client) != sender:
            return None
        return self._recorders.setdefault(task, Recorder())

    def _recorder_of(self, task: bytes) -> Recorder | None:
        session = self._sessions.get(task)
        return None if session is None else session.recorder

    async def replay(self, identity: bytes) -> dict[str, object]:
        """Execute the cell of an audit again and tell how it compares with the claim; raise `NotReplayable`."""
        case = await find_case(self._engine.reader, self._engine.state, identity, self.library.read)
        return await replay(case, self._reexecutor, self._engine.state.params)

    async def collect(self, identity: bytes, store: EvidenceStore) -> None:
        """Keep what an audit rests on in `store`, re-executed here first; raise `NotReplayable`, `Unavailable`."""
        case = await find_case(self._engine.reader, self._engine.state, identity, self.library.read)
        keep = partial(keep_evidence, store, self.library.fetch, case.audit, case.cell)
        await self._reexecutor.run(case.cell, keep)

    def _describe_audit(self, audit: Audit) -> Cell | None:
        state = self._engine.state
        task, claim = state.task(audit.task), state.claim(audit.claim)
        manifest = self.library.manifest(task.manifest) if task is not None else None
        if task is None or claim is None or manifest is None:
            return None
        return audited_cell(audit, claim, state, manifest)
