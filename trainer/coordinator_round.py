"""One attempt of one stage to reduce its gradients: who has reported, who keeps the others waiting."""

from collections import Counter

from trainer.messages import Fault, MessageError, Reason, Reduce, Reduced


class Round:
    """Answers to one `Reduce`."""

    def __init__(self, request: Reduce, stage: int, now: float) -> None:
        self.request = request
        self.stage = stage
        self.started = self.since = now
        self.is_probed = False
        self.waiting = set(request.replicas)
        self.roots: dict[str, bytes] = {}
        self._named: dict[str, tuple[str, ...]] = {}

    @property
    def is_complete(self) -> bool:
        """Whether every replica that is still awaited has reported."""
        return not self.waiting and bool(self.roots)

    @property
    def root(self) -> bytes:
        """The root that most replicas report; of equally frequent ones the smallest."""
        counts = Counter(self.roots.values())
        return min(counts, key=lambda root: (-counts[root], root))

    @property
    def dissenters(self) -> tuple[str, ...]:
        """Replicas that report another root."""
        return tuple(sorted(peer for peer, root in self.roots.items() if root != self.root))

    def note(self, sender: str, message: Reduced, now: float) -> None:
        """Take a root; raise `MessageError` for another attempt's or a second one."""
        if message.attempt != self.request.attempt:
            raise MessageError(Reason.STALE_STEP, f"attempt {message.attempt}")
        if sender not in self.waiting:
            raise MessageError(Reason.DUPLICATE)
        self.waiting.discard(sender)
        self.roots[sender] = message.root
        self.since = now

    def note_missing(self, sender: str, message: Fault) -> None:
        """Take a replica's word on whose partial sums it lacks."""
        if sender in self.waiting:
            self._named[sender] = message.peers

    def can_spare(self, peer: str) -> bool:
        """Whether the round goes on without `peer`: it contributes nothing, or all others have reported."""
        others_are_done = not self.waiting - {peer} and bool(self.roots.keys() - {peer})
        return peer not in self.request.owners or others_are_done

    def spare(self, peer: str) -> None:
        """Go on without `peer`."""
        self.waiting.discard(peer)
        self.roots.pop(peer, None)

    def probe(self, now: float) -> tuple[str, ...]:
        """Start the clock again and return whom to ask once more."""
        self.is_probed, self.since = True, now
        self._named.clear()
        return tuple(sorted(self.waiting))

    def suspects(self) -> tuple[str, ...]:
        """Return who keeps the round waiting, as far as can be told; nobody while all are just computing.

        These are the silent ones. If all answer that partial sums are missing: those who miss them, once
        any replica has the sum, since that is cheapest; else those whose sums the others miss.
        """
        silent = {peer for peer in self.waiting if peer not in self._named}
        named = {other for peer, others in self._named.items() for other in others if other != peer}
        missed = self.waiting if self.roots else named & set(self.request.replicas)
        return tuple(sorted(silent or missed))
