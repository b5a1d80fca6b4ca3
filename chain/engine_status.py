"""What the engine says about itself, ready for JSON."""

from typing import Any

from chain.engine_core import Core
from chain.engine_gate import halted_reason
from chain.engine_sync import CatchUp
from chain.keys import peer_id
from chain.light import trusting_ms
from chain.query_votes import Deciding
from chain.trusted_path import TrustedPath

STALLED_SECONDS = 15.0
"""How long a due block may fail to appear before the status says why."""


def warning(core: Core, path: TrustedPath | None, now_ms: int) -> str | None:
    """Return in a sentence why nothing known here tells a true chain from a false one.

    `path` leads to a block that the owner trusts, unless that lies below what is kept here.
    """
    tip, validators = core.tip, core.validators
    period, age = trusting_ms(tip.state.params), now_ms - tip.timestamp
    decides_alone = core.account is not None and validators.power(core.account) >= validators.quorum
    if path is not None and tip.height < path.lowest:
        return (
            f"The trusted block {path.trust} is not here, and no peer has shown yet what leads to it: "
            f"until one does, nothing beyond block {tip.height} is taken."
        )
    if path is not None or age <= period or decides_alone:
        return None
    return (
        f"The newest block here is {_duration(age)} old, more than the trusting period of {_duration(period)}: "
        "validators that have left since could show a false chain unpunished. "
        "To be sure, start with --trust HEIGHT:HASH of a newer block."
    )


def _duration(milliseconds: int) -> str:
    seconds = milliseconds // 1000
    for size, unit in ((86_400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit}"
    return f"{seconds} seconds"


def deciding(core: Core) -> Deciding:
    """Return what is known of the height under decision; any thread may ask."""
    machine = core.machine
    view, config = max(machine.view, 1), machine.config
    return Deciding(config.height, view, machine.leader(view), config.validators, machine.tally.votes(view))


def describe(core: Core, catch_up: CatchUp, follows_because: str | None, now: float) -> dict[str, Any]:
    """Return height, view, validators, sync and, when the chain waits for absent validators, why."""
    tip, machine = core.tip, core.machine
    validators = core.validators
    stalled = now - max(core.pace.due, core.began)
    own = core.account
    return {
        "chain_id": tip.chain_id.hex(),
        "height": tip.height,
        "block_hash": tip.hash.hex(),
        "timestamp": tip.timestamp,
        "view": machine.view,
        "leader": peer_id(machine.leader(max(machine.view, 1))) if len(validators) else None,
        "syncing": catch_up.is_behind,
        "target_height": max(catch_up.target, tip.height),
        "validators": len(validators),
        "total_power": str(validators.total),
        "own_power": str(validators.power(own)) if own else "0",
        "is_validator": machine.is_voter,
        "follows_because": follows_because,
        "halted": halted_reason(core.gate, validators, own, now, stalled) if stalled > STALLED_SECONDS else None,
        "messages": dict(sorted(core.gate.counts.items())),
    }
