"""The chain engine on the network: gossip, range sync, and the events of blocks for whoever watches."""

from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog
import trio

from chain.blocks import Block
from chain.engine import Action, ChainEngine, Committed
from chain.engine import Disposition as Verdict
from chain.engine import RequestFailed as SyncFailed
from chain.keys import peer_id
from chain.ledger import Event
from chain.store import Store
from tdml_p2p.gossip import Disposition
from tdml_p2p.host import Network
from tdml_p2p.limits import Offence
from tdml_p2p.metrics import Metrics
from tdml_p2p.requests import RequestFailed

if TYPE_CHECKING:
    from trio_typing import TaskStatus

log = structlog.get_logger("tdml.chain")

TOPICS = ("block", "vote")
SYNC_PROTOCOL = "/tdml/sync/1"
SYNC_REQUEST_BYTES = 4096
SYNC_REPLY_BYTES = 8 * 1024 * 1024
SYNC_TIMEOUT = 20.0
TAIL_BLOCKS = 20
AUDIT_EVENTS = frozenset(
    [
        "drawn",
        "committed",
        "opened",
        "passed",
        "disputed",
        "opinion",
        "ballot",
        "convicted",
        "acquitted",
        "faulted",
        "undecided",
        "withheld",
        "absent",
        "void",
        "unaudited",
        "reopened",
        "refuted",
        "charged",
        "watched",
        "silent",
        "evicted",
        "slashed",
    ]
)
"""What the metric of audits counts: every audit, vote, fault and eviction."""


class NetworkAdapter:
    """`chain.engine.ChainNetwork` over the libp2p network of this peer."""

    def __init__(self, network: Network) -> None:
        self._network = network

    async def publish(self, topic: str, data: bytes) -> None:
        """Gossip `data` on one of the chain's topics."""
        await self._network.publish(topic, data)

    def peers(self) -> tuple[str, ...]:
        """Return the connected peers of this network."""
        return self._network.peers()

    async def request(self, peer: str, data: bytes) -> bytes:
        """Ask one peer over `/tdml/sync/1`; raise `chain.engine.RequestFailed`."""
        try:
            return await self._network.request(peer, SYNC_PROTOCOL, data, limit=SYNC_REPLY_BYTES, timeout=SYNC_TIMEOUT)
        except RequestFailed as error:
            raise SyncFailed(str(error)) from error

    def penalize(self, peer: str, reason: str) -> None:
        """Count a false answer of a peer against it."""
        log.warning("a peer served something false", peer=peer, reason=reason)
        self._network.limits.charge(peer, Offence.PROTOCOL_VIOLATION)


def block_lines(found: Block, events: Sequence[Event]) -> list[dict[str, Any]]:
    """Return what `watch` prints of one final block: the block itself, then its events in order."""
    header = found.header
    block = {
        "hash": header.hash.hex(),
        "proposer": peer_id(header.proposer),
        "transactions": len(found.transactions),
    }
    lines = [("block", block), *((event.kind, event.data) for event in events)]
    return [{"height": header.height, "time": header.timestamp, "kind": kind, "data": data} for kind, data in lines]


class Feed:
    """A subscription of one watcher: history from a read-only store, news as it becomes final."""

    def __init__(self, height: int, blocks: trio.MemoryReceiveChannel[Committed], store: Store) -> None:
        self.height = height
        self._blocks = blocks
        self._store = store
        self._one_thread = trio.CapacityLimiter(1)
        self._latest: list[dict[str, Any]] = []

    async def past(self, height: int) -> list[dict[str, Any]]:
        """Return the lines of one final block, none for a height that is not here."""
        if self._latest and self._latest[0]["height"] == height:
            return self._latest
        return await trio.to_thread.run_sync(_stored_lines, self._store, height, limiter=self._one_thread)

    async def __aiter__(self) -> AsyncIterator[int]:
        """Iterate over the heights that become final."""
        async for committed in self._blocks:
            self._latest = block_lines(committed.block, committed.events)
            yield committed.block.header.height


def _stored_lines(store: Store, height: int) -> list[dict[str, Any]]:
    found = store.block(height)
    if found is None:
        return []
    return block_lines(found[0], [event for _, event in store.events(height, height)])


class ChainService:
    """Runs the engine on the network and keeps what the status shows of it."""

    def __init__(self, network: Network, engine: ChainEngine, metrics: Metrics, clock_ms: Callable[[], int]) -> None:
        self.tail: deque[dict[str, Any]] = deque(maxlen=TAIL_BLOCKS)
        self._network = network
        self._engine = engine
        self._metrics = metrics
        self._clock_ms = clock_ms
        self._started_ms = clock_ms()
        """Older blocks are caught up with: how long they took to arrive says nothing about finality."""
        self._advanced = trio.Event()
        self._latest_at: float | None = None

    async def run(self, *, task_status: "TaskStatus[None]" = trio.TASK_STATUS_IGNORED) -> None:
        """Run the engine and follow it until cancelled."""
        for topic in TOPICS:
            self._network.on_topic(topic, partial(self._deliver, topic))
        self._network.on_slow_topic("tx", self._take)
        self._network.on_request(SYNC_PROTOCOL, self._engine.serve, SYNC_REQUEST_BYTES)
        async with trio.open_nursery() as nursery:
            await nursery.start(self._follow)
            await nursery.start(self._engine.run)
            task_status.started()

    def _deliver(self, topic: str, sender: str, data: bytes) -> Disposition:
        return self._counted(self._engine.deliver(topic, sender, data))

    async def _take(self, _sender: str, data: bytes) -> Disposition:
        return self._counted(await self._engine.take(data))

    def _counted(self, found: Verdict) -> Disposition:
        if found.action is Action.REJECT:
            self._metrics.refused.labels(found.reason).inc()
        return Disposition(str(found.action))

    async def _follow(self, *, task_status: "TaskStatus[None]" = trio.TASK_STATUS_IGNORED) -> None:
        async with self._engine.subscribe() as blocks:
            task_status.started()
            async for committed in blocks:
                self._note(committed)

    def _note(self, committed: Committed) -> None:
        header = committed.block.header
        self.tail.appendleft(_tail_line(committed))
        self._latest_at = trio.current_time()
        if header.timestamp >= self._started_ms:
            self._metrics.observe_finality((self._clock_ms() - header.timestamp) / 1000)
        self._metrics.height.set(header.height)
        for event in committed.events:
            if event.kind in AUDIT_EVENTS:
                self._metrics.audits.labels(event.kind).inc()
        self._advanced.set()
        self._advanced = trio.Event()

    def block_age(self) -> float | None:
        """Return the seconds since a block became final here, None before the first."""
        return None if self._latest_at is None else trio.current_time() - self._latest_at

    async def next_block(self) -> None:
        """Wait until another block is final."""
        await self._advanced.wait()

    @asynccontextmanager
    async def feed(self, path: Path) -> AsyncIterator[Feed]:
        """Subscribe one watcher, who reads the past from the database at `path`."""
        async with self._engine.subscribe() as blocks:
            with closing(Store.open_read_only(path)) as store:
                yield Feed(self._engine.state.height, blocks, store)


def _tail_line(committed: Committed) -> dict[str, Any]:
    first = block_lines(committed.block, ())[0]
    return {"height": first["height"], "time": first["time"], **first["data"]}
