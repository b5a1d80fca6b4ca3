"""What is said again when nothing moves: little enough for all to say at once, all of it after some rounds.

The newest certificates and the own votes that still count go first: they bring a late peer to the current
view at once. A proposal refers to the certificates below it by their views, so whoever was away lacks those
too: they follow in turns, from a place that differs for each validator, so that one standstill of all
repeats every one of them although each sends only a few.
"""

from collections.abc import Iterable, Sequence
from typing import Final, TypeVar

from chain.blocks import Certificate, Proposal, Vote, VoteKind
from chain.codec import encode

STANDSTILL_BYTES: Final = 128 * 1024
"""Votes and certificates resent at one standstill by one of few validators."""
CROWD_BYTES: Final = 4 * 1024 * 1024
"""What all validators together resend; each may use an equal share, but always `LEAST_BYTES`."""
LEAST_BYTES: Final = 48 * 1024
PROPOSAL_BYTES: Final = 256 * 1024
"""Proposals resent at one standstill; one is sent whatever its size."""

_GOLDEN: Final = 2_654_435_769
"""2^32 divided by the golden ratio: its multiples lie evenly on the circle of 2^32, whichever are missing."""
_Key = tuple[int, VoteKind]
_Item = TypeVar("_Item")


class Standstill:
    """One validator's turns: its `place` among `count`, and how far it has come."""

    def __init__(self, place: int, count: int) -> None:
        self._place = place
        self._sent = 0
        self._rounds = 0
        self._budget = min(STANDSTILL_BYTES, max(LEAST_BYTES, CROWD_BYTES // max(count, 1)))

    def messages(
        self, certificates: dict[_Key, Certificate], votes: dict[_Key, Vote], proposals: Sequence[Proposal]
    ) -> list[Proposal | Vote | Certificate]:
        """Return what to send now of the held certificates, the own votes and the proposals that matter."""
        start = self._rounds % len(proposals) if proposals else 0
        self._rounds += 1
        said = _within(PROPOSAL_BYTES, [*proposals[start:], *proposals[:start]], least=1)
        newest = [max(keys) for kind in VoteKind if (keys := [key for key in certificates if key[1] == kind])]
        pending = (key for key in sorted(votes, reverse=True) if _counts(key, certificates))
        head: list[Vote | Certificate] = [certificates[key] for key in newest]
        head += [votes[key] for key in pending]
        head = _within(self._budget, head)
        rest = [certificates[key] for key in sorted(certificates.keys() - set(newest))]
        left = self._budget - sum(len(encode(item)) for item in head)
        return [*said, *head, *self._turn(rest, left)]

    def _turn(self, items: list[Certificate], budget: int) -> list[Certificate]:
        if not items:
            return []
        start = ((self._place * _GOLDEN % 2**32) * len(items) // 2**32 + self._sent) % len(items)
        turn = _within(budget, [*items[start:], *items[:start]])
        self._sent += len(turn)
        return turn


def _counts(key: _Key, certificates: dict[_Key, Certificate]) -> bool:
    """Whether an own vote can still bring about a certificate that somebody needs."""
    view, kind = key
    if kind == VoteKind.FINALIZE:
        return key not in certificates
    passed = (view, VoteKind.NOTARIZE) in certificates or (view, VoteKind.NULLIFY) in certificates
    return kind != VoteKind.PROPOSE and not passed


def _within(budget: int, items: Iterable[_Item], least: int = 0) -> list[_Item]:
    """Return the first items that fit into the budget together, and at least so many."""
    chosen: list[_Item] = []
    for item in items:
        budget -= len(encode(item))
        if budget < 0 and len(chosen) >= least:
            break
        chosen.append(item)
    return chosen
