"""Pure rules of audits: how far two sketches are apart, what a ballot says, when stake decides.

A sketch is 32 random-sign projections of each of y, gx and gw; the norm of a difference of sketches
estimates the norm of the difference of the tensors (Achlioptas 2003), here within a factor of two.
"""

import math
import struct
from collections.abc import Iterable
from enum import StrEnum

from chain.params import Params
from chain.records import Voter
from chain.transactions import Reveal, Sketch

TENSORS = ("y", "gx", "gw")
PROJECTIONS = 32
_TINY = 1e-30

Deviations = tuple[float, float, float]


class Ballot(StrEnum):
    """What one re-execution says of accused and accuser."""

    AGAINST_WORKER = "against-worker"
    AGAINST_AUDITOR = "against-auditor"
    AGAINST_BOTH = "against-both"
    AGAINST_NEITHER = "against-neither"


_BALLOTS = tuple(Ballot)


def deviations(claimed: Sketch, own: Sketch) -> Deviations:
    """Return |claimed − own| / |own| per tensor; NaN and infinity deviate infinitely."""
    size = 4 * PROJECTIONS
    parts = (_deviation(claimed[start : start + size], own[start : start + size]) for start in range(0, 3 * size, size))
    y, gx, gw = parts
    return y, gx, gw


def _deviation(claimed: bytes, own: bytes) -> float:
    if claimed == own:
        return 0.0
    a, b = struct.unpack(f"<{PROJECTIONS}f", claimed), struct.unpack(f"<{PROJECTIONS}f", own)
    gap = math.fsum((x - y) ** 2 for x, y in zip(a, b, strict=True)) if all(map(math.isfinite, a + b)) else math.inf
    norm = math.sqrt(math.fsum(y * y for y in b)) if math.isfinite(gap) else 1.0
    return math.sqrt(gap) / max(norm, _TINY) if math.isfinite(gap) else math.inf


def is_match(found: Deviations, params: Params) -> bool:
    """Whether every tensor is within its threshold τ."""
    return all(value <= tau for value, tau in zip(found, thresholds(params), strict=True))


def is_fraud(found: Deviations, params: Params) -> bool:
    """Whether some tensor deviates by more than the fraud factor times τ."""
    limits = thresholds(params)
    return any(value > params.fraud_factor * tau for value, tau in zip(found, limits, strict=True))


def finding(found: Deviations, params: Params) -> str:
    """Return what deviations mean: match, fault or fraud."""
    if is_match(found, params):
        return "match"
    return "fraud" if is_fraud(found, params) else "fault"


def thresholds(params: Params) -> Deviations:
    """Return τ of y, gx and gw."""
    y, gx, gw = (tau / 1e9 for tau in params.tau)
    return y, gx, gw


def ballot(reveal: Reveal, opened: Sketch, audited: Sketch, params: Params) -> Ballot:
    """Return what a voter's re-execution says of the opened result and of the auditor's."""
    worker = reveal.contradiction or is_fraud(deviations(opened, reveal.shared), params)
    auditor = is_fraud(deviations(audited, reveal.shared), params)
    if worker:
        return Ballot.AGAINST_BOTH if auditor else Ballot.AGAINST_WORKER
    return Ballot.AGAINST_AUDITOR if auditor else Ballot.AGAINST_NEITHER


def tally(voters: Iterable[Voter]) -> dict[Ballot, int]:
    """Return the stake whose ballots speak against the worker, and that against the auditor."""
    powers = [0] * len(_BALLOTS)
    for voter in voters:
        if voter.said is not None:
            powers[voter.said] += voter.power
    both = powers[_BALLOTS.index(Ballot.AGAINST_BOTH)]
    sides = (Ballot.AGAINST_WORKER, Ballot.AGAINST_AUDITOR)
    return {side: powers[_BALLOTS.index(side)] + both for side in sides}


def quorum(total: int) -> int:
    """Return the least stake that decides: floor(2W/3) + 1."""
    return 2 * total // 3 + 1
