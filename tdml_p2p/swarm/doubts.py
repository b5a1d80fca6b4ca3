"""What a judge allows where others' results differ from its own: as much as ten times its own differ from themselves.

Results are compared with the network's limits first. Only where they are beyond these does the judge execute the cell
again, its last bits shaken (`trainer.spread`). Where results are exact, as those of an optimiser's step or inside a
kernel class, there is nothing to allow. Where its own sketches differ by more than anybody may tolerate, a judge that
would find fraud in less than ten times as much says nothing.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import structlog
import trio

from chain.transactions import EXACT, MAX_TOLERANCE, Sketch, Tolerance
from chain.verdicts import Deviations, Limits, deviations, is_fraud, is_match
from tdml_p2p.swarm.material import Unavailable

if TYPE_CHECKING:
    from tdml_p2p.swarm.reexecution import Cell, Execution, Reexecutor
    from trainer.compare import Spread

log = structlog.get_logger(__name__)

SEEDS = (1, 4, 7)
"""Of the changes of last bits, one for each look: what a cell makes of them differs much from look to look."""
_FAR = 10
"""How many times beyond what a look allows no other look will reach: most cheats cost a judge one."""
_ORDINARY = 0.25
"""Of τ: what sketches of one machine differ by in training that has not gone wild is less."""


class Doubt:
    """A judge's second looks at its own results of a cell, none of them taken twice."""

    def __init__(self, reexecutor: "Reexecutor", cell: "Cell", execution: "Execution") -> None:
        self._reexecutor = reexecutor
        self._cell = cell
        self._execution = execution
        self._looks: list[Execution] = []

    @property
    def _is_exact(self) -> bool:
        return self._cell.is_transition or bool(self._cell.kernel)

    async def stands(self, is_false: "Callable[[Spread], bool]") -> bool:
        """Whether whole tensors are false also by what the own results differ by, in as many looks as it needs."""
        for number in range(1, len(SEEDS) + 1):
            spread = await self.spread(number)
            if spread is None:
                return True
            if not await trio.to_thread.run_sync(is_false, spread):
                return False
            y, gx, gw, has_steady_zeros = spread
            far = spread._replace(y=_FAR * y, gx=_FAR * gx, gw=_FAR * gw)
            if has_steady_zeros and await trio.to_thread.run_sync(is_false, far):
                return True
        return True

    async def spread(self, looks: int = len(SEEDS)) -> "Spread | None":
        """Return what the own results differ by; None where they are exact, or cannot be had a second time."""
        from trainer.spread import spread_of

        if not (executed := await self._again(SEEDS[:looks])):
            return None
        results = [one.result for one in executed]
        return await trio.to_thread.run_sync(spread_of, self._execution.result, results)

    async def tolerance(
        self, key: bytes, opened: Sketch, limits: Limits, audited: Sketch | None = None
    ) -> Tolerance | None:
        """Return the multiples of τ that an opened sketch may be off: more than one only if it is off by more.

        None if it, or the auditor's, is off by so much that it would be fraud, and yet not by more than the own results
        allow: then this machine cannot tell, and should not speak.
        """
        if self._is_exact:
            return EXACT
        own = await trio.to_thread.run_sync(self._execution.sketch, key)
        found = deviations(opened, own)
        between = (0.0, 0.0, 0.0) if audited is None else deviations(audited, own)
        if is_match(found, limits) and not is_fraud(between, limits):
            return EXACT
        times = EXACT
        for number in range(1, len(SEEDS) + 1):
            others = [await trio.to_thread.run_sync(one.sketch, key) for one in await self._again(SEEDS[:number])]
            if not others:
                break
            times = unsteadiness(own, others, limits)
            wider = limits._replace(tolerance=times)
            far = limits._replace(tolerance=(_FAR * times[0], _FAR * times[1], _FAR * times[2]))
            if is_fraud(found, far) or (is_match(found, wider) and not is_fraud(between, wider)):
                break
        return tolerance_of(times, (found, between), limits)

    async def _again(self, seeds: Sequence[int]) -> "Sequence[Execution]":
        """Return the looks with these seeds, as far as they can be had; none where results are exact."""
        try:
            for seed in () if self._is_exact else seeds[len(self._looks) :]:
                self._looks.append(await self._reexecutor.again(self._cell, self._execution, seed))
        except Unavailable as error:
            log.info("a cell cannot be executed a second time", reason=str(error))
        return self._looks[: len(seeds)]


def unsteadiness(own: Sketch, others: Iterable[Sketch], limits: Limits) -> Tolerance:
    """Return the multiples of τ that cover ten times what one's own sketches differ by.

    Up to a quarter of τ they differ in ordinary training as well: that changes nothing.
    """
    from trainer.compare import SPREAD_FACTOR

    spreads = [0.0, 0.0, 0.0]
    for other in others:
        found = deviations(other, own)
        spreads = [max(one, more) if math.isfinite(more) else one for one, more in zip(spreads, found, strict=True)]
    shares = (spread / tau for spread, tau in zip(spreads, limits.tau, strict=True))
    y, gx, gw = (math.ceil(SPREAD_FACTOR * share) if share > _ORDINARY else 1 for share in shares)
    return y, gx, gw


def tolerance_of(times: Tolerance, differences: Iterable[Deviations], limits: Limits) -> Tolerance | None:
    """Return what may be tolerated of this unsteadiness; None if one of these differences cannot be judged with it."""
    y, gx, gw = (min(MAX_TOLERANCE, one) for one in times)
    most, all_of_it = (limits._replace(tolerance=one) for one in ((y, gx, gw), times))
    if any(is_fraud(found, most) and not is_fraud(found, all_of_it) for found in differences):
        return None
    return y, gx, gw
