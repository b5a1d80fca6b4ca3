"""The auditor: answers every duty that the chain lays on this peer, from the commitment to the vote.

A duty is kept until it is done or its deadline height has passed; material that cannot be had now is
asked for again at the next block. Results stay in memory between commitment and reveal: a peer that
restarts in between is absent from that audit, which costs it the fee and nothing else.
"""

import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass

import structlog
import trio

from chain.state import Audit, Duty, State
from chain.transactions import Commitment, Opening, Reveal, Trace, reveal_commitment
from tdml_p2p.swarm.outbox import Outbox
from tdml_p2p.swarm.reexecution import Cell, Execution, Reexecutor, Unavailable, results_of

log = structlog.get_logger(__name__)

_KEPT_EXECUTIONS = 64
_FETCH_SECONDS = 5.0
"""How long a reveal waits for one tensor of the worker: the sketches judge without it."""
_KINDS = ("open", "reveal", "commit")


@dataclass(frozen=True, slots=True)
class Answer:
    """A re-execution and the reveal that its commitment binds."""

    execution: Execution
    cell: Cell
    reveal: Reveal


class Auditor:
    """Answers the duties of one account; `describe` turns an audit into the cell to re-execute."""

    def __init__(
        self,
        account: bytes,
        outbox: Outbox,
        reexecutor: Reexecutor,
        describe: Callable[[Audit], "Cell | None"],
        open_cell: Callable[[Audit], "Opening | None"],
    ) -> None:
        self._account = account
        self._outbox = outbox
        self._reexecutor = reexecutor
        self._describe = describe
        self._open_cell = open_cell
        self._answers: dict[tuple[bytes, int], Answer] = {}
        self._busy: set[tuple[str, bytes, int]] = set()
        self._due: set[tuple[str, bytes, int]] = set()
        self._lanes = {kind: trio.open_memory_channel[tuple[Duty, Audit]](math.inf) for kind in _KINDS}

    def on_state(self, state: State) -> None:
        """Take up the duties of a new final state; those that are over are forgotten."""
        duties = state.duties(self._account)
        self._due = {(duty.kind, duty.audit, duty.round) for duty in duties}
        self._busy &= self._due
        for duty in duties:
            name = (duty.kind, duty.audit, duty.round)
            audit = state.audit(duty.audit)
            if name in self._busy or audit is None:
                continue
            self._busy.add(name)
            self._lanes[duty.kind][0].send_nowait((duty, audit))

    async def run(self) -> None:
        """Answer duties until cancelled; openings wait for nothing, and reveals not for re-executions."""
        async with trio.open_nursery() as nursery:
            for _, duties in self._lanes.values():
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
                opening = await trio.to_thread.run_sync(self._open_cell, audit)
                if opening is not None:
                    self._outbox.put(opening)
            case other:
                raise AssertionError(f"unknown duty {other}")

    async def _commit(self, duty: Duty, audit: Audit) -> None:
        cell = self._describe(audit)
        if cell is None:
            raise Unavailable("the task's manifest is not here yet")
        execution = await self._reexecutor.run(cell)
        shared = await trio.to_thread.run_sync(execution.sketch, audit.key)
        own = shared if duty.round == 0 else await trio.to_thread.run_sync(execution.sketch, duty.key)
        reveal = Reveal(duty.audit, duty.round, secrets.token_bytes(32), shared, own, False)
        self._answers[duty.audit, duty.round] = Answer(execution, cell, reveal)
        while len(self._answers) > _KEPT_EXECUTIONS:
            del self._answers[next(iter(self._answers))]
        self._outbox.put(Commitment(duty.audit, duty.round, reveal_commitment(self._account, reveal)))

    async def _reveal(self, duty: Duty, audit: Audit) -> None:
        answer = self._answers.get((duty.audit, duty.round))
        if answer is None or audit.opening is None:
            return
        contradicts = await self._contradicts(answer, audit.opening.trace)
        reveal = answer.reveal
        self._outbox.put(Reveal(reveal.audit, reveal.round, reveal.salt, reveal.shared, reveal.own, contradicts))

    async def _contradicts(self, answer: Answer, opened: Trace) -> bool:
        """Whether the opened trace names other inputs than were signed for, or other results than ours."""
        from trainer.compare import compare
        from trainer.stage import CellResult
        from trainer.tensors import vector_of

        inputs, result = answer.execution.inputs, answer.execution.result
        if (opened.x, opened.gy) != (inputs.x.address, inputs.gy.address):
            return True
        mine = await trio.to_thread.run_sync(results_of, answer.execution)
        theirs = {"y": result.y, "gx": result.gx, "gw": result.gw}
        for name, own, claimed in zip(theirs, mine, (opened.y, opened.gx, opened.gw), strict=True):
            if own == claimed:
                continue
            try:
                with trio.fail_after(_FETCH_SECONDS):
                    data = await self._reexecutor.fetch(claimed, answer.cell.holders)
                theirs[name] = vector_of(data, theirs[name].numel()).reshape(theirs[name].shape)
            except (Unavailable, trio.TooSlowError):
                continue
            except ValueError:
                return True
        found = await trio.to_thread.run_sync(compare, CellResult(**theirs, boundaries=()), result)
        return found.is_fraud
