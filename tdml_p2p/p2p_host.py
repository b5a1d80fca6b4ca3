"""The libp2p host of one peer: Noise and Yamux over TCP only, with the guards that libp2p 0.8.1 lacks.

Its swarm keeps the slot of every inbound connection for ever, so that a daemon stops accepting after a
while; an exception in one stream's handler ends the whole swarm; and its Kademlia ignores the protocol
prefix that it is given. The classes below close these.
"""

from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import structlog
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.host.basic_host import BasicHost
from libp2p.io.abc import ReadWriteCloser
from libp2p.kad_dht.common import PROTOCOL_ID as KAD
from libp2p.network.auto_connector import AutoConnector
from libp2p.network.config import ConnectionConfig, RetryConfig
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.exceptions import SwarmException
from libp2p.network.swarm import Swarm
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStore
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.transport.tcp.tcp import TCP
from libp2p.transport.upgrader import TransportUpgrader
from multiaddr import Multiaddr

from chain.keys import PrivateKey
from tdml_p2p.limits import Offence, PeerLimits
from tdml_p2p.muxer import Muxers
from tdml_p2p.streams import abandon, shielded

log = structlog.get_logger(__name__)

NEGOTIATE_SECONDS = 20
CLOSE_SECONDS = 5.0
_READ_BYTES = 256 * 1024
Handler = Callable[[Any], Awaitable[None]]


class _NoAutoConnector(AutoConnector):
    """Never dials: `peers.Upkeep` decides about connections."""

    async def maybe_connect(self) -> None:
        """Leave the connections as they are."""


class _ReadAhead(ReadWriteCloser):
    """A TCP stream read in as large parts as have come: Noise asks for two bytes, then for the message."""

    def __init__(self, stream: ReadWriteCloser) -> None:
        self._stream = stream
        self._ahead = b""
        self._start = 0

    async def read(self, n: int | None = None) -> bytes:
        """Return what is there, up to `n` bytes; nothing at the end."""
        if n == 0:
            return b""
        if self._start == len(self._ahead):
            self._ahead, self._start = await self._stream.read(_READ_BYTES), 0
        end = len(self._ahead) if n is None else min(self._start + n, len(self._ahead))
        taken = self._ahead[self._start : end]
        self._start = end
        return taken

    async def write(self, data: bytes) -> None:
        """Send all of `data`."""
        await self._stream.write(data)

    async def close(self) -> None:
        """Close the socket."""
        await self._stream.close()

    def get_remote_address(self) -> tuple[str, int] | None:
        """Return the peer's host and port."""
        return self._stream.get_remote_address()


class _Tcp(TCP):
    async def dial(self, maddr: Multiaddr) -> Any:
        connection: Any = await super().dial(maddr)
        connection.stream = _ReadAhead(connection.stream)
        return connection


class _Swarm(Swarm):
    """Connections of one host, bounded per peer; banned peers get none."""

    limits: PeerLimits

    async def add_conn(self, muxed_conn: Any, direction: Any = "outbound") -> Any:
        peer = muxed_conn.peer_id
        if self.limits.is_banned(str(peer)):
            await muxed_conn.close()
            raise SwarmException(f"{peer} is banned for now")
        connection = await super().add_conn(muxed_conn, direction=direction)
        for excess in self.get_connections(peer)[: -self.limits.config.connections]:
            # The oldest goes: a restarted peer must not be kept out by its own dead connections.
            self.manager.run_task(excess.close)
        return connection

    async def _do_handle_inbound_connection(self, read_write_closer: Any, maddr: Any, failure_event: Any) -> None:
        connection = RawConnection(_ReadAhead(read_write_closer), False)
        try:
            muxed = await self.upgrade_inbound_raw_conn(connection, maddr)
            await muxed.event_closed.wait()
        except Exception as error:  # noqa: BLE001
            # Whatever a stranger sends costs this connection only.
            log.debug("inbound connection failed", reason=f"{type(error).__name__}: {error}")
            with shielded(CLOSE_SECONDS):
                await connection.close()


class Host(BasicHost):
    """A libp2p host whose streams are counted per peer and cannot harm it; `prefix` names its network."""

    def __init__(self, network: _Swarm, prefix: str, limits: PeerLimits) -> None:
        self.reach: Callable[[str], Awaitable[None]] | None = None
        self._prefix = prefix
        self._limits = limits
        self._streams: Counter[str] = Counter()
        super().__init__(network, disable_identify_address_discovery=True, negotiate_timeout=NEGOTIATE_SECONDS)

    def set_stream_handler(self, protocol_id: Any, stream_handler: Handler) -> None:
        """Serve a protocol; the Kademlia of libp2p gets this network's own."""
        super().set_stream_handler(self._named(protocol_id), stream_handler)

    async def new_stream(self, peer_id: ID, protocol_ids: Any) -> Any:
        """Return a new stream, dialling the peer's known addresses if there is no connection yet."""
        if self.reach is not None and not self._network.get_connections(peer_id):
            await self.reach(str(peer_id))
        return await super().new_stream(peer_id, [self._named(protocol) for protocol in protocol_ids])

    def get_transport_addrs(self) -> Any:
        """Return where this host listens: nowhere, once its listeners are closed."""
        try:
            return super().get_transport_addrs()
        except OSError:
            return []

    def _named(self, protocol: Any) -> Any:
        return f"{self._prefix}/kad/1.0.0" if protocol == KAD else protocol

    async def _swarm_stream_handler(self, net_stream: Any) -> None:
        peer = str(net_stream.muxed_conn.peer_id)
        if self._streams[peer] >= self._limits.config.streams:
            self._limits.charge(peer, Offence.TOO_MANY_STREAMS)
            await abandon(net_stream)
            return
        self._streams[peer] += 1
        try:
            await super()._swarm_stream_handler(net_stream)
        except Exception as error:  # noqa: BLE001
            # A broken stream ends here; every other one goes on.
            log.debug("stream failed", peer=peer, reason=f"{type(error).__name__}: {error}")
            await abandon(net_stream)
        finally:
            self._streams[peer] -= 1
            if not self._streams[peer]:
                del self._streams[peer]


def build_host(key: PrivateKey, prefix: str, limits: PeerLimits, max_connections: int) -> Host:
    """Return a host whose id is the account's, offering Noise and Yamux over TCP only."""
    pair = create_new_key_pair(key.seed)
    noise = NoiseTransport(pair, noise_privkey=create_noise_key_pair().private_key)
    upgrader = TransportUpgrader({NOISE: noise}, {}, NEGOTIATE_SECONDS)
    upgrader.muxer_multistream = Muxers(NEGOTIATE_SECONDS)
    identity = ID.from_pubkey(pair.public_key)
    store = PeerStore()
    store.add_key_pair(identity, pair)
    connections = ConnectionConfig(
        max_connections=max_connections,
        min_connections=0,
        low_watermark=0,
        high_watermark=max_connections,
        max_connections_per_peer=max_connections,
        inbound_upgrade_timeout=NEGOTIATE_SECONDS,
        outbound_upgrade_timeout=NEGOTIATE_SECONDS,
        outbound_stream_protocol_negotiation_timeout=NEGOTIATE_SECONDS,
        inbound_stream_protocol_negotiation_timeout=NEGOTIATE_SECONDS,
    )
    swarm = _Swarm(identity, store, upgrader, [_Tcp()], RetryConfig(max_retries=0), connections)
    swarm.limits = limits
    swarm.auto_connector = _NoAutoConnector(swarm)
    return Host(swarm, prefix, limits)
