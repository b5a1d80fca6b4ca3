"""What one peer may cost this one: budgets per second, a score of misbehaviour, and timed bans.

Every budget is a token bucket on an injected clock. Misbehaviour adds penalty points that decay; at the
limit the peer is banned for a time that doubles with every ban.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

Clock = Callable[[], float]

MAX_TRACKED_PEERS = 4096


class Offence(StrEnum):
    """Why a peer was charged."""

    INVALID_MESSAGE = "invalid-message"
    PROTOCOL_VIOLATION = "protocol-violation"
    TOO_MANY_REQUESTS = "too-many-requests"
    TOO_MANY_BYTES = "too-many-bytes"
    TOO_MANY_STREAMS = "too-many-streams"
    FALSE_RECORD = "false-record"
    FALSE_BLOB = "false-blob"
    FALSE_ANSWER = "false-answer"


_POINTS = {
    Offence.INVALID_MESSAGE: 5.0,
    Offence.PROTOCOL_VIOLATION: 10.0,
    Offence.TOO_MANY_REQUESTS: 0.2,
    Offence.TOO_MANY_BYTES: 1.0,
    Offence.TOO_MANY_STREAMS: 1.0,
    Offence.FALSE_RECORD: 5.0,
    Offence.FALSE_BLOB: 10.0,
    Offence.FALSE_ANSWER: 10.0,
}


@dataclass(frozen=True)
class LimitConfig:
    """Budgets of one peer; rates are per second, bursts are what a rested peer may use at once."""

    connections: int = 3
    streams: int = 128
    requests: float = 200.0
    requests_burst: float = 2000.0
    concurrent_requests: int = 32
    penalty_limit: float = 100.0
    penalty_halves_after: float = 60.0
    ban_seconds: float = 60.0
    ban_max_seconds: float = 3600.0


@dataclass
class _Standing:
    tokens: float
    refilled: float
    penalty: float = 0.0
    charged: float = 0.0
    banned_until: float = 0.0
    bans: int = 0
    offences: Counter[str] = field(default_factory=Counter)


class PeerLimits:
    """Standing of every peer seen lately; `on_ban` is called with the peer that must be disconnected."""

    def __init__(self, config: LimitConfig, clock: Clock, on_ban: Callable[[str], None] = lambda _: None) -> None:
        self.config = config
        self.on_ban = on_ban
        self.offences: Counter[str] = Counter()
        self._clock = clock
        self._peers: OrderedDict[str, _Standing] = OrderedDict()

    def allows_request(self, peer: str) -> bool:
        """Take one request from the peer's budget; charge it when the budget is empty."""
        standing = self._standing(peer)
        now = self._clock()
        earned = (now - standing.refilled) * self.config.requests
        standing.tokens = min(self.config.requests_burst, standing.tokens + earned)
        standing.refilled = now
        if standing.tokens < 1:
            self.charge(peer, Offence.TOO_MANY_REQUESTS)
            return False
        standing.tokens -= 1
        return True

    def charge(self, peer: str, offence: Offence) -> None:
        """Add the offence's points; ban the peer when they reach the limit."""
        standing = self._standing(peer)
        now = self._clock()
        standing.penalty = self._decayed(standing, now) + _POINTS[offence]
        standing.charged = now
        standing.offences[offence] += 1
        self.offences[offence] += 1
        if standing.penalty >= self.config.penalty_limit and now >= standing.banned_until:
            seconds = min(self.config.ban_max_seconds, self.config.ban_seconds * 2**standing.bans)
            standing.banned_until = now + seconds
            standing.bans = min(standing.bans + 1, 16)
            standing.penalty = 0.0
            self.on_ban(peer)

    def is_banned(self, peer: str) -> bool:
        """Whether the peer's ban still runs."""
        standing = self._peers.get(peer)
        return standing is not None and self._clock() < standing.banned_until

    def penalty(self, peer: str) -> float:
        """Return the peer's decayed penalty points."""
        standing = self._peers.get(peer)
        return self._decayed(standing, self._clock()) if standing is not None else 0.0

    def banned(self) -> dict[str, float]:
        """Return the banned peers and the seconds that remain."""
        now = self._clock()
        return {
            peer: standing.banned_until - now for peer, standing in self._peers.items() if now < standing.banned_until
        }

    def _decayed(self, standing: _Standing, now: float) -> float:
        return standing.penalty * 0.5 ** ((now - standing.charged) / self.config.penalty_halves_after)

    def _standing(self, peer: str) -> _Standing:
        standing = self._peers.get(peer)
        if standing is None:
            now = self._clock()
            standing = self._peers[peer] = _Standing(self.config.requests_burst, now, charged=now)
            self._forget_excess(now)
        self._peers.move_to_end(peer)
        return standing

    def _forget_excess(self, now: float) -> None:
        """Drop the longest unseen peers; one that is banned goes only when no other is left."""
        while len(self._peers) > MAX_TRACKED_PEERS:
            free = (peer for peer, standing in self._peers.items() if now >= standing.banned_until)
            del self._peers[next(free, next(iter(self._peers)))]
