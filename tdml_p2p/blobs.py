"""`/tdml/blob/2`: content-addressed transfer from several providers, verified chunk by chunk on arrival."""

import errno
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
import structlog
import trio
from blake3 import blake3

from tdml_p2p.blob_store import BlobStore, DiskFull, Source
from tdml_p2p.limits import Offence, PeerLimits
from tdml_p2p.requests import Refused, RequestFailed, RequestReason, Requests
from trainer.content import CHUNK_BYTES, MAX_BLOB_BYTES, Address, BlobIndex

log = structlog.get_logger(__name__)

PROTOCOL = "/tdml/blob/2"
MAX_REQUEST_BYTES = 256
_MAX_REPLY_BYTES = 4 << 20
_INDEX_BYTES_PER_CHUNK = 40
_MAX_CHUNKS = MAX_BLOB_BYTES // CHUNK_BYTES
_SECONDS = 30.0
_PATIENCE_SECONDS = 3.0
"""How long one provider may keep a request to itself; then another one is asked as well."""
_PARALLEL = 3
MAX_SPAN = 2
"""Chunks of one reply: a stream of its own costs half as much as a chunk. All lanes' replies may fly at once."""

ABSENT = "blob-absent"

T = TypeVar("T")
Buffer = bytes | memoryview
Keep = Callable[[int, Buffer], Awaitable[None]]
"""Takes a verified chunk by its number."""


class WantIndex(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=1):
    """Ask for a blob's index and, when the blob is one chunk, that chunk with it."""

    address: Address


class WantChunk(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=2):
    """Ask for one chunk, or for some that follow each other."""

    address: Address
    number: Annotated[int, msgspec.Meta(ge=0, lt=_MAX_CHUNKS)]
    count: Annotated[int, msgspec.Meta(ge=1, le=MAX_SPAN)] = 1


class IndexReply(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A blob's index, and its only chunk or nothing."""

    index: BlobIndex
    chunk: Annotated[bytes, msgspec.Meta(max_length=CHUNK_BYTES)]


_encoder = msgspec.msgpack.Encoder()
_want_decoder: msgspec.msgpack.Decoder[WantIndex | WantChunk] = msgspec.msgpack.Decoder(WantIndex | WantChunk)
_index_decoder = msgspec.msgpack.Decoder(IndexReply)


class BlobUnavailable(Exception):
    """No provider gave the blob; the message names what each did."""


def decode_want(data: bytes) -> WantIndex | WantChunk:
    """Return the request that `data` encodes; raise `ValueError`."""
    try:
        return _want_decoder.decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError(str(error)) from None


class Blobs:
    """Held blobs and transfers of one peer."""

    def __init__(self, requests: Requests, limits: PeerLimits, folder: Path | None) -> None:
        self.store = BlobStore(folder)
        self.bytes_fetched = 0
        self._requests = requests
        self._limits = limits
        self._may_have: Callable[[str, bytes], bool] = lambda _peer, _address: True
        requests.serve(PROTOCOL, self._serve, MAX_REQUEST_BYTES)

    async def put(self, data: bytes | memoryview) -> bytes:
        """Keep and serve `data`; return its address; raise `DiskFull`."""
        return await self.store.put(data)

    def provide(self, address: bytes, getter: Callable[[], memoryview | bytes | None]) -> None:
        """Serve `address` from memory for as long as `getter` returns its bytes."""
        self.store.provide(address, getter)

    def add_source(self, source: Source) -> None:
        """Serve whatever `source` returns for an address, and None for what it does not hold."""
        self.store.add_source(source)

    def guard(self, may_have: Callable[[str, bytes], bool]) -> None:
        """Serve a blob only to peers for which `may_have(peer, address)`; to others it is not here."""
        self._may_have = may_have

    async def fetch(self, address: bytes, providers: Sequence[str], limit: int = MAX_BLOB_BYTES) -> memoryview:
        """Return a blob of up to `limit` bytes, local or from `providers`; raise `BlobUnavailable`."""
        held = await self._read_local(address, limit)
        if held is not None:
            return held
        transfer = _Transfer(self._requests, self._limits, address, providers, limit)
        index = await transfer.find()
        buffer = memoryview(bytearray(index.size))

        async def keep(number: int, chunk: Buffer) -> None:
            buffer[number * CHUNK_BYTES : number * CHUNK_BYTES + len(chunk)] = chunk
            self.bytes_fetched += len(chunk)

        await transfer.run(set(range(len(index.chunks))), keep)
        return buffer

    async def download(self, address: bytes, providers: Sequence[str], limit: int = MAX_BLOB_BYTES) -> Path:
        """Return the file of a blob, fetching what an earlier attempt left; raise like `fetch`, or `DiskFull`."""
        path = self.store.path(address)
        if path is not None:
            return path
        transfer = _Transfer(self._requests, self._limits, address, providers, limit)
        index = await transfer.find()
        part = self.store.partial_path(address)
        missing = await trio.to_thread.run_sync(_missing_chunks, part, index)

        async def keep(number: int, chunk: Buffer) -> None:
            await trio.to_thread.run_sync(_write_at, part, number * CHUNK_BYTES, chunk)
            self.bytes_fetched += len(chunk)

        await transfer.run(missing, keep)
        return await trio.to_thread.run_sync(self.store.adopt, address, index, part)

    async def _read_local(self, address: bytes, limit: int) -> memoryview | None:
        """Return a held blob; None when it is not here, or no longer, or damaged: others may have it."""
        index = await self.store.index(address)
        if index is None:
            return None
        if index.size > limit:
            raise BlobUnavailable(f"{address.hex()} has {index.size} bytes, the limit is {limit}")
        buffer = memoryview(bytearray(index.size))
        for number, expected in enumerate(index.chunks):
            chunk = await self.store.chunk(address, number)
            if chunk is None:
                return None
            if blake3(chunk).digest() != expected:
                log.warning("a blob is damaged in the local store", address=address.hex())
                return None
            buffer[number * CHUNK_BYTES : number * CHUNK_BYTES + len(chunk)] = chunk
        return buffer

    async def _serve(self, sender: str, data: bytes) -> Buffer:
        want = decode_want(data)
        index = await self.store.index(want.address) if self._may_have(sender, want.address) else None
        if index is None:
            raise Refused(ABSENT)
        if isinstance(want, WantIndex):
            only = await self.store.chunk(want.address, 0) if len(index.chunks) == 1 else b""
            return _encoder.encode(IndexReply(index, bytes(only or b"")))
        if want.number + want.count > len(index.chunks):
            raise Refused(ABSENT)
        chunks = await self.store.chunk(want.address, want.number, want.count)
        if chunks is None:
            raise Refused(ABSENT)
        return chunks


class _Transfer:
    """One blob on its way here: its index, who may have it, and what each provider did wrong."""

    def __init__(
        self, requests: Requests, limits: PeerLimits, address: bytes, providers: Sequence[str], limit: int
    ) -> None:
        self._requests = requests
        self._limits = limits
        self._address = address
        self._providers = list(dict.fromkeys(providers))
        self._limit = limit
        self._faults: Counter[str] = Counter()
        self._delays: Counter[str] = Counter()
        self._lacks: Counter[str] = Counter()
        self._complaints: dict[str, str] = {}
        self._index = BlobIndex(0, ())
        self._first: bytes | None = None

    async def find(self) -> BlobIndex:
        """Return the index that hashes to the address."""
        size_limit = min(self._limit, MAX_BLOB_BYTES)
        reply_limit = 1024 + CHUNK_BYTES + _INDEX_BYTES_PER_CHUNK * (size_limit // CHUNK_BYTES + 1)

        async def attempt(peer: str) -> IndexReply | None:
            reply = await self._ask(peer, WantIndex(self._address), min(reply_limit, _MAX_REPLY_BYTES))
            answer = None if reply is None else self._decoded(reply)
            if reply is not None and answer is None:
                self._blame(peer)
            return answer

        answer = await self._first_of(self._providers, attempt)
        if answer is None:
            raise self._unavailable()
        if answer.index.size > self._limit:
            raise BlobUnavailable(f"{self._address.hex()} has {answer.index.size} bytes, over {self._limit}")
        self._index, self._first = answer.index, answer.chunk or None
        return answer.index

    def _decoded(self, reply: bytes) -> IndexReply | None:
        try:
            answer = _index_decoder.decode(reply)
        except (msgspec.DecodeError, RecursionError):
            return None
        index = answer.index
        is_true = index.address() == self._address and len(index.chunks) == -(-index.size // CHUNK_BYTES)
        return answer if is_true else None

    async def _first_of(self, peers: Sequence[str], attempt: Callable[[str], Awaitable[T | None]]) -> T | None:
        """Return what the first peer gives, asked one after the other; who is slow is not waited for alone."""
        found: list[T] = []
        async with trio.open_nursery() as nursery:

            async def one(peer: str, ended: trio.Event) -> None:
                result = await attempt(peer)
                if result is not None:
                    found.append(result)
                    nursery.cancel_scope.cancel()
                ended.set()

            for peer in peers:
                ended = trio.Event()
                nursery.start_soon(one, peer, ended)
                with trio.move_on_after(_PATIENCE_SECONDS) as waiting:
                    await ended.wait()
                self._delays[peer] += waiting.cancelled_caught
        return found[0] if found else None

    async def run(self, missing: set[int], keep: Keep) -> None:
        """Fetch the chunks `missing` and hand each, verified, to `keep`."""
        if self._first is not None and 0 in missing and self._are_true(range(1), self._first):
            await keep(0, self._first)
            missing.discard(0)
        queue = sorted(missing, reverse=True)
        failed: list[BlobUnavailable] = []

        async def work(lane: int) -> None:
            while queue and not failed:
                try:
                    await self._take(_next_span(queue), lane, keep)
                except BlobUnavailable as error:
                    failed.append(error)

        async with trio.open_nursery() as nursery:
            for lane in range(min(_PARALLEL, len(queue))):
                nursery.start_soon(work, lane)
        if failed:
            raise failed[0]

    async def _take(self, span: range, lane: int, keep: Keep) -> None:
        """Fetch chunks that follow each other, each alone if nobody has them all; raise `BlobUnavailable`."""
        data = await self._part(span, lane)
        parts = [span] if data is not None else [range(number, number + 1) for number in span]
        for part in parts:
            found = data or await self._part(part, lane)
            if found is None:
                raise self._unavailable()
            view = memoryview(found)
            for number in part:
                start = (number - part.start) * CHUNK_BYTES
                await keep(number, view[start : start + CHUNK_BYTES])

    async def _part(self, span: range, lane: int) -> bytes | None:
        """Return verified chunks, from the least faulty, slow and empty provider first; lanes spread over equals."""
        order = sorted(
            range(len(self._providers)),
            key=lambda i: (*self._record(self._providers[i]), (i - lane) % len(self._providers)),
        )
        want = WantChunk(self._address, span.start, len(span))

        async def attempt(peer: str) -> bytes | None:
            if self._faults[peer] >= 3:
                return None
            data = await self._ask(peer, want, len(span) * CHUNK_BYTES)
            if data is None or self._are_true(span, data):
                return data
            self._blame(peer)
            return None

        return await self._first_of([self._providers[i] for i in order], attempt)

    def _record(self, peer: str) -> tuple[int, int, int]:
        # a provider that lacks one chunk may have the others, yet who has had all is asked before
        return self._faults[peer], self._delays[peer], self._lacks[peer]

    def _are_true(self, span: range, data: bytes) -> bool:
        """Whether these are the bytes of the chunks of a span, which only the last may be shorter than others."""
        size = min(span.stop * CHUNK_BYTES, self._index.size) - span.start * CHUNK_BYTES
        if len(data) != size:
            return False
        view, first = memoryview(data), span.start
        parts = (view[(number - first) * CHUNK_BYTES :][:CHUNK_BYTES] for number in span)
        return all(
            blake3(part).digest() == self._index.chunks[number] for number, part in zip(span, parts, strict=True)
        )

    async def _ask(self, peer: str, want: WantIndex | WantChunk, limit: int) -> bytes | None:
        try:
            return await self._requests.ask(peer, PROTOCOL, _encoder.encode(want), limit=limit, timeout=_SECONDS)
        except RequestFailed as error:
            self._faults[peer] += error.reason not in (ABSENT, RequestReason.BUSY)
            self._lacks[peer] += error.reason == ABSENT
            self._complaints[peer] = error.reason
            return None

    def _blame(self, peer: str) -> None:
        """A provider that sent bytes of another hash is not asked again."""
        self._faults[peer] += 3
        self._complaints[peer] = "false bytes"
        self._limits.charge(peer, Offence.FALSE_BLOB)
        log.info("false blob bytes", peer=peer, address=self._address.hex())

    def _unavailable(self) -> BlobUnavailable:
        told = ", ".join(f"{peer}: {reason}" for peer, reason in self._complaints.items())
        return BlobUnavailable(f"{self._address.hex()} has no provider left ({told or 'none was named'})")


def _next_span(queue: list[int]) -> range:
    """Take the next chunks that follow each other off the end of a queue, smallest last."""
    first = last = queue.pop()
    while queue and queue[-1] == last + 1 and last + 1 - first < MAX_SPAN:
        last = queue.pop()
    return range(first, last + 1)


def _missing_chunks(part: Path, index: BlobIndex) -> set[int]:
    """Return the chunks that an earlier attempt did not leave whole in `part`."""
    missing = set(range(len(index.chunks)))
    if part.exists():
        with part.open("rb") as file:
            for number, expected in enumerate(index.chunks):
                if blake3(file.read(CHUNK_BYTES)).digest() == expected:
                    missing.discard(number)
    return missing


def _write_at(part: Path, offset: int, chunk: Buffer) -> None:
    part.touch()
    try:
        with part.open("r+b") as file:
            file.seek(offset)
            file.write(chunk)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(part.parent) from None
        raise
