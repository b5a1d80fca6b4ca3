"""The network of one peer: a libp2p host with Noise and Yamux over TCP only, and what runs on it."""

import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import structlog
import trio
from libp2p.rcmgr import Direction
from multiaddr import Multiaddr

from chain.keys import PrivateKey, peer_id
from tdml_p2p.blobs import Blobs
from tdml_p2p.discovery import Discovery
from tdml_p2p.errors import UserError
from tdml_p2p.gossip import Gossip, SlowTopicHandler, TopicHandler
from tdml_p2p.limits import LimitConfig, Offence, PeerLimits
from tdml_p2p.p2p_host import build_host
from tdml_p2p.peers import Upkeep, UpkeepConfig
from tdml_p2p.requests import Handler, Requests
from tdml_p2p.streams import shielded
from tdml_p2p.tensors import TensorConfig, TensorStreams

if TYPE_CHECKING:
    from tdml_p2p.metrics import Metrics

log = structlog.get_logger(__name__)

_GOODBYE_SECONDS = 2.0


@dataclass(frozen=True)
class NetworkConfig:
    """Where to listen and whom to start from; `home` keeps remembered peers and blobs, None keeps neither."""

    listen: tuple[str, ...] = ("/ip4/127.0.0.1/tcp/0",)
    bootstrap: tuple[str, ...] = ()
    home: Path | None = None
    limits: LimitConfig = field(default_factory=LimitConfig)
    tensors: TensorConfig = field(default_factory=TensorConfig)
    round_seconds: float = 10.0
    max_connections: int = 256


class Network:
    """One peer of the network `chain_id`: gossip, requests, tensors, blobs and discovery."""

    def __init__(self, config: NetworkConfig, key: PrivateKey, chain_id: bytes) -> None:
        self.peer = peer_id(key.account)
        self.config = config
        prefix = f"/tdml/{chain_id.hex()[:16]}"
        self.limits = PeerLimits(config.limits, time.monotonic, self._on_ban)
        self.host = build_host(key, prefix, self.limits, config.max_connections)
        self.requests = Requests(self.host, self.limits)
        self.gossip = Gossip(self.host, prefix, self.limits)
        self.tensors = TensorStreams(self.host, self.limits, config.tensors)
        self.blobs = Blobs(self.requests, self.limits, config.home / "blobs" if config.home else None)
        self.discovery = Discovery(self.host, self.requests, self.limits, key, prefix, time.time)
        self._upkeep = Upkeep(
            self.host,
            self.requests,
            self.limits,
            prefix,
            UpkeepConfig(config.bootstrap, config.home / "peers.json" if config.home else None, config.round_seconds),
            self.discovery.on_connected,
        )
        self._nursery: trio.Nursery | None = None

    @classmethod
    @asynccontextmanager
    async def open(cls, config: NetworkConfig, key: PrivateKey, chain_id: bytes) -> AsyncIterator[Self]:
        """Listen and take part until the block ends; raise `UserError` when an address is not free."""
        network = cls(config, key, chain_id)
        async with (
            _listening(network.host, config.listen),
            network.gossip.run(),
            network.discovery.run(),
            trio.open_nursery() as nursery,
        ):
            network._nursery = nursery
            network.tensors.start(nursery)
            network._upkeep.start(nursery)
            try:
                yield network
            finally:
                network._nursery = None
                network._upkeep.stop()
                nursery.cancel_scope.cancel()
                await _close_connections(network.host)

    @property
    def addresses(self) -> tuple[str, ...]:
        """Return where this peer listens, each ending in `/p2p/PEERID`."""
        return self._upkeep.addresses()

    def peers(self) -> tuple[str, ...]:
        """Return the connected peers of this network."""
        return self._upkeep.neighbours()

    async def connect(self, address: str) -> str:
        """Connect to `address` and return the peer's id; raise `peers.ConnectFailed`."""
        return await self._upkeep.connect(address)

    async def disconnect(self, peer: str) -> None:
        """Close the connections to `peer`."""
        await self._upkeep.disconnect(peer)

    async def publish(self, topic: str, data: bytes) -> None:
        """Gossip up to 4 MiB on `topic`; raise `ValueError` beyond that."""
        await self.gossip.publish(topic, data)

    def on_topic(self, topic: str, handler: TopicHandler) -> None:
        """Join `topic`; `handler` decides about every new message before it travels on."""
        self.gossip.on_topic(topic, handler)

    def on_slow_topic(self, topic: str, handler: SlowTopicHandler) -> None:
        """Join `topic`; other topics do not wait for its `handler`."""
        self.gossip.on_slow_topic(topic, handler)

    async def request(self, peer: str, protocol: str, data: bytes, *, limit: int, timeout: float) -> bytes:
        """Return the peer's reply of up to `limit` bytes; raise `RequestFailed`."""
        return await self.requests.ask(peer, protocol, data, limit=limit, timeout=timeout)

    def on_request(self, protocol: str, handler: Handler, limit: int) -> None:
        """Answer requests of up to `limit` bytes."""
        self.requests.serve(protocol, handler, limit)

    def evict(self, session: bytes, peer: str) -> None:
        """Refuse this peer's frames of a session from now on."""
        self.tensors.evict(session, peer)

    def penalize(self, peer: str, reason: str) -> None:
        """Charge `peer` with a false answer; enough of them end in a timed ban."""
        log.info("peer charged", peer=peer, reason=reason)
        self.limits.charge(peer, Offence.FALSE_ANSWER)

    def inbound(self) -> int:
        """Return how many of the connections came from outside."""
        connections = self.host.get_network().get_connections()
        return sum(connection.direction is Direction.INBOUND for connection in connections)

    def export(self, metrics: "Metrics") -> None:
        """Bring the counters of the network up to date."""
        sent, received = self.tensors.bytes_sent, self.tensors.inbound.bytes_received
        metrics.advance(metrics.tensor_bytes.labels("sent"), "tensor bytes sent", sent)
        metrics.advance(metrics.tensor_bytes.labels("received"), "tensor bytes received", received)
        metrics.advance(metrics.gossip_drops, "gossip dropped", self.gossip.counts["dropped"])
        for reason, count in self._refused().items():
            metrics.advance(metrics.refused.labels(reason), f"refused {reason}", count)

    def _refused(self) -> Counter[str]:
        parts = (self.requests.refused, self.tensors.inbound.refused, self.discovery.refused)
        return sum(parts, Counter())

    def status(self) -> dict[str, Any]:
        """Return what `status` shows of the network."""
        return {
            "peer": self.peer,
            "addresses": list(self.addresses),
            "peers": list(self.peers()),
            "gossip": dict(self.gossip.counts),
            "refused": dict(self._refused()),
            "offences": dict(self.limits.offences),
            "banned": self.limits.banned(),
        }

    def _on_ban(self, peer: str) -> None:
        log.warning("peer banned", peer=peer)
        if self._nursery is not None:
            self._nursery.start_soon(self.disconnect, peer)


@asynccontextmanager
async def _listening(host: Any, addresses: tuple[str, ...]) -> AsyncIterator[None]:
    wanted = [Multiaddr(address) for address in addresses]
    async with host.run(wanted):
        bound = sum(len(listener.get_addrs()) > 0 for listener in host.get_network().listeners.values())
        if bound < len(wanted):
            listed = ", ".join(addresses)
            raise UserError(f"Cannot listen on {listed}.", "the port may be in use: choose another with --listen")
        yield


async def _close_connections(host: Any) -> None:
    """Close all connections at once; one at a time, libp2p takes a fifth of a second for each."""
    network = host.get_network()
    with shielded(_GOODBYE_SECONDS):
        # First the doors, or those who lose a connection come back at once.
        for listener in list(network.listeners.values()):
            await listener.close()
        async with trio.open_nursery() as nursery:
            for connection in network.get_connections():
                nursery.start_soon(connection.close)
