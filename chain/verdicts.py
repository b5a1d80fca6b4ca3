"""Pure rules of audits: how far two sketches are apart, what a ballot says, when stake decides.

A sketch is 32 random-sign projections of each of y, gx and gw; the norm of a difference of sketches
estimates the norm of the difference of the tensors (Achlioptas 2003), here within a factor of two.
"""

import math
import struct
from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import NamedTuple

from msgspec import structs

from chain.params import Params
from chain.records import Voter
from chain.transactions import EXACT, SKETCH_BYTES, Reveal, Sketch, Tolerance

TENSORS = ("y", "gx", "gw")
PROJECTIONS = 32
BLANK = bytes(SKETCH_BYTES)
"""The sketch of who was given nothing to execute."""
_TINY = 1e-30

Deviations = tuple[float, float, float]


class Limits(NamedTuple):
    """Thresholds τ of y, gx and gw, the multiple that is fraud above it, and those that match all the same."""

    tau: Deviations
    fraud_factor: int
    tolerance: Tolerance = EXACT

    @property
    def allowed(self) -> Deviations:
        """The largest deviations that match."""
        y, gx, gw = (max(1, times) * tau for times, tau in zip(self.tolerance, self.tau, strict=True))
        return y, gx, gw

    @property
    def gross(self) -> Deviations:
        """The largest deviations that are no fraud."""
        y, gx, gw = (max(self.fraud_factor, times) * tau for times, tau in zip(self.tolerance, self.tau, strict=True))
        return y, gx, gw


class Ballot(StrEnum):
    """What one re-execution says of accused and accuser."""

    AGAINST_WORKER = "against-worker"
    AGAINST_AUDITOR = "against-auditor"
    AGAINST_BOTH = "against-both"
    AGAINST_NEITHER = "against-neither"
    DATA_MISSING = "data-missing"
    SMALL_DEVIATION = "small-deviation"
    AUDITOR_MISLED = "auditor-misled"


_BALLOTS = tuple(Ballot)
_OF_THE_WORKER = (Ballot.AGAINST_WORKER, Ballot.DATA_MISSING, Ballot.SMALL_DEVIATION)


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


def is_match(found: Deviations, limits: Limits) -> bool:
    """Whether every tensor is within its threshold τ, or as many of them as are tolerated."""
    return all(value <= limit for value, limit in zip(found, limits.allowed, strict=True))


def is_fraud(found: Deviations, limits: Limits) -> bool:
    """Whether some tensor deviates by more than the fraud factor times τ, and more than is tolerated."""
    return any(value > limit for value, limit in zip(found, limits.gross, strict=True))


def finding(found: Deviations, limits: Limits) -> str:
    """Return what deviations mean: match, fault or fraud."""
    if is_match(found, limits):
        return "match"
    return "fraud" if is_fraud(found, limits) else "fault"


def limits_for(params: Params, *reveals: Reveal | None) -> Limits:
    """Return the limits for comparing these re-executions: wide if one is of another kernel class than the task.

    Who compares is the first of them: its tolerance counts, and nobody's else.
    """
    is_wide = any(entry is not None and entry.other_kernel for entry in reveals)
    limits = wide_limits(params) if is_wide else _limits(params.tau, params.fraud_factor)
    return limits if not reveals or reveals[0] is None else limits._replace(tolerance=reveals[0].tolerance)


def wide_limits(params: Params) -> Limits:
    """Return the limits between machines of different kernel classes, for tasks that are exact inside one only."""
    return _limits(params.wide_tau, params.wide_factor)


def _limits(tau: tuple[int, int, int], factor: int) -> Limits:
    y, gx, gw = (each / 1e9 for each in tau)
    return Limits((y, gx, gw), factor)


def is_blank(reveal: Reveal) -> bool:
    """Whether a reveal says that there was nothing to execute: it is no opinion of anybody's result."""
    return reveal.missing and not reveal.contradiction and reveal.shared == BLANK


def rests_on_tolerance(reveal: Reveal, opened: Sketch, params: Params) -> bool:
    """Whether an opened result matches a re-execution only by what its reveal tolerates."""
    return reveal.tolerance != EXACT and not is_match(
        deviations(opened, reveal.shared), limits_for(params, structs.replace(reveal, tolerance=EXACT))
    )


def ballot(reveal: Reveal, opened: Sketch, audited: Reveal, params: Params, *, is_passed: bool = False) -> Ballot:
    """Return what a voter's re-execution says of the opened result of a cell and of the auditor's.

    An auditor that was given other inputs than were opened, signed by who may send them, is not judged. Where its audit
    has passed, it answers for a tolerance without which it would not have: the voter must find the same.
    """
    if is_blank(reveal):
        return Ballot.DATA_MISSING
    if reveal.contradiction and reveal.shared == BLANK:
        return Ballot.AGAINST_WORKER  # what was opened has other inputs than this voter was given: it compares nothing
    found, limits = deviations(opened, reveal.shared), limits_for(params, reveal)
    worker = reveal.contradiction or is_fraud(found, limits)
    between = deviations(audited.shared, reveal.shared)
    is_judged = not is_blank(audited) and not reveal.misled
    auditor = is_judged and is_fraud(between, limits_for(params, reveal, audited))
    if is_passed and rests_on_tolerance(audited, opened, params):
        auditor = auditor or not is_match(found, limits)
    if worker:
        return Ballot.AGAINST_BOTH if auditor else Ballot.AGAINST_WORKER
    if auditor:
        return Ballot.AGAINST_AUDITOR
    if reveal.missing:
        return Ballot.DATA_MISSING
    if not is_match(found, limits):
        return Ballot.SMALL_DEVIATION
    return Ballot.AUDITOR_MISLED if reveal.misled else Ballot.AGAINST_NEITHER


def step_ballot(reveal: Reveal, opened: Sketch, audited: Reveal, params: Params) -> Ballot:
    """Return what a voter's re-execution says of an optimiser's step, whose material only its worker may hold.

    Whoever could not have it has no sketch to be judged by, and its arithmetic is exact: there is no small deviation.
    """
    if reveal.missing and not reveal.contradiction:
        return Ballot.DATA_MISSING
    limits = limits_for(params)
    worker = reveal.contradiction or not is_match(deviations(opened, reveal.shared), limits)
    auditor = not audited.missing and is_fraud(deviations(audited.shared, reveal.shared), limits)
    if worker:
        return Ballot.AGAINST_BOTH if auditor else Ballot.AGAINST_WORKER
    return Ballot.AGAINST_AUDITOR if auditor else Ballot.AGAINST_NEITHER


def tally(voters: Iterable[Voter]) -> dict[Ballot, int]:
    """Return the stake behind each finding: who finds the worse of the worker backs the milder ones as well.

    Worse to milder: against the worker, data missing, a small deviation; beside them against the auditor; and that the
    auditor was misled, against neither.
    """
    powers = dict.fromkeys(Ballot, 0)
    for voter in voters:
        if voter.said is not None:
            powers[_BALLOTS[voter.said]] += voter.power
    worker = powers[Ballot.AGAINST_WORKER] + powers[Ballot.AGAINST_BOTH]
    missing = worker + powers[Ballot.DATA_MISSING]
    return {
        Ballot.AGAINST_WORKER: worker,
        Ballot.AGAINST_AUDITOR: powers[Ballot.AGAINST_AUDITOR] + powers[Ballot.AGAINST_BOTH],
        Ballot.DATA_MISSING: missing,
        Ballot.SMALL_DEVIATION: missing + powers[Ballot.SMALL_DEVIATION],
        Ballot.AUDITOR_MISLED: powers[Ballot.AUDITOR_MISLED],
        Ballot.AGAINST_NEITHER: powers[Ballot.AGAINST_NEITHER] + powers[Ballot.AUDITOR_MISLED],
    }


def decided(voters: Sequence[Voter], accuser: Voter) -> Ballot | None:
    """Return the finding that more than two thirds of the stake back; None if there is none.

    An accuser has bound itself before it saw anything of the worker's. Where most of the voters find the same its
    stake counts with theirs: else a third of the voters, who are less of the whole set, could keep every verdict from
    them. It never counts in the accuser's own favour, nor where its own result is found false.
    """
    behind, total = tally(voters), sum(voter.power for voter in voters)
    joined, all_power = tally((*voters, accuser)), total + accuser.power
    is_heard = behind[Ballot.AGAINST_AUDITOR] < quorum(total)
    for side, stake in behind.items():
        is_joined = is_heard and 2 * stake > total and joined[side] >= quorum(all_power)
        if stake >= quorum(total) or (is_joined and side in _OF_THE_WORKER):
            return side
    return None


def quorum(total: int) -> int:
    """Return the least stake that decides: floor(2W/3) + 1."""
    return 2 * total // 3 + 1
