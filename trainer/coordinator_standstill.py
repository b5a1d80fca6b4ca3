"""Which stages stand still: whoever holds them is connected, and none of them gets on with its cells."""

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field
from math import inf
from typing import Generic, TypeVar

Key = TypeVar("Key")


@dataclass
class _Standstill:
    """Which replicas of a stage stalled, since when all of them do, and how long another try may take."""

    limit: float
    stalled: set[str] = field(default_factory=set)
    since: float | None = None


class Standstills:
    """The stages that make no progress; the deadlines are those of the stages' own measured speed."""

    def __init__(self) -> None:
        self._found: dict[int, _Standstill] = {}
        self._full: defaultdict[int, dict[str, float]] = defaultdict(dict)

    def clear(self) -> None:
        """Begin a step."""
        self._found.clear()
        self._full.clear()

    def note(self, stage: int, peers: Collection[str], replicas: Collection[str], limit: float, now: float) -> None:
        """Note that `peers`, of the stage's `replicas`, let the step wait beyond a deadline of `limit` seconds."""
        found = self._found.setdefault(stage, _Standstill(limit))
        found.stalled.update(peers)
        if found.since is None and found.stalled.issuperset(replicas):
            found.since = now

    def progress(self, stage: int) -> None:
        """Note that somebody of a stage does get on."""
        self._found.pop(stage, None)

    def finished(self, stage: int) -> None:
        """Note that somebody of a stage had the memory for a cell."""
        self._full.pop(stage, None)

    def note_full(self, stage: int, peer: str, until: float) -> None:
        """Note that `peer` lacks memory for a cell, and until when that may pass."""
        self._full[stage].setdefault(peer, until)

    def full(self, stage: int) -> frozenset[str]:
        """Return who of a stage has lacked memory since somebody of it last finished a cell."""
        return frozenset(self._full.get(stage, ()))

    def is_full(self, stage: int, replicas: Collection[str], now: float) -> bool:
        """Whether all of the stage's `replicas` have lacked memory for as long as that may take to pass."""
        told = self._full.get(stage, {})
        return bool(replicas) and all(now > told.get(peer, inf) for peer in replicas)

    def lost(self, now: float) -> dict[int, float]:
        """Return the stages none of whose replicas did anything with a second deadline, and since when."""
        return {
            stage: found.since
            for stage, found in self._found.items()
            if found.since is not None and now - found.since > found.limit
        }

    def older_than(self, seconds: float, now: float) -> tuple[int, ...]:
        """Return the stages all of whose replicas have stalled for so long."""
        return tuple(
            stage for stage, found in self._found.items() if found.since is not None and now - found.since > seconds
        )


class Pauses(Generic[Key]):
    """When, and why, who or what a key names is tried again: after pauses from `shortest` to `longest` seconds.

    Each pause is twice as long as the one before.
    """

    def __init__(self, shortest: float, longest: float) -> None:
        self._shortest = shortest
        self._longest = longest
        self._due: dict[Key, tuple[float, str]] = {}
        self._next: dict[Key, float] = {}

    def clear(self) -> None:
        """Begin a step."""
        self._due.clear()
        self._next.clear()

    def begin(self, key: Key, why: str, now: float) -> None:
        """Have `key` asked again after a pause, unless it is in one."""
        if key not in self._due:
            pause = self._next.get(key, self._shortest)
            self._due[key], self._next[key] = (now + pause, why), min(2 * pause, self._longest)

    def over(self, now: float) -> dict[Key, str]:
        """Return, once, whose pause is over, and why they had it."""
        found = {key: why for key, (due, why) in self._due.items() if now >= due}
        for key in found:
            del self._due[key]
        return found
