"""Which stages stand still: whoever holds them is connected, and none of them gets on with its cells."""

from collections import Counter, defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field


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
        self._full: defaultdict[int, Counter[str]] = defaultdict(Counter)

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

    def is_full(self, stage: int, peer: str, replicas: Collection[str], cells: int) -> bool:
        """Note that `peer` lacks memory for one of its `cells`; return whether that leaves the stage nobody to try.

        So it is once all have said so, and one more often than it has cells.
        """
        told = self._full[stage]
        told[peer] += 1
        return told[peer] > max(cells, 1) and all(told[each] for each in replicas)

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
