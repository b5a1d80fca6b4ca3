"""Finding tasks, stages and blobs: provider records in a Kademlia DHT of this network's own.

The DHT says who has a record under a key; the record itself, signed, comes from those peers and from the
neighbours over `/tdml/<net>/records/1`. Keys: `tasks`, `task/<hex>`, `task/<hex>/stage/<k>`, `blob/<hex>`.
"""

from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any

import msgspec
import structlog
import trio
from libp2p.exceptions import BaseLibp2pError
from libp2p.kad_dht.kad_dht import DHTMode, KadDHT
from libp2p.peer.id import ID
from libp2p.tools.anyio_service import background_trio_service

from chain.keys import PrivateKey, peer_id
from tdml_p2p.limits import Offence, PeerLimits
from tdml_p2p.records import RecordBook, RecordError, RecordReason, SignedRecord, check_key, sign_record
from tdml_p2p.requests import Refused, RequestFailed, Requests

log = structlog.get_logger(__name__)

RECORD_SECONDS = 600
ANNOUNCE_SECONDS = 120.0
_ASK_SECONDS = 4.0
_DHT_SECONDS = 5.0
_MAX_RECORDS = 32
_MESSAGE_BYTES = _MAX_RECORDS * 5120
_MAX_ASKED = 20


class FindRecords(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=1):
    """Ask for the records that a peer holds under a key."""

    key: Annotated[str, msgspec.Meta(max_length=96)]


class TakeRecords(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=2):
    """Hand a peer records to keep."""

    records: Annotated[tuple[SignedRecord, ...], msgspec.Meta(max_length=_MAX_RECORDS)]


_Records = Annotated[tuple[SignedRecord, ...], msgspec.Meta(max_length=_MAX_RECORDS)]
_encoder = msgspec.msgpack.Encoder()
_message_decoder: msgspec.msgpack.Decoder[FindRecords | TakeRecords] = msgspec.msgpack.Decoder(
    FindRecords | TakeRecords
)
_records_decoder: msgspec.msgpack.Decoder[tuple[SignedRecord, ...]] = msgspec.msgpack.Decoder(_Records)


def decode_message(data: bytes) -> FindRecords | TakeRecords:
    """Return the message that `data` encodes; raise `RecordError`."""
    try:
        return _message_decoder.decode(data)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        raise RecordError(RecordReason.MALFORMED) from None


class Discovery:
    """Announcements of this peer, records of others, and the way to them."""

    def __init__(
        self,
        host: Any,
        requests: Requests,
        limits: PeerLimits,
        key: PrivateKey,
        prefix: str,
        clock: Callable[[], float],
    ) -> None:
        self.refused: Counter[str] = Counter()
        self._host = host
        self._requests = requests
        self._limits = limits
        self._key = key
        self._peer = peer_id(key.account)
        self._clock = clock
        self._protocol = f"{prefix}/records/1"
        self._book = RecordBook(clock)
        self._own: dict[str, bytes] = {}
        # The random walk is off: at this size, neighbours' neighbours come through the peer exchange.
        self._dht = KadDHT(host, DHTMode.SERVER, enable_values=False)
        requests.serve(self._protocol, self._serve, _MESSAGE_BYTES)

    @asynccontextmanager
    async def run(self) -> AsyncIterator[None]:
        """Take part in the DHT and keep this peer's records alive while the block runs."""
        async with background_trio_service(self._dht), trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_announcing)
            yield
            nursery.cancel_scope.cancel()

    async def announce(self, key: str, record: bytes) -> None:
        """Say `record` under `key` from now on, again and again; raise `RecordError` beyond the bounds."""
        sign_record(self._key, key, record, int(self._clock()), RECORD_SECONDS)
        self._own[key] = record
        await self._say([key])

    def withdraw(self, key: str) -> None:
        """Say nothing under `key` any more; what others hold expires."""
        self._own.pop(key, None)
        self._book.remove(key, self._peer)

    async def find(self, key: str) -> tuple[SignedRecord, ...]:
        """Return the verified records under `key`, from neighbours and from the DHT's providers."""
        check_key(key)
        asked: set[str] = {self._peer}
        await self._ask_all(key, self._neighbours(), asked)
        await self._ask_all(key, await self._providers(key), asked)
        return self._book.get(key)

    async def on_connected(self, peer: str) -> None:
        """Add a new neighbour to the DHT and tell it what this peer announces."""
        await self._dht.add_peer(ID.from_string(peer), skip_server_mode_check=True)
        if self._own:
            await self._tell(peer, self._signed(list(self._own)))

    async def _keep_announcing(self) -> None:
        while True:
            await trio.sleep(ANNOUNCE_SECONDS)
            self._book.expire()
            if self._own:
                await self._say(list(self._own))

    async def _say(self, keys: list[str]) -> None:
        records = self._signed(keys)
        async with trio.open_nursery() as nursery:
            for peer in self._neighbours():
                nursery.start_soon(self._tell, peer, records)
            for key in keys:
                nursery.start_soon(self._provide, key)

    def _signed(self, keys: list[str]) -> list[SignedRecord]:
        now = int(self._clock())
        records = [sign_record(self._key, key, self._own[key], now, RECORD_SECONDS) for key in keys]
        for record in records:
            self._book.add(record)
        return records

    async def _provide(self, key: str) -> None:
        with trio.move_on_after(_DHT_SECONDS):
            try:
                await self._dht.provide(_dht_key(key))
            except (BaseLibp2pError, OSError) as error:
                log.debug("the DHT did not take a provider record", key=key, error=str(error))

    async def _providers(self, key: str) -> list[str]:
        found: list[Any] = []
        with trio.move_on_after(_DHT_SECONDS):
            try:
                found = await self._dht.find_providers(_dht_key(key), count=_MAX_ASKED)
            except (BaseLibp2pError, OSError) as error:
                log.debug("the DHT lookup failed", key=key, error=str(error))
        for info in found:
            self._host.get_peerstore().add_addrs(info.peer_id, info.addrs[:8], 600)
        return list(dict.fromkeys(str(info.peer_id) for info in found))

    async def _ask_all(self, key: str, peers: Sequence[str], asked: set[str]) -> None:
        new = [peer for peer in dict.fromkeys(peers) if peer not in asked][:_MAX_ASKED]
        asked.update(new)
        async with trio.open_nursery() as nursery:
            for peer in new:
                nursery.start_soon(self._ask, peer, key)

    async def _ask(self, peer: str, key: str) -> None:
        try:
            reply = await self._requests.ask(
                peer, self._protocol, _encoder.encode(FindRecords(key)), limit=_MESSAGE_BYTES, timeout=_ASK_SECONDS
            )
            records = _records_decoder.decode(reply)
        except RequestFailed as error:
            log.debug("a peer did not answer a lookup", peer=peer, reason=error.reason)
            return
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            self._refuse(peer, RecordReason.MALFORMED)
            return
        for record in records:
            if record.key == key and record.peer != self._peer:
                self._take(peer, record)

    async def _tell(self, peer: str, records: list[SignedRecord]) -> None:
        for start in range(0, len(records), _MAX_RECORDS):
            message = _encoder.encode(TakeRecords(tuple(records[start : start + _MAX_RECORDS])))
            try:
                await self._requests.ask(peer, self._protocol, message, limit=64, timeout=_ASK_SECONDS)
            except RequestFailed as error:
                log.debug("a neighbour did not take records", peer=peer, reason=error.reason)
                return

    async def _serve(self, sender: str, data: bytes) -> bytes:
        message = decode_message(data)
        if isinstance(message, FindRecords):
            check_key(message.key)
            return _encoder.encode(self._book.get(message.key)[:_MAX_RECORDS])
        if any(record.peer != sender for record in message.records):
            self._refuse(sender, RecordReason.BAD_PEER)
            raise Refused(RecordReason.BAD_PEER)
        for record in message.records:
            self._take(sender, record)
        return b""

    def _take(self, sender: str, record: SignedRecord) -> None:
        try:
            self._book.add(record)
        except RecordError as error:
            self._refuse(sender, error.reason)

    def _refuse(self, sender: str, reason: RecordReason) -> None:
        self.refused[reason] += 1
        if reason not in (RecordReason.EXPIRED, RecordReason.FULL):
            self._limits.charge(sender, Offence.FALSE_RECORD)

    def _neighbours(self) -> list[str]:
        return [str(peer) for peer in self._host.get_connected_peers()]


def _dht_key(key: str) -> str:
    return f"tdml/{key}"
