"""Full redundancy: every cell is computed by a team of replicas, and what most of them have, bit for bit, goes on.

A team has as many members as the manifest's redundancy r says; r/2 rounded up equal results are a majority, whoever
else is silent or says something else. Nobody's word counts more: each receiver finds the majority by itself.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Generic, TypeVar

from trainer.errors import ManifestError, ManifestReason
from trainer.payloads import MessageError, Reason

if TYPE_CHECKING:
    from trainer.manifest import TaskManifest

T = TypeVar("T")

LARGEST = 7


def check_redundancy(draft: "TaskManifest") -> None:
    """Raise `ManifestError` unless the manifest's redundancy is possible, and with its other settings."""
    wanted = draft.audit.redundancy
    if wanted == 1:
        return
    if not 1 <= wanted <= LARGEST or wanted % 2 == 0:
        raise ManifestError(
            ManifestReason.BAD_REDUNDANCY,
            f"A redundancy of {wanted} has no clear majority.",
            f"Use 1, or an odd number from 3 to {LARGEST}.",
        )
    if wanted > draft.replicas:
        raise ManifestError(
            ManifestReason.BAD_REDUNDANCY,
            f"A redundancy of {wanted} needs as many replicas; there are {draft.replicas}.",
            f"Use --replicas {wanted} or more.",
        )
    apart = {
        "a private run": draft.private,
        "adapters": draft.lora is not None,
        "compression": draft.compression != "none",
        "images": draft.images is not None,
    }
    for name, is_set in apart.items():
        if is_set:
            raise ManifestError(
                ManifestReason.BAD_REDUNDANCY,
                f"Redundancy and {name} cannot be had together.",
                "Leave out --redundancy, or the other one.",
            )


def quorum_of(redundancy: int) -> int:
    """Return how many equal results are a majority of a team."""
    return redundancy // 2 + 1


def teams_of(
    ready: Sequence[str], redundancy: int, rank: Callable[[str], tuple[float, ...]] = lambda _: ()
) -> tuple[tuple[str, ...], ...]:
    """Return disjoint teams of a stage's replicas, the lowest in `rank` first; who is left over has no team.

    Where fewer than a whole team are there, they are one: it may still find a majority.
    """
    order = sorted(ready, key=lambda peer: (rank(peer), peer))
    count = max(1, len(order) // redundancy)
    return tuple(tuple(sorted(order[i * redundancy : (i + 1) * redundancy])) for i in range(count))


class Ballot(Generic[T]):
    """Votes on one thing, until `quorum` of them are the same bytes; `size` counts what waits for that."""

    def __init__(self, quorum: int) -> None:
        self.votes: dict[str, bytes] = {}
        self.decided: bytes | None = None
        self.size = 0
        self._quorum = quorum
        self._first: dict[bytes, T] = {}

    def cast(self, voter: str, value: bytes, item: T, size: int = 0) -> T | None:
        """Take a vote; return what came with the first of the majority's once it is one, and only then.

        Raises `MessageError` for a second vote.
        """
        if voter in self.votes:
            raise MessageError(Reason.DUPLICATE, f"a second vote of {voter}")
        self.votes[voter] = value
        if self.decided is not None:
            return None
        if value not in self._first:
            self._first[value] = item
            self.size += size
        if Counter(self.votes.values())[value] < self._quorum:
            return None
        chosen = self._first[value]
        self.decided, self.size = value, 0
        self._first.clear()
        return chosen

    @property
    def dissenters(self) -> tuple[str, ...]:
        """Who voted for something else than the majority, once there is one."""
        if self.decided is None:
            return ()
        return tuple(sorted(voter for voter, value in self.votes.items() if value != self.decided))
