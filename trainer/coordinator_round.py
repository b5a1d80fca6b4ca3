"""One attempt of one stage to reduce its gradients: who has reported, who keeps the others waiting."""

import struct
from collections import Counter
from math import isfinite

from trainer.messages import Apply, Fault, Reduce, Reduced, Summed
from trainer.payloads import MessageError, Reason


class Round:
    """Answers to one `Reduce`, or to one `Apply` by the `replicas` that have the stage's mean gradient."""

    def __init__(self, request: Reduce | Apply, stage: int, now: float, replicas: tuple[str, ...] = ()) -> None:
        self.request = request
        self.stage = stage
        self.started = self.since = now
        self.is_probed = False
        self.replicas = request.replicas if isinstance(request, Reduce) else replicas
        self.waiting = set(self.replicas)
        self.answers: dict[str, Reduced | Summed] = {}
        self._named: dict[str, tuple[str, ...]] = {}
        self._repeated: set[tuple[str, str]] = set()

    @property
    def is_complete(self) -> bool:
        """Whether every replica that is still awaited has reported."""
        return not self.waiting and bool(self.answers)

    @property
    def roots(self) -> dict[str, bytes]:
        """What each replica reports, as bytes: the root of a state, or the norm and the tied part's digest."""
        return {peer: _value(answer) for peer, answer in self.answers.items()}

    @property
    def root(self) -> bytes:
        """The root that most replicas report; of equally frequent ones the smallest."""
        counts = Counter(self.roots.values())
        return min(counts, key=lambda root: (-counts[root], root))

    @property
    def squares(self) -> float:
        """The squared norm that most replicas report."""
        return next(a.squares for a in self.answers.values() if isinstance(a, Summed) and _value(a) == self.root)

    @property
    def dissenters(self) -> tuple[str, ...]:
        """Replicas that report another root."""
        return tuple(sorted(peer for peer, root in self.roots.items() if root != self.root))

    def note(self, sender: str, message: Reduced | Summed, now: float) -> None:
        """Take an answer; raise `MessageError` for another attempt's or a second one."""
        if message.attempt != self.request.attempt:
            raise MessageError(Reason.STALE_STEP, f"attempt {message.attempt}")
        if sender not in self.waiting:
            raise MessageError(Reason.DUPLICATE)
        self.waiting.discard(sender)
        self.answers[sender] = message
        self.since = now

    def note_missing(self, sender: str, message: Fault) -> tuple[str, ...]:
        """Take a replica's word on whose parts it lacks; return those it names for the first time since the probe."""
        if sender not in self.waiting:
            return ()
        self._named[sender] = message.peers
        asked = (*self.request.replicas, *self.request.ends) if isinstance(self.request, Reduce) else ()
        fresh = {(sender, peer) for peer in set(message.peers).intersection(asked)} - self._repeated
        self._repeated |= fresh
        return tuple(sorted(peer for _, peer in fresh))

    def can_spare(self, peer: str) -> bool:
        """Whether the round goes on without `peer`: it contributes nothing, or all others have what it has."""
        others = (self.waiting | self.answers.keys()) - {peer}
        if not others:
            return False
        if isinstance(self.request, Apply) or peer not in self.request.owners:
            return True
        return not self.waiting - {peer}

    def spare(self, peer: str) -> None:
        """Go on without `peer`."""
        self.waiting.discard(peer)
        self.answers.pop(peer, None)

    def probe(self, now: float) -> tuple[str, ...]:
        """Start the clock again and return whom to ask once more."""
        self.is_probed, self.since = True, now
        self._named.clear()
        self._repeated.clear()
        return tuple(sorted(self.waiting))

    @property
    def silent(self) -> frozenset[str]:
        """Who has not answered, not even that partial sums are missing."""
        return frozenset(self.waiting.difference(self._named))

    def suspects(self) -> tuple[str, ...]:
        """Return who keeps the round waiting, as far as can be told; nobody while all are just computing.

        These are the silent ones. If all answer that partial sums are missing: those who miss them, once
        any replica has the sum, since that is cheapest; else those whose sums the others miss.
        """
        named = {other for peer, others in self._named.items() for other in others if other != peer}
        missed = self.waiting if self.answers else named & self.waiting
        return tuple(sorted(self.silent or missed))


def _value(answer: Reduced | Summed) -> bytes:
    if isinstance(answer, Reduced):
        return answer.root
    # a norm that is not finite sorts last, so that it must be the majority's to count
    return (b"" if isfinite(answer.squares) else b"\xff") + struct.pack(">d", answer.squares) + answer.digest
