"""Known-answer cells: who applies for a seat first computes cells whose results others have verified.

The answers are on chain: an audit that has passed holds the sketch of a cell's results, under a key drawn for it, and
names its inputs and its state, which the stage's workers serve until the step has settled. A machine whose arithmetic
is broken finds out before it has a seat, and a joining peer keeps nobody waiting. Where nothing has been audited yet
there is no answer to know: the first cells of a newcomer are audited at the newcomers' rate all the same.
"""

from collections.abc import AsyncIterator, Callable, Sequence

import structlog
import trio

from chain.params import Params
from chain.records import Audit, AuditStatus
from chain.verdicts import TENSORS, deviations, is_match, limits_for
from tdml_p2p.swarm.doubts import Doubt
from tdml_p2p.swarm.material import Unavailable
from tdml_p2p.swarm.reexecution import Cell, Reexecutor

log = structlog.get_logger(__name__)

CELLS = 2
"""Known answers that are asked for."""
_TRIES = 6
_SECONDS = 30.0


class WrongAnswer(Exception):
    """What this machine computes is not what others have computed and verified."""


async def known_answers(
    newest: Callable[[], Sequence[Audit]],
    blocks: AsyncIterator[object],
    describe: Callable[[Audit], Cell | None],
    reexecutor: Reexecutor,
    params: Params,
) -> int:
    """Return how many verified cells of a task this machine computes alike; raise `WrongAnswer`.

    Cells whose material nobody has any more are passed over. Where audits have passed or are under way the next one
    will give an answer, also if all of them happen to have ended: with every block it is looked for again, for half a
    minute of waiting at most.
    """
    right, tried = 0, set[bytes]()
    until = trio.current_time() + _SECONDS
    while True:
        audits = newest()
        passed = [audit for audit in audits if audit.state is AuditStatus.PASSED and audit.id not in tried]
        for audit in sorted(passed, key=lambda audit: (-audit.step, audit.id))[:_TRIES]:
            tried.add(audit.id)
            if right < CELLS and (cell := describe(audit)) is not None:
                right += await _is_right(audit, cell, reexecutor, params)
        is_audited = bool(tried) or any(audit.is_active for audit in audits)
        if right or not is_audited:
            return right
        block = None
        with trio.move_on_at(until):
            block = await anext(blocks, None)
        if block is None:
            return right


async def _is_right(audit: Audit, cell: Cell, reexecutor: Reexecutor, params: Params) -> bool:
    """Whether a verified cell was computed alike, not merely out of reach; raise `WrongAnswer`."""
    try:
        await _check(audit, cell, reexecutor, params)
    except Unavailable as error:
        log.info("a known answer is not to be had", audit=audit.id.hex(), reason=str(error))
        return False
    return True


async def _check(audit: Audit, cell: Cell, reexecutor: Reexecutor, params: Params) -> None:
    assert audit.opening is not None
    trace = audit.opening.trace
    execution = await reexecutor.replay(cell, trace.x, trace.gy)
    own = await trio.to_thread.run_sync(execution.sketch, audit.key)
    found = deviations(audit.opening.sketch, own)
    limits = limits_for(params)
    tolerance = await Doubt(reexecutor, cell, execution).tolerance(audit.key, audit.opening.sketch, limits)
    if tolerance is None:
        raise Unavailable("the model is too unsteady to compare results")
    if not is_match(found, limits._replace(tolerance=tolerance)):
        told = ", ".join(f"{name} {value:.1e}" for name, value in zip(TENSORS, found, strict=True))
        raise WrongAnswer(f"cell {audit.cell} of step {audit.step} is off by {told} from what was verified")
