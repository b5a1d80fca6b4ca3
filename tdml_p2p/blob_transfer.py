"""One blob on its way here: what is asked of its providers, and chunks verified as they come."""

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, TypeVar

import msgspec
import structlog
import trio
from blake3 import blake3

from tdml_p2p.limits import Offence, PeerLimits
from tdml_p2p.requests import Reply, RequestFailed, RequestReason, Requests
from trainer.content import CHUNK_BYTES, MAX_BLOB_BYTES, Address, BlobIndex

log = structlog.get_logger(__name__)

PROTOCOL = "/tdml/blob/3"
_MAX_REPLY_BYTES = 4 << 20
_INDEX_BYTES_PER_CHUNK = 40
_MAX_CHUNKS = MAX_BLOB_BYTES // CHUNK_BYTES
_SECONDS = 30.0
"""How long a chunk, or an index, may take."""
_PATIENCE_SECONDS = 3.0
"""How long one provider may give nothing; then another one is asked as well."""
_BUSY_SECONDS = 0.1
"""The pause before a provider is asked again that has too much on its way to this peer."""
_PARALLEL = 3
MAX_SPAN = 8
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


def encode_index(reply: IndexReply) -> bytes:
    """Return the reply's bytes."""
    return _encoder.encode(reply)


def decode_want(data: bytes) -> WantIndex | WantChunk:
    """Return the request that `data` encodes; raise `ValueError`."""
    try:
        return _want_decoder.decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError(str(error)) from None


class Transfer:
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

        answer = await self._first_of(self._providers, attempt, lambda: 0)
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

    async def _first_of(
        self, peers: Sequence[str], attempt: Callable[[str], Awaitable[T | None]], progress: Callable[[], int]
    ) -> T | None:
        """Return what the first peer gives, asked one after the other; who gives nothing is not waited for alone."""
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
                self._delays[peer] += await _is_stuck(ended, progress)
        return found[0] if found else None

    async def run(self, missing: set[int], keep: Keep) -> None:
        """Fetch the chunks `missing` and hand each, verified, to `keep`."""
        if self._first is not None and 0 in missing and self._is_true(0, self._first):
            await keep(0, self._first)
            missing.discard(0)
        queue = sorted(missing, reverse=True)
        lanes = min(_PARALLEL, len(queue))
        size = min(MAX_SPAN, -(-len(queue) // lanes)) if lanes else 0
        failed: list[BlobUnavailable] = []

        async def work(lane: int) -> None:
            while queue and not failed:
                try:
                    await self._take(_next_span(queue, size), lane, keep)
                except BlobUnavailable as error:
                    failed.append(error)

        async with trio.open_nursery() as nursery:
            for lane in range(lanes):
                nursery.start_soon(work, lane)
        if failed:
            raise failed[0]

    async def _take(self, span: "_Span", lane: int, keep: Keep) -> None:
        """Fetch chunks that follow each other, one alone where nobody has them all; raise `BlobUnavailable`."""
        while not span.is_done:
            start = span.next
            await self._ask_all(span, lane, keep)
            if span.next == start:
                single = _Span(start, start + 1)
                if span.stop > single.stop:
                    await self._ask_all(single, lane, keep)
                if not single.is_done:
                    raise self._unavailable()
                span.next = single.next

    async def _ask_all(self, span: "_Span", lane: int, keep: Keep) -> None:
        """Fetch a span from the least faulty, slow and empty provider first; lanes spread over equals."""
        order = sorted(
            range(len(self._providers)),
            key=lambda i: (*self._record(self._providers[i]), (i - lane) % len(self._providers)),
        )

        async def attempt(peer: str) -> bool | None:
            if self._faults[peer] < 3:
                await self._read_span(peer, span, keep)
            return span.is_done or None

        await self._first_of([self._providers[i] for i in order], attempt, lambda: span.next)

    async def _read_span(self, peer: str, span: "_Span", keep: Keep) -> None:
        """Keep, one after the other, the verified chunks of a span that are still wanted when this peer gives them."""
        start = span.next
        want = WantChunk(self._address, start, span.stop - start)
        size = min(span.stop * CHUNK_BYTES, self._index.size) - start * CHUNK_BYTES
        try:
            with trio.fail_after(_SECONDS) as scope:
                async with self._reply(peer, want, size) as reply:
                    for number in range(start, span.stop):
                        rest = size - (number - start) * CHUNK_BYTES
                        chunk = await reply.read(min(CHUNK_BYTES, rest)) if reply.size == size else b""
                        if not self._is_true(number, chunk):
                            self._blame(peer)
                            return
                        if number == span.next:  # who was asked later may have been faster
                            span.next += 1
                            await keep(number, chunk)
                        scope.deadline = trio.current_time() + _SECONDS
        except trio.TooSlowError:
            self._note_failure(peer, RequestReason.TIMEOUT, span.next > start)
        except RequestFailed as error:
            self._note_failure(peer, error.reason, span.next > start)

    @asynccontextmanager
    async def _reply(self, peer: str, want: WantChunk, size: int) -> AsyncIterator[Reply]:
        """Ask for chunks; for a single one until the peer has room for it beside what is on its way."""
        request = _encoder.encode(want)
        async with AsyncExitStack() as stack:
            while True:
                try:
                    reply = await stack.enter_async_context(self._requests.reply(peer, PROTOCOL, request, size))
                    break
                except RequestFailed as error:
                    if error.reason != RequestReason.BUSY or want.count > 1:
                        raise
                    await trio.sleep(_BUSY_SECONDS)
            yield reply

    def _record(self, peer: str) -> tuple[int, int, int]:
        # a provider that lacks one chunk may have the others, yet who has had all is asked before
        return self._faults[peer], self._delays[peer], self._lacks[peer]

    def _is_true(self, number: int, data: bytes) -> bool:
        return blake3(data).digest() == self._index.chunks[number]

    async def _ask(self, peer: str, want: WantIndex, limit: int) -> bytes | None:
        try:
            return await self._requests.ask(peer, PROTOCOL, _encoder.encode(want), limit=limit, timeout=_SECONDS)
        except RequestFailed as error:
            self._note_failure(peer, error.reason, gave_some=False)
            return None

    def _note_failure(self, peer: str, reason: str, gave_some: bool) -> None:
        self._faults[peer] += not gave_some and reason not in (ABSENT, RequestReason.BUSY)
        self._lacks[peer] += reason == ABSENT
        self._complaints[peer] = reason

    def _blame(self, peer: str) -> None:
        """A provider that sent bytes of another hash is not asked again."""
        self._faults[peer] += 3
        self._complaints[peer] = "false bytes"
        self._limits.charge(peer, Offence.FALSE_BLOB)
        log.info("false blob bytes", peer=peer, address=self._address.hex())

    def _unavailable(self) -> BlobUnavailable:
        told = ", ".join(f"{peer}: {reason}" for peer, reason in self._complaints.items())
        return BlobUnavailable(f"{self._address.hex()} has no provider left ({told or 'none was named'})")


@dataclass
class _Span:
    """Chunks that follow each other, of which `next` is the first that is not here."""

    next: int
    stop: int

    @property
    def is_done(self) -> bool:
        return self.next >= self.stop


def _next_span(queue: list[int], size: int) -> _Span:
    """Take the next chunks that follow each other off the end of a queue, smallest last."""
    first = last = queue.pop()
    while queue and queue[-1] == last + 1 and last + 1 - first < size:
        last = queue.pop()
    return _Span(first, last + 1)


async def _is_stuck(ended: trio.Event, progress: Callable[[], int]) -> bool:
    """Wait until something has ended, or makes no progress any more."""
    while True:
        before = progress()
        with trio.move_on_after(_PATIENCE_SECONDS) as waiting:
            await ended.wait()
        if not waiting.cancelled_caught:
            return False
        if progress() == before:
            return True
