"""Keeping connected: bootstrap with backoff, remembered peers, and the exchange of peers' addresses.

`/tdml/<net>/peers/1`: a peer says where it listens and learns where others do. The protocol's name holds
the network, so a peer of another network cannot answer and is not counted as a neighbour. The same
exchange, repeated, is how a silent peer is noticed.
"""

import json
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec
import structlog
import trio
from libp2p.exceptions import BaseLibp2pError
from libp2p.network.exceptions import SwarmException
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import InvalidAddrError, PeerInfo, info_from_p2p_addr
from multiaddr import Multiaddr
from multiaddr.exceptions import Error as MultiaddrError

from chain.keys import account_of
from tdml_p2p.limits import PeerLimits
from tdml_p2p.requests import Refused, RequestFailed, Requests
from tdml_p2p.streams import shielded

log = structlog.get_logger(__name__)

TARGET_NEIGHBOURS = 16
_MAX_KNOWN = 1024
_MAX_ADDRESSES = 8
_MAX_TOLD = 64
_MESSAGE_BYTES = 64 * 1024
_DIAL_SECONDS = 20.0
_HELLO_SECONDS = 20.0
_DIALS_AT_ONCE = 4
_CHECKS_A_ROUND = 6
_MAX_MISSED = 3
_ADDRESS_SECONDS = 3600
_LEAST_ROUND_SECONDS = 0.1
_LATER_SECONDS = 0.5
_GOODBYE_SECONDS = 3.0
_BACKOFF_SECONDS = (1.0, 30.0)

Address = Annotated[str, msgspec.Meta(max_length=256)]
Addresses = Annotated[tuple[Address, ...], msgspec.Meta(max_length=8)]


class Hello(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Where the sender listens, and some peers of the network with their addresses."""

    addresses: Addresses
    peers: Annotated[
        tuple[tuple[Annotated[str, msgspec.Meta(max_length=64)], Addresses], ...],
        msgspec.Meta(max_length=_MAX_TOLD),
    ]


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Hello)


class ConnectFailed(RequestFailed):
    """A peer could not be reached or is not of this network; `reason` says which."""


def decode_hello(data: bytes) -> Hello:
    """Return the hello that `data` encodes; raise `ValueError`."""
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ValueError(str(error)) from None


def peer_info(address: str) -> PeerInfo:
    """Return libp2p's form of an address that ends in `/p2p/PEERID`; raise `ValueError`."""
    try:
        info = info_from_p2p_addr(Multiaddr(address))
        account_of(str(info.peer_id))
    except (InvalidAddrError, MultiaddrError, ValueError) as error:
        raise ValueError(f"{address[:200]!r} is not an address of a peer: {error}") from None
    return info


@dataclass
class _Known:
    addresses: tuple[str, ...]
    failures: int = 0
    next_dial: float = 0.0
    missed: int = 0
    is_checked: bool = False
    dialling: trio.Lock = field(default_factory=trio.Lock)


@dataclass(frozen=True)
class UpkeepConfig:
    """How connections are kept: addresses to start from, the file of remembered peers, seconds between rounds."""

    bootstrap: tuple[str, ...] = ()
    file: Path | None = None
    round_seconds: float = 10.0


@dataclass
class Upkeep:
    """The peers that this one knows, and which of them it is connected to."""

    host: Any
    requests: Requests
    limits: PeerLimits
    prefix: str
    config: UpkeepConfig
    on_greeted: Callable[[str], Awaitable[None]]
    rng: random.Random = field(default_factory=random.Random)
    greeted: set[str] = field(default_factory=set)
    _known: dict[str, _Known] = field(default_factory=dict)
    _nursery: trio.Nursery | None = None
    _dials: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(_DIALS_AT_ONCE))
    _wake: trio.Event = field(default_factory=trio.Event)

    def __post_init__(self) -> None:
        self.peer = str(self.host.get_id())
        self.protocol = f"{self.prefix}/peers/1"
        self.requests.serve(self.protocol, self._serve, _MESSAGE_BYTES)
        self.host.reach = self._reach_for_stream

    def start(self, nursery: trio.Nursery) -> None:
        """Keep connected in `nursery`; raise `ValueError` for a bootstrap address that is none."""
        for address in (*self.config.bootstrap, *self._remembered()):
            info = peer_info(address)
            self._learn(str(info.peer_id), (_without_peer(address),))
        self._nursery = nursery
        nursery.start_soon(self._run, nursery)

    def stop(self) -> None:
        """Start nothing new, because the nursery is about to close."""
        self._nursery = None

    def neighbours(self) -> tuple[str, ...]:
        """Return the connected peers of this network."""
        connected = {str(peer) for peer in self.host.get_connected_peers()}
        self.greeted &= connected
        return tuple(sorted(self.greeted))

    def addresses(self) -> tuple[str, ...]:
        """Return where this peer listens, each with its peer id."""
        return tuple(str(address) for address in self.host.get_addrs())

    async def connect(self, address: str) -> str:
        """Connect to a peer of this network and return its id; raise `ConnectFailed`."""
        try:
            info = peer_info(address)
        except ValueError as error:
            raise ConnectFailed(address[:128], str(error)) from None
        peer = str(info.peer_id)
        self._learn(peer, (_without_peer(address),))
        await self._reach(peer)
        return peer

    async def disconnect(self, peer: str) -> None:
        """Close every connection to a peer, also inside a cancelled scope."""
        self.greeted.discard(peer)
        with shielded(_GOODBYE_SECONDS):
            await self.host.get_network().close_peer(ID.from_string(peer))

    async def _reach(self, peer: str) -> None:
        """Dial and greet a peer; raise `ConnectFailed`."""
        if self.limits.is_banned(peer):
            raise ConnectFailed(peer, "banned for now")
        known = self._known.get(peer)
        if known is None or not known.addresses:
            raise ConnectFailed(peer, "no address is known")
        async with known.dialling:
            if ID.from_string(peer) not in self.host.get_connected_peers():
                await self._dial_any(peer, known.addresses)
        await self._greet(peer)

    async def _dial_any(self, peer: str, addresses: tuple[str, ...]) -> None:
        """Try the addresses one after the other; libp2p alone would try only the first."""
        for address in addresses:
            with trio.move_on_after(_DIAL_SECONDS):
                try:
                    await self.host.get_network().dial_addr(Multiaddr(address), ID.from_string(peer))
                except (BaseLibp2pError, OSError) as error:
                    log.debug("dial failed", peer=peer, address=address, error=str(error))
                else:
                    return
        raise ConnectFailed(peer, "cannot be reached at any known address")

    async def _reach_for_stream(self, peer: str) -> None:
        """Connect before a stream is opened; what goes wrong is told in libp2p's terms."""
        try:
            await self._reach(peer)
        except ConnectFailed as error:
            raise SwarmException(error.reason) from None

    async def _greet(self, peer: str) -> None:
        try:
            reply = await self.requests.ask(
                peer, self.protocol, self._hello(peer), limit=_MESSAGE_BYTES, timeout=_HELLO_SECONDS
            )
            hello = decode_hello(reply)
        except RequestFailed as error:
            raise ConnectFailed(peer, f"no answer from a peer of this network: {error.reason}") from None
        except ValueError as error:
            raise ConnectFailed(peer, f"its hello is malformed: {error}") from None
        await self._take(peer, hello)

    def _hello(self, receiver: str) -> bytes:
        others = [
            (peer, self._known[peer].addresses)
            for peer in self.neighbours()
            if peer != receiver and peer in self._known and self._known[peer].addresses
        ]
        if len(others) > _MAX_TOLD:
            others = self.rng.sample(others, _MAX_TOLD)
        own = tuple(_without_peer(address) for address in self.addresses())[:8]
        return _encoder.encode(Hello(own, tuple(others)))

    async def _serve(self, sender: str, data: bytes) -> bytes:
        await self._take(sender, decode_hello(data))
        return self._hello(sender)

    async def _take(self, sender: str, hello: Hello) -> None:
        self._learn(sender, hello.addresses, is_own=True)
        known = self._known.get(sender)
        if known is None:
            raise Refused("no-account")
        known.failures = known.missed = 0
        # The DHT takes a neighbour's addresses from here.
        listening = [Multiaddr(address) for address in known.addresses]
        self.host.get_peerstore().add_addrs(ID.from_string(sender), listening, _ADDRESS_SECONDS)
        news = [peer for peer, _ in hello.peers if peer != self.peer and peer not in self._known]
        for peer, addresses in hello.peers:
            if peer != self.peer and peer not in self.greeted:
                self._learn(peer, addresses)
        if sender not in self.greeted:
            self.greeted.add(sender)
            if self._nursery is not None:
                self._nursery.start_soon(self.on_greeted, sender)
        if news:
            self._wake.set()

    async def _run(self, nursery: trio.Nursery) -> None:
        next_check = trio.current_time()
        while True:
            if trio.current_time() >= next_check:
                next_check = trio.current_time() + self.config.round_seconds * self.rng.uniform(0.8, 1.2)
                neighbours = self.neighbours()
                for peer in self.rng.sample(neighbours, min(_CHECKS_A_ROUND, len(neighbours))):
                    nursery.start_soon(self._check, peer)
                await trio.to_thread.run_sync(self._remember)
            self._dial_some(nursery)
            self._wake = trio.Event()
            with trio.move_on_at(next_check):
                await self._wake.wait()
                await trio.sleep(_LEAST_ROUND_SECONDS)

    def _learn(self, peer: str, addresses: tuple[str, ...], *, is_own: bool = False) -> None:
        """Remember addresses that look dialable; only a peer itself can take back older ones."""
        try:
            account_of(peer)
            usable = tuple(address for address in addresses if Multiaddr(address).value_for_protocol("tcp"))
        except (ValueError, MultiaddrError):
            return
        known = self._known.get(peer)
        if known is not None:
            held = () if is_own and usable else known.addresses
            known.addresses = tuple(dict.fromkeys((*usable, *held)))[:_MAX_ADDRESSES]
            return
        self._known[peer] = _Known(usable)
        while len(self._known) > _MAX_KNOWN:
            del self._known[next(p for p in self._known if p not in self.greeted)]

    def _dial_some(self, nursery: trio.Nursery) -> None:
        now = trio.current_time()
        room = TARGET_NEIGHBOURS - len(self.neighbours())
        candidates = [
            peer
            for peer, known in self._known.items()
            if peer != self.peer
            and peer not in self.greeted
            and known.addresses
            and known.next_dial <= now
            and not self.limits.is_banned(peer)
        ]
        self.rng.shuffle(candidates)
        for peer in candidates[: max(0, room)]:
            # Until the dial is over, no second one starts.
            self._known[peer].next_dial = now + _DIAL_SECONDS + _HELLO_SECONDS
            nursery.start_soon(self._dial, peer)

    async def _dial(self, peer: str) -> None:
        known = self._known[peer]
        # Of two peers that learn of each other at once, one dials first.
        if self.peer > peer and not known.failures:
            await trio.sleep(_LATER_SECONDS)
        if peer not in self.neighbours():
            try:
                # A storm of dials would time out on a busy machine, and start over.
                async with self._dials:
                    await self._reach(peer)
            except ConnectFailed as error:
                least, most = _BACKOFF_SECONDS
                wait = min(most, least * 2.0**known.failures) * self.rng.uniform(0.5, 1.5)
                known.next_dial = trio.current_time() + wait
                known.failures = min(known.failures + 1, 16)
                log.info("peer not reached", peer=peer, reason=error.reason, again_in=round(wait, 1))
                return
        known.next_dial = 0.0

    async def _check(self, peer: str) -> None:
        """Exchange peers with a neighbour; a silent one is disconnected."""
        known = self._known.get(peer)
        # A slow peer gets one question at a time.
        if known is None or known.is_checked:
            return
        known.is_checked = True
        try:
            await self._greet(peer)
        except ConnectFailed as error:
            if peer not in self.neighbours():
                return
            known.missed += 1
            if known.missed >= _MAX_MISSED:
                log.info("silent peer disconnected", peer=peer, reason=error.reason)
                await self.disconnect(peer)
        finally:
            known.is_checked = False

    def _remembered(self) -> list[str]:
        if self.config.file is None or not self.config.file.exists():
            return []
        try:
            lines = json.loads(self.config.file.read_text())
            return [line for line in lines if peer_info(line)][:_MAX_KNOWN]
        except (OSError, ValueError, TypeError) as error:
            log.warning("the file of remembered peers is unreadable", error=str(error))
            return []

    def _remember(self) -> None:
        if self.config.file is None:
            return
        lines = [
            f"{address}/p2p/{peer}"
            for peer, known in list(self._known.items())
            if known.failures < 8
            for address in known.addresses[:2]
        ]
        scratch = self.config.file.with_name(f".{self.config.file.name}.new")
        try:
            scratch.write_text(json.dumps(lines[:_MAX_TOLD], indent=1))
            scratch.replace(self.config.file)
        except OSError as error:
            log.warning("peers cannot be remembered", error=str(error))


def _without_peer(address: str) -> str:
    return address.partition("/p2p/")[0]
