"""What a peer should warn its owner about: pure rules over what it sees."""

from dataclasses import dataclass, field
from enum import StrEnum

LAG_BLOCKS = 5
"""Heights behind the best peer at which a peer is falling behind."""
STALL_SECONDS = 30.0
"""Seconds without a final block at which a network is stalled; heartbeat blocks come every 5-10 s."""
CLOCK_SECONDS = 5.0
"""Seconds that a clock may be behind the newest block: half of what honest validators put up with."""
MIN_OWNERS = 4
"""Validators below which one fault or one owner decides every verdict."""


class WarningCode(StrEnum):
    """The name of a warning, shared by status, page, metrics and tests."""

    ALONE = "alone"
    STALLED = "stalled"
    HALTED = "halted"
    FALLING_BEHIND = "falling-behind"
    ONE_OWNER = "one-owner"
    JAILED = "jailed"
    OLD_TIP = "old-tip"
    SLOW_CLOCK = "slow-clock"
    UNREACHABLE = "unreachable"


@dataclass(frozen=True)
class Warn:
    """One warning: its code, one plain sentence and what to do about it."""

    code: WarningCode
    message: str
    hint: str


@dataclass(frozen=True)
class Vitals:
    """What the rules look at. Powers are stakes by validator; ages and uptime are seconds."""

    uptime: float
    peers: int
    height: int
    best_height: int
    block_age: float | None
    powers: tuple[int, ...] = ()
    halted: str | None = None
    old_tip: str | None = None
    clock_behind: float = 0.0
    """Seconds by which this machine's clock is behind the newest final block."""
    is_jailed: bool = False
    is_reachable: bool | None = None
    grace: float = field(default=10.0)


def warnings(vitals: Vitals) -> tuple[Warn, ...]:
    """Return the warnings that `vitals` call for, gravest first."""
    found = [
        _halted(vitals),
        _old_tip(vitals),
        _slow_clock(vitals),
        _stalled(vitals),
        _falling_behind(vitals),
        _alone(vitals),
        _jailed(vitals),
        _one_owner(vitals),
        _unreachable(vitals),
    ]
    return tuple(warn for warn in found if warn is not None)


def _halted(vitals: Vitals) -> Warn | None:
    if not vitals.halted:
        return None
    return Warn(
        WarningCode.HALTED,
        vitals.halted,
        "check that the silent validators run and are connected; nothing is lost meanwhile",
    )


def _old_tip(vitals: Vitals) -> Warn | None:
    if not vitals.old_tip:
        return None
    return Warn(
        WarningCode.OLD_TIP,
        vitals.old_tip,
        "start with --trust HEIGHT:HASH of a recent block that somebody vouches for",
    )


def _slow_clock(vitals: Vitals) -> Warn | None:
    if vitals.clock_behind <= CLOCK_SECONDS:
        return None
    return Warn(
        WarningCode.SLOW_CLOCK,
        f"This machine's clock is {vitals.clock_behind:.0f} s behind the chain's time.",
        "set it, best by a time service; from ten seconds on it proposes no blocks and takes others' late",
    )


def _stalled(vitals: Vitals) -> Warn | None:
    if vitals.halted or vitals.block_age is None or vitals.block_age < STALL_SECONDS:
        return None
    return Warn(
        WarningCode.STALLED,
        f"No block has become final for {vitals.block_age:.0f} s.",
        "validators with more than 2/3 of the stake must be online and connected; it resumes by itself",
    )


def _falling_behind(vitals: Vitals) -> Warn | None:
    lag = vitals.best_height - vitals.height
    if lag < LAG_BLOCKS:
        return None
    return Warn(
        WarningCode.FALLING_BEHIND,
        f"This peer is {lag} blocks behind its peers.",
        "it is catching up; if the gap grows, check the load of this machine and its connection",
    )


def _alone(vitals: Vitals) -> Warn | None:
    if vitals.peers or vitals.uptime < vitals.grace:
        return None
    return Warn(
        WarningCode.ALONE,
        "No other peer is connected.",
        "start one elsewhere with `tdml-peer start --join` and the invite line of this peer",
    )


def _jailed(vitals: Vitals) -> Warn | None:
    if not vitals.is_jailed:
        return None
    return Warn(
        WarningCode.JAILED,
        "This validator is jailed because it missed most of the recent blocks.",
        "it returns by an unjail transaction: POST /transactions with the kind unjail",
    )


def _one_owner(vitals: Vitals) -> Warn | None:
    total = sum(vitals.powers)
    if not total:
        return None
    if len(vitals.powers) < MIN_OWNERS:
        said = f"There are only {len(vitals.powers)} validators"
    elif max(vitals.powers) * 3 > total:
        said = f"One validator holds {100 * max(vitals.powers) // total} % of the stake"
    else:
        return None
    return Warn(
        WarningCode.ONE_OWNER,
        f"{said}, so verdicts rest on one owner.",
        "trust verdicts as far as you trust that owner; more bonded validators spread them",
    )


def _unreachable(vitals: Vitals) -> Warn | None:
    if vitals.is_reachable is not False:
        return None
    return Warn(
        WarningCode.UNREACHABLE,
        "Other peers cannot connect to this one.",
        "follow the steps under reachability in `tdml-peer status`",
    )
