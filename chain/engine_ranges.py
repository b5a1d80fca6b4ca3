"""Which heights to ask of whom while catching up, and what has arrived. Pure bookkeeping, bounded in bytes."""

from dataclasses import dataclass, field

from chain.sync import FinalBlock

SYNC_RANGE = 128
"""Heights asked for at once."""
MAX_OPEN = 8
"""Ranges asked for or waiting for their turn."""
MAX_BUFFERED_BYTES = 16 * 1024 * 1024
"""Encoded blocks waiting for their turn beyond which only the next one is asked for."""
HEDGE_SECONDS = 2.0
"""How long the next range may be on its way before another peer is asked for it as well."""


@dataclass(frozen=True)
class Lease:
    """Heights `first` to `last` that a peer is asked for."""

    first: int
    last: int

    @property
    def count(self) -> int:
        """How many heights."""
        return self.last - self.first + 1


@dataclass(frozen=True)
class Batch:
    """Consecutive final blocks and the peer that served them."""

    peer: str
    finals: tuple[FinalBlock, ...]
    size: int


@dataclass
class Ranges:
    """Heights from `next` on, in pieces: wanted, on their way, or arrived."""

    next: int
    """The height that is committed next."""
    _frontier: int = 0
    _holes: list[Lease] = field(default_factory=list)
    _leased: dict[Lease, float] = field(default_factory=dict)
    _arrived: dict[int, Batch] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._frontier = self.next

    @property
    def buffered(self) -> int:
        """Encoded bytes that wait for their turn."""
        return sum(batch.size for batch in self._arrived.values())

    def lease(self, base: int, height: int, now: float) -> Lease | None:
        """Return what to ask of a peer that has the blocks `base` to `height`; None for nothing now."""
        lease = self._find(base, height, now)
        if lease is not None:
            self._leased[lease] = now
        return lease

    def _find(self, base: int, height: int, now: float) -> Lease | None:
        is_full = self.buffered >= MAX_BUFFERED_BYTES
        for hole in sorted(self._holes, key=lambda hole: hole.first):
            if base <= hole.first <= height and (hole.first == self.next or not is_full):
                self._holes.remove(hole)
                if hole.last > height:
                    self._holes.append(Lease(height + 1, hole.last))
                return Lease(hole.first, min(hole.last, height))
        is_open = len(self._leased) + len(self._arrived) < MAX_OPEN and not is_full
        if base <= self._frontier <= height and (is_open or self._frontier == self.next):
            first, self._frontier = self._frontier, min(self._frontier + SYNC_RANGE, height + 1)
            return Lease(first, self._frontier - 1)
        slow = [lease for lease, since in self._leased.items() if now - since >= HEDGE_SECONDS]
        return next((s for s in slow if base <= s.first == self.next and s.last <= height), None)

    def give_back(self, lease: Lease) -> None:
        """Note that nothing came of a lease."""
        if self._leased.pop(lease, None) is not None:
            self._want(lease)

    def put(self, lease: Lease, batch: Batch) -> None:
        """Take the leading blocks of a leased range; what was not served is wanted again."""
        if self._leased.pop(lease, None) is None:
            return
        self._place(lease.first, batch)
        self._want(Lease(lease.first + len(batch.finals), lease.last))

    def take(self) -> Batch | None:
        """Return the batch that starts at `next`, if it is here."""
        return self._arrived.get(self.next)

    def advance(self, height: int) -> None:
        """Note that everything up to `height` is committed."""
        self.next = max(self.next, height + 1)
        self._frontier = max(self._frontier, self.next)
        arrived, self._arrived = self._arrived, {}
        for first, batch in arrived.items():
            self._place(first, batch)
        holes, self._holes = self._holes, []
        for hole in holes:
            self._want(hole)

    def drop(self, peer: str) -> None:
        """Forget what a peer served; it is wanted again of others."""
        for first, batch in list(self._arrived.items()):
            if batch.peer == peer:
                del self._arrived[first]
                self._want(Lease(first, first + len(batch.finals) - 1))

    def _place(self, first: int, batch: Batch) -> None:
        done = max(0, self.next - first)
        if done < len(batch.finals):
            self._arrived[first + done] = Batch(batch.peer, batch.finals[done:], batch.size)

    def _want(self, lease: Lease) -> None:
        first = max(lease.first, self.next)
        if first <= lease.last:
            self._holes.append(Lease(first, lease.last))
