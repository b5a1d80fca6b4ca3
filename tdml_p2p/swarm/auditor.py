"""The auditor: answers every duty that the chain lays on this peer, from the commitment to the vote.

A duty is kept until it is done or its deadline height has passed; material that cannot be had now is
asked for again at the next block. Results stay in memory between commitment and reveal: a peer that
restarts in between is absent from that audit, which costs it the fee and nothing else.
"""

import math
import secrets
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import NamedTuple

import msgspec
import structlog
import trio

from chain.keys import peer_id
from chain.params import Params
from chain.state import Audit, Duty, State
from chain.transactions import EXACT, Commitment, Opening, Reveal, Tolerance, reveal_commitment
from chain.verdicts import BLANK, is_blank, limits_for
from tdml_p2p.swarm.asking import Limit, limited_by
from tdml_p2p.swarm.contradictions import claimed_result, disputed_results, has_false_results, has_other_inputs
from tdml_p2p.swarm.doubts import Doubt
from tdml_p2p.swarm.evidence import EvidenceStore, keep_evidence
from tdml_p2p.swarm.inputs import misleads, to_show
from tdml_p2p.swarm.material import Buffer, Unavailable
from tdml_p2p.swarm.outbox import Outbox
from tdml_p2p.swarm.reexecution import Cell, Execution, Keep, Reexecutor
from tdml_p2p.swarm.step_audits import contradicts

log = structlog.get_logger(__name__)

_KEPT_EXECUTIONS = 64
_FETCH_SECONDS = 5.0
"""How long a reveal waits for the worker's tensors at least."""
_FETCH_SHARE = 0.5
"""Of the time that is left for a reveal, the part in which those tensors may come."""
_RETRY_SECONDS = 0.5
_SPARE_BLOCKS = 2
_REVEALS_AT_ONCE = 8
"""Workers that keep their tensors back make others' reveals wait no longer than this many can."""
_MANY = 4
_LANES = ("open", "reveal", "commit", "judge")


@dataclass(frozen=True, slots=True)
class Answer:
    """A re-execution, None where the material was kept back, and the reveal that its commitment binds.

    There is no cell where the task's manifest was kept back, or says otherwise than the task.
    """

    execution: Execution | None
    cell: Cell | None
    reveal: Reveal
    doubt: Doubt | None


class Finding(NamedTuple):
    """What a peer finds once a cell is opened, by the names of a reveal."""

    contradiction: bool = False
    missing: bool = False
    shown: bytes = b""
    misled: bool = False
    tolerance: Tolerance = EXACT


class Auditor:
    """Answers the duties of one account; `describe` turns an audit into the cell to re-execute."""

    def __init__(
        self,
        account: bytes,
        outbox: Outbox,
        reexecutor: Reexecutor,
        describe: Callable[[Audit], "Cell | None"],
        open_cell: Callable[[Audit], Awaitable["Opening | None"]],
        evidence: "EvidenceStore | None" = None,
    ) -> None:
        self._account = account
        self._outbox = outbox
        self._reexecutor = reexecutor
        self._describe = describe
        self._open_cell = open_cell
        self._evidence = evidence
        self._height, self._params = 0, Params()
        self._asked: dict[tuple[bytes, int], tuple[int, int]] = {}
        """Heights since which material is being asked for, and the blocks for that."""
        self._committed = 0
        self._limits: list[tuple[int, Limit]] = []
        self._answers: dict[tuple[bytes, int], Answer] = {}
        self._busy: set[tuple[str, bytes, int]] = set()
        self._due: set[tuple[str, bytes, int]] = set()
        self._lanes = {kind: trio.open_memory_channel[tuple[Duty, Audit]](math.inf) for kind in _LANES}

    def on_state(self, state: State) -> None:
        """Take up the duties of a new final state; those that are over are forgotten."""
        self._height, self._params = state.height, state.params
        self._end_limits()
        duties = sorted(state.duties(self._account), key=partial(_turn, state))
        self._due = {(duty.kind, duty.audit, duty.round) for duty in duties}
        self._busy &= self._due
        rounds = {(duty.audit, duty.round) for duty in duties}
        self._asked = {name: since for name, since in self._asked.items() if name in rounds}
        active = {audit.id for audit in state.active_audits()}
        self._answers = {name: answer for name, answer in self._answers.items() if name[0] in active}
        for duty in duties:
            name = (duty.kind, duty.audit, duty.round)
            audit = state.audit(duty.audit)
            if name in self._busy or audit is None:
                continue
            self._busy.add(name)
            # the chain gives more time for audits taken in the order of their draws, but not for disputes
            lane = "judge" if duty.kind == "commit" and duty.round else duty.kind
            self._lanes[lane][0].send_nowait((duty, audit))

    @property
    def is_behind(self) -> bool:
        """Whether more re-executions are owed than come up at once now and then."""
        return sum(kind == "commit" for kind, _, _ in self._due) > _MANY

    async def run(self) -> None:
        """Answer duties until cancelled; openings wait for nothing, and reveals not for re-executions."""
        async with trio.open_nursery() as nursery:
            for kind, (_, duties) in self._lanes.items():
                for _ in range(_REVEALS_AT_ONCE if kind == "reveal" else 1):
                    nursery.start_soon(self._serve, duties)

    async def _serve(self, duties: "trio.MemoryReceiveChannel[tuple[Duty, Audit]]") -> None:
        async for duty, audit in duties:
            name = (duty.kind, duty.audit, duty.round)
            if name not in self._due:
                continue
            try:
                await self._answer(duty, audit)
            except Unavailable as error:
                log.info("audit material not available yet", audit=duty.audit.hex(), reason=str(error))
                self._busy.discard(name)
            except Exception:
                # Whatever others published costs this audit, not the peer; the fault is logged with its traceback.
                log.exception("an audit failed", audit=duty.audit.hex(), duty=duty.kind)

    async def _answer(self, duty: Duty, audit: Audit) -> None:
        match duty.kind:
            case "commit":
                await self._commit(duty, audit)
            case "reveal":
                await self._reveal(duty, audit)
            case "open":
                opening = await self._open_cell(audit)
                if opening is not None:
                    self._outbox.put(opening)
            case other:
                raise AssertionError(f"unknown duty {other}")

    async def _commit(self, duty: Duty, audit: Audit) -> None:
        cell = self._describe(audit)
        execution: Execution | None = None
        with self._limit(duty) as may_report:
            try:
                if cell is None:
                    raise Unavailable("the task's manifest is not here yet, or says otherwise than the task")
                execution = await self._reexecutor.run(cell, self._keeper(duty, audit, cell))
            except Exception as error:
                # What cannot be executed is no better than what cannot be had: who said nothing would be absent.
                if not isinstance(error, Unavailable):
                    log.exception("an audit cannot be executed", audit=duty.audit.hex())
                if not may_report():
                    raise Unavailable(str(error) or type(error).__name__) from error
        shared = own = BLANK
        is_other, doubt = False, None
        if cell is not None and execution is not None:
            if not _is_of_another_cell(execution, cell, audit):
                shared = own = await trio.to_thread.run_sync(execution.sketch, audit.key)
                if duty.round:
                    own = await trio.to_thread.run_sync(execution.sketch, duty.key)
            is_other = await self._reexecutor.is_other_kernel(cell)
            doubt = Doubt(self._reexecutor, cell, execution)
        reveal = Reveal(
            duty.audit, duty.round, secrets.token_bytes(32), shared, own, False, execution is None, is_other
        )
        self._answers[duty.audit, duty.round] = Answer(execution, cell, reveal, doubt)
        while len(self._answers) > _KEPT_EXECUTIONS:
            del self._answers[next(iter(self._answers))]
        if not duty.round:
            self._committed = self._height
        self._outbox.put(Commitment(duty.audit, duty.round, reveal_commitment(self._account, reveal)))

    @contextmanager
    def _limit(self, duty: Duty) -> Iterator[Callable[[], bool]]:
        """Ask for material in three quarters of the time; yield whether its lack may then be committed to.

        Not by who had no time to ask. The chain gives a whole window from the last commitment on for an audit that had
        to wait for others.
        """
        name, blocks = (duty.audit, duty.round), duty.deadline - duty.drawn_at
        begun, window = self._asked.setdefault(name, (self._height, blocks))
        deadline = duty.deadline if duty.round else max(duty.deadline, self._committed + window)
        last = min(deadline - _SPARE_BLOCKS, (begun + 3 * deadline) // 4)
        is_long = 3 * (last - begun) >= self._params.commit_window
        limit = Limit()
        self._limits.append((last, limit))
        self._end_limits()
        try:
            with limited_by(limit):
                yield lambda: is_long and limit.is_over
        finally:
            self._limits.remove((last, limit))

    def _end_limits(self) -> None:
        for last, limit in self._limits:
            if self._height >= last:
                limit.end()

    def _keeper(self, duty: Duty, audit: Audit, cell: Cell) -> Keep | None:
        """Return what keeps the material of a disputed audit for those who replay it."""
        if self._evidence is None or not duty.round:
            return None
        return partial(keep_evidence, self._evidence, self._reexecutor.fetch, audit, cell)

    async def _reveal(self, duty: Duty, audit: Audit) -> None:
        answer = self._answers.get((duty.audit, duty.round))
        if answer is None or audit.opening is None:
            return
        tolerance = await self._tolerated(answer, audit, audit.opening)
        if tolerance is None:
            log.warning("own results are too unsteady to judge a cell", audit=audit.id.hex())
            return
        blocks = duty.deadline - self._height - _SPARE_BLOCKS
        seconds = max(_FETCH_SECONDS, _FETCH_SHARE * blocks * self._params.block_interval_ms / 1000)
        found = await self._look(answer, audit.opening, peer_id(audit.worker), seconds)
        if audit.reveal is not None and _is_misled(answer, audit.reveal, audit.opening):
            found = found._replace(misled=True)
        found = found._replace(tolerance=tolerance)
        self._outbox.put(msgspec.structs.replace(answer.reveal, **found._asdict()))

    async def _tolerated(self, answer: Answer, audit: Audit, opening: Opening) -> Tolerance | None:
        """Return how far off the opened sketch may be for this peer; None if it cannot tell right from false."""
        if answer.doubt is None or answer.reveal.shared == BLANK:
            return EXACT
        audited, limits = audit.reveal, limits_for(self._params, answer.reveal)
        shared = None if audited is None or is_blank(audited) else audited.shared
        return await answer.doubt.tolerance(audit.key, opening.sketch, limits, shared)

    async def _look(self, answer: Answer, opening: Opening, worker: str, seconds: float) -> Finding:
        """Return whether the opened trace names false inputs or results, and whether claimed ones are missing."""
        if answer.execution is None or answer.cell is None:
            return Finding(missing=True)
        opened = opening.trace
        if answer.cell.is_transition:
            # a record that nobody has signed for is no evidence unless it is the one that was opened
            is_other = has_other_inputs(answer.execution, opened)
            return Finding(not is_other and contradicts(answer.execution, answer.cell, opening), is_other)
        if has_other_inputs(answer.execution, opened):
            # only the auditor computed before the opening: what it was given speaks for it
            is_excuse = answer.reveal.round == 0
            return Finding(contradiction=True, shown=to_show(answer.execution.inputs, opened) if is_excuse else b"")
        claimed: dict[str, Buffer] = {}
        until = trio.current_time() + seconds
        disputed = await trio.to_thread.run_sync(disputed_results, answer.execution, opened)
        with trio.move_on_at(until):
            for attempt in count():
                if attempt:  # a worker that is behind by a block does not know yet who may ask
                    await trio.sleep(_RETRY_SECONDS)
                for name in [name for name in disputed if name not in claimed]:
                    with suppress(Unavailable):
                        claimed[name] = await self._reexecutor.fetch(disputed[name], answer.cell.holders)
                if len(claimed) == len(disputed):
                    break
        limits = limits_for(self._params, answer.reveal)
        is_false = False
        if claimed:  # else all is, bit for bit, what was claimed
            is_false = await trio.to_thread.run_sync(has_false_results, answer.execution, claimed, limits)
        if is_false and answer.doubt is not None:
            is_false = await answer.doubt.stands(partial(has_false_results, answer.execution, claimed, limits))
        is_missing = len(claimed) < len(disputed)
        result = await trio.to_thread.run_sync(claimed_result, answer.execution, claimed)
        if result is not None and not is_false and not is_missing and answer.cell.manifest.quorum == 1:
            is_missing = await self._reexecutor.handed_others(answer.cell, worker, result, limits, until)
        return Finding(is_false, is_missing)


def _turn(state: State, duty: Duty) -> tuple[int, bytes]:
    """Return when a duty is taken up: in the order of the draws, the cells of one claim (one state) together."""
    audit = state.audit(duty.audit)
    return duty.drawn_at, b"" if audit is None else audit.claim


def _is_misled(answer: Answer, audited: Reveal, opening: Opening) -> bool:
    """Whether a voter that has the opened inputs finds that the auditor was given others, as signed as these."""
    cell, opened = answer.cell, opening.trace
    if not audited.shown or answer.reveal.round != 2 or answer.execution is None or cell is None or cell.is_transition:
        return False
    if has_other_inputs(answer.execution, opened):
        return False
    return misleads(audited.shown, opened, cell.wanted, cell.manifest, cell.senders)


def _is_of_another_cell(execution: Execution, cell: Cell, audit: Audit) -> bool:
    """Whether an opened cell has other inputs than this peer was given: its results say nothing of anybody's."""
    return audit.opening is not None and not cell.is_transition and has_other_inputs(execution, audit.opening.trace)
