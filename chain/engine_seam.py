"""The engine's seam: the network it needs, its settings, what it reports and its errors. No I/O."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from chain.blocks import Block, Certificate
from chain.consensus import Timers
from chain.ledger import Event, Receipt
from chain.light import Trust


class ChainNetwork(Protocol):
    """What the engine needs of a network."""

    async def publish(self, topic: str, data: bytes) -> None:
        """Gossip `data` on "block", "vote" or "tx"."""

    def peers(self) -> tuple[str, ...]:
        """Return the connected peers of this network."""

    async def request(self, peer: str, data: bytes) -> bytes:
        """Return the peer's answer over `/tdml/sync/1`; raise `RequestFailed`."""

    def penalize(self, peer: str, reason: str) -> None:
        """Note that a peer served something false."""


class RequestFailed(Exception):
    """A request that a peer did not answer."""


class SubmitRefused(Exception):
    """An own transaction that cannot be sent; `reason` names why."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class TransactionExpired(Exception):
    """An own transaction that was not included although it was renewed several times."""


class Distrusted(Exception):
    """A chain whose block at the height that the owner trusts has another hash."""


class ChainBroken(Exception):
    """A final block that this software cannot execute to the result that the validators signed."""


@dataclass(frozen=True)
class Committed:
    """A block that has become final, and what it did."""

    block: Block
    certificate: Certificate
    receipts: tuple[Receipt, ...]
    events: tuple[Event, ...]


def _unix_ms() -> int:
    return time.time_ns() // 1_000_000


@dataclass(frozen=True)
class EngineConfig:
    """Settings of one engine. Times are seconds."""

    validate: bool = True
    timers: Timers = field(default_factory=Timers)
    standstill: float = 3.0
    sync_interval: float = 5.0
    """How often every connected peer is asked for its height; new ones are asked within a second."""
    sync_timeout: float = 10.0
    """How long a peer may take for one answer."""
    sync_grace: float = 0.3
    """How long a higher height may be heard of before it is fetched; gossip usually brings it."""
    trust: Trust | None = None
    """A recent block that the owner vouches for: a chain without it is refused."""
    keep: int = 0
    """Newest blocks that the store keeps, 0 for all; at least `store.LEAST_KEPT`."""
    snapshot: bool = False
    """Whether an empty store takes a verified snapshot instead of every block."""
    gossip_batch: float = 0.05
    offload: bool = True
    """Whether disk and large signature batches go to threads; tests on a virtual clock say no."""
    clock_ms: Callable[[], int] = _unix_ms
