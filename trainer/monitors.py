"""Cheap looks at what the client sees of a step anyway: they name workers whose cells are worth auditing.

A monitor's word convicts nobody and changes no result, so it may be wrong; it should be so rarely, because audits
cost. What is usual is learnt from the run itself, from its newest steps, and nothing is odd before.
"""

import math
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from statistics import fmean, median

_FAR = 10.0
"""How many times the usual is odd."""
_LEARNING = 5
"""Steps before anything is odd."""
_RATE = 0.2
_TINY = 1e-30
_HUGE = 1e30
"""Beyond which a loss is as good as none."""
_SAME_LOSS = 0.01
"""Share of the loss by which cells may differ however alike they were before."""
_WINDOW = 8
"""Steps of one worker that are timed together: single cells come in bunches."""
_HISTORY = 256
_FEWEST = 32
_QUIET = 20
"""Steps in which a worker is not named again."""


class Why(StrEnum):
    """What is odd about a worker."""

    GRADIENT = "a gradient of unusual size"
    LOSS = "a loss far from those of the other cells"
    HASTE = "cells done in less time than they take others"
    COPY = "the same results for different cells"
    NOT_FINITE = "a result that is not finite"
    STATISTICS = "running statistics of unusual size"


@dataclass(frozen=True)
class Suspicion:
    """A worker of a stage and what is odd about it."""

    stage: int
    peer: str
    why: Why


@dataclass(frozen=True)
class Seen:
    """A committed step: `owners` of the cells by stage, each cell's loss, each stage's squared norm if it is told."""

    step: int
    owners: Sequence[Sequence[str]]
    losses: Sequence[float]
    squares: Sequence[float] = ()


@dataclass
class _Usual:
    """Moving average of the logarithm of something; a single outlier moves it no further than what is just usual."""

    mean: float = 0.0
    count: int = 0

    def off(self, value: float) -> float:
        """Return by how much the logarithm of `value` is above the average, 0 while that is being learnt."""
        return math.log(max(value, _TINY)) - self.mean if self.count >= _LEARNING else 0.0

    def learn(self, value: float) -> None:
        """Take one more value."""
        self.count += 1
        far, delta = math.log(_FAR), math.log(max(value, _TINY)) - self.mean
        bounded = delta if self.count <= _LEARNING else max(-far, min(far, delta))
        self.mean += max(_RATE, 1.0 / self.count) * bounded


@dataclass
class _Times:
    """Seconds a cell at one stage: those of the newest cells of all, and of each worker's newest steps."""

    all: deque[float] = field(default_factory=lambda: deque(maxlen=_HISTORY))
    of: defaultdict[str, deque[list[float]]] = field(default_factory=lambda: defaultdict(lambda: deque(maxlen=_WINDOW)))

    def hasty(self, fresh: Mapping[str, list[float]]) -> tuple[str, ...]:
        """Take a step's seconds by worker and return those whose cells are implausibly short."""
        for peer, seconds in fresh.items():
            self.of[peer].append(seconds)
            self.all.extend([fmean(seconds)] * len(seconds))
        if len(self.all) < _FEWEST:
            return ()
        usual = median(self.all)
        return tuple(
            peer
            for peer in fresh
            if len(steps := self.of[peer]) == _WINDOW and fmean(s for step in steps for s in step) < usual / _FAR
        )


class Monitors:
    """What is usual at each stage, and who was named lately; pure."""

    def __init__(self) -> None:
        self._norms: defaultdict[int, _Usual] = defaultdict(_Usual)
        self._spread = _Usual()
        self._times: defaultdict[int, _Times] = defaultdict(_Times)
        self._fresh: defaultdict[int, defaultdict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        self._results: deque[dict[tuple[int, str, bytes], tuple[int, int]]] = deque([{}], maxlen=2)
        self._copies: list[Suspicion] = []
        self._named: dict[str, int] = {}

    def note_cell(self, place: tuple[int, int, int], peer: str, seconds: float, digest: bytes) -> None:
        """Take a finished cell of (step, stage, cell) and, where teams compare it, the digest of its results."""
        step, stage, cell = place
        self._fresh[stage][peer].append(seconds)
        if not digest:
            return
        key = (stage, peer, digest)
        if any(known.get(key, (step, cell)) != (step, cell) for known in self._results):
            self._copies.append(Suspicion(stage, peer, Why.COPY))
        self._results[-1][key] = (step, cell)

    def judge(self, seen: Seen) -> tuple[Suspicion, ...]:
        """Take a committed step and return who is to be named because of it."""
        found = [*self._odd_gradients(seen), *self._odd_losses(seen), *self._copies, *self._hasty()]
        self._results.append({})
        self._copies.clear()
        return tuple(each for each in found if self.is_news(each.peer, seen.step))

    def is_news(self, peer: str, step: int) -> bool:
        """Whether a worker is to be named; for a while it is not named again then."""
        if peer in self._named and step - self._named[peer] < _QUIET:
            return False
        self._named[peer] = step
        return True

    def _odd_gradients(self, seen: Seen) -> list[Suspicion]:
        """Look at each stage's norm; what one stage sends down alters the norms of all below it, too.

        So a first stage that is odd, and all in a row above it, may be what the next one up has sent, or the uppermost
        of them; of others each is on its own. A spike of the whole model thus names the last stage only.
        """
        norms = [math.sqrt(square) for square in seen.squares]
        odd = [abs(self._norms[stage].off(norm)) > math.log(_FAR) for stage, norm in enumerate(norms)]
        for stage, norm in enumerate(norms):
            self._norms[stage].learn(norm)
        row = next((stage for stage, is_odd in enumerate(odd) if not is_odd), len(odd))
        suspects = {stage for stage, is_odd in enumerate(odd) if is_odd and stage >= row - 1}
        if row:
            suspects |= {row} & set(range(len(odd)))
        return [
            Suspicion(stage, peer, Why.GRADIENT) for stage in sorted(suspects) for peer in _names(seen.owners[stage])
        ]

    def _odd_losses(self, seen: Seen) -> list[Suspicion]:
        """Look at each cell's loss beside the others of the step; everybody on a cell's route may have made it."""
        finite = [loss for loss in seen.losses if abs(loss) < _HUGE]
        middle = median(finite) if finite else 0.0
        gaps = [abs(loss - middle) if abs(loss) < _HUGE else math.inf for loss in seen.losses]
        usual, least = math.exp(self._spread.mean), _SAME_LOSS * abs(middle)
        is_known = self._spread.count >= _LEARNING
        odd = [c for c, gap in enumerate(gaps) if gap == math.inf or (is_known and gap > _FAR * max(usual, least))]
        if finite:
            self._spread.learn(fmean(gap for gap in gaps if gap < math.inf))
        pairs = {(stage, owners[cell]) for cell in odd for stage, owners in enumerate(seen.owners)}
        return [Suspicion(stage, peer, Why.LOSS) for stage, peer in sorted(pairs)]

    def _hasty(self) -> list[Suspicion]:
        fresh = dict(self._fresh)
        self._fresh.clear()
        return [
            Suspicion(stage, peer, Why.HASTE)
            for stage, seconds in fresh.items()
            for peer in self._times[stage].hasty(seconds)
        ]


def _names(owners: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(owners))
