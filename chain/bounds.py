"""Bounds of a network's parameters that no genesis and no vote can break.

Types bound each number alone; here is what they must not be together, and how far a vote may go: whoever
trusts a header counts on the time that stake stays bound, and whoever works on how results are judged.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from msgspec import ValidationError
from msgspec.structs import asdict

from chain.codec import DecodeError, decode, encode
from chain.params import Params

BASIS = 10_000
LEAST_BLOCK_BYTES = 64 * 1024
"""One transaction of the largest size fits."""
_WINDOW = 1_000_000
MOST = {
    "block_interval_ms": 60_000,
    "heartbeat_ms": 600_000,
    "epoch_blocks": 100_000,
    "min_fee_per_byte": 1_000_000,
    "jail_missed": 1000,  # so many heights are remembered of every validator
    "newcomer_rate": BASIS,
    "floor_rate": BASIS,
    "reaudit_rate": BASIS,
    "redraws": 100,
    "max_block_transactions": 8192,
    "max_block_bytes": 1_000_000,  # leaves room for a header and the certificate of the largest set
    "jail_window": _WINDOW,
    "jail_blocks": _WINDOW,
    "formation_blocks": _WINDOW,
    "claim_window": _WINDOW,
    "commit_window": _WINDOW,
    "open_window": _WINDOW,
    "reveal_window": _WINDOW,
    "vote_window": _WINDOW,
    "lease_blocks": _WINDOW,
    "absence_blocks": _WINDOW,
    "history_blocks": _WINDOW,
}
"""The largest values beyond what the types allow."""
MOST_TAU = 10**9


def params_of(document: Mapping[str, Any]) -> Params:
    """Return the parameters in a JSON object, the defaults where it names none; raise `ValueError`."""
    try:
        tau = {"tau": tuple(document["tau"])} if "tau" in document else {}
        # a Struct's constructor checks nothing: bounds are checked by reading the encoding back
        return decode(Params, encode(Params(**{**document, **tau})))
    except (TypeError, OverflowError, ValidationError, DecodeError) as error:
        raise ValueError(f"a parameter is wrong: {error}") from None


def problem(params: Params) -> str | None:
    """Return why no network can run on these parameters, in a phrase; None if one can."""
    return next(_problems(params), None)


def _problems(params: Params) -> Iterator[str]:
    for name, most in MOST.items():
        if getattr(params, name) > most:
            yield f"{name} is more than {most}"
    if params.jail_missed > params.jail_window:
        yield "jail_missed is more than jail_window"
    if params.heartbeat_ms < params.block_interval_ms:
        yield "heartbeat_ms is less than block_interval_ms"
    if params.max_block_bytes < LEAST_BLOCK_BYTES:
        yield f"max_block_bytes is less than {LEAST_BLOCK_BYTES}"
    for name, factor in (("tau", "fraud_factor"), ("wide_tau", "wide_factor")):
        limits, multiple = getattr(params, name), getattr(params, factor)
        if not all(1 <= tau <= MOST_TAU for tau in limits):
            yield f"{name} is not from 1 to {MOST_TAU}"
        if any(multiple * tau > MOST_TAU for tau in limits):
            yield f"a result of nothing but zeros would be no fraud ({name}, {factor})"


def vote_problem(now: Params, wanted: Params) -> str | None:
    """Return why no vote can lead from `now` to `wanted`, in a phrase; None if one can.

    Light clients rest on the time that leaving stake can be slashed: it never gets shorter. What was an
    honest result under the old thresholds is no fraud under the new ones.
    """
    if (found := problem(wanted)) is not None:
        return found
    seconds = wanted.unbonding_blocks * wanted.block_interval_ms >= now.unbonding_blocks * now.block_interval_ms
    if wanted.unbonding_blocks < now.unbonding_blocks or not seconds:
        return "leaving stake would be bound for less time (unbonding_blocks, block_interval_ms)"
    narrow, wide = zip(wanted.tau, now.tau, strict=True), zip(wanted.wide_tau, now.wide_tau, strict=True)
    if any(wanted.fraud_factor * new < old for new, old in narrow):
        return "results that are honest now would be frauds (tau, fraud_factor)"
    if any(wanted.wide_factor * new < old for new, old in wide):
        return "results that are honest now would be frauds (wide_tau, wide_factor)"
    return None


def changes(before: Params, after: Params) -> dict[str, Any]:
    """Return the parameters that differ, by name, with their new values."""
    old, new = asdict(before), asdict(after)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in new.items() if value != old[key]}
