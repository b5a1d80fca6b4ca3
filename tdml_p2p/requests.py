"""Requests and replies: one stream each, 4-byte lengths, limits of size, time and number, named refusals.

A request is `length, bytes`; a reply is `status, length, bytes`, where a status other than 0 makes the
bytes the refusal's name.
"""

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import structlog
import trio
from libp2p.exceptions import BaseLibp2pError
from libp2p.peer.id import ID

from tdml_p2p.limits import Offence, PeerLimits
from tdml_p2p.streams import StreamEnded, abandon, finish, read_exactly, write

log = structlog.get_logger(__name__)

Handler = Callable[[str, bytes], Awaitable[bytes | memoryview]]

READ_SECONDS = 10.0
SERVE_SECONDS = 60.0
MAX_REASON_BYTES = 256
MAX_FLYING_BYTES = 128 << 20
MAX_FLYING_BYTES_OF_ONE = 32 << 20
"""Reply bytes that wait to be read: of all peers, and of one."""
ALWAYS_BYTES = 4 << 20
"""Reply bytes that may wait to be read by one peer, whatever waits for others."""
_OK, _REFUSED = 0, 1
_JOINED_BYTES = 60 * 1024
"""Of a reply, what is copied beside its length, to go in one frame with it."""


class RequestReason(StrEnum):
    """Why a request got no answer."""

    UNREACHABLE = "unreachable"
    TIMEOUT = "timeout"
    BROKEN = "broken"
    REPLY_TOO_LARGE = "reply-too-large"
    REQUEST_TOO_LARGE = "request-too-large"
    TOO_MANY = "too-many-requests"
    BUSY = "busy"
    MALFORMED = "malformed"
    INTERNAL = "internal-error"


class RequestFailed(Exception):
    """No answer: `peer`, and `reason`, a `RequestReason` or the name that the peer refused with."""

    def __init__(self, peer: str, reason: str) -> None:
        super().__init__(f"{peer}: {reason}")
        self.peer = peer
        self.reason = reason


class Refused(Exception):
    """Raised by a handler to answer with a named refusal."""


@dataclass(frozen=True)
class _Served:
    handler: Handler
    limit: int


class Requests:
    """Both sides of every request protocol of one host."""

    def __init__(self, host: Any, limits: PeerLimits) -> None:
        self.refused: Counter[str] = Counter()
        self._host = host
        self._limits = limits
        self._served: dict[str, _Served] = {}
        self._running: Counter[str] = Counter()
        self.flying: Counter[str] = Counter()
        """Reply bytes on their way, by peer."""

    def serve(self, protocol: str, handler: Handler, limit: int) -> None:
        """Answer requests of up to `limit` bytes with what `handler(sender, data)` returns."""
        self._served[protocol] = _Served(handler, limit)

        async def accept(stream: Any) -> None:
            await self._accept(protocol, stream)

        self._host.set_stream_handler(protocol, accept)

    async def ask(self, peer: str, protocol: str, data: bytes, *, limit: int, timeout: float) -> bytes:
        """Return the peer's reply of up to `limit` bytes; raise `RequestFailed`."""
        try:
            with trio.fail_after(timeout):
                async with self.reply(peer, protocol, data, limit) as reply:
                    return await reply.read(reply.size)
        except trio.TooSlowError:
            raise RequestFailed(peer, RequestReason.TIMEOUT) from None

    @asynccontextmanager
    async def reply(self, peer: str, protocol: str, data: bytes, limit: int) -> AsyncIterator["Reply"]:
        """Give a reply of up to `limit` bytes, to be read in parts in the caller's time; raise `RequestFailed`."""
        stream = await self._open(peer, protocol)
        reply = Reply(peer, stream)
        try:
            await reply.begin(data, limit)
            yield reply
        finally:
            await (finish(stream) if reply.is_read else abandon(stream))

    async def _open(self, peer: str, protocol: str) -> Any:
        try:
            return await self._host.new_stream(ID.from_string(peer), [protocol])
        except (BaseLibp2pError, OSError, ValueError):
            raise RequestFailed(peer, RequestReason.UNREACHABLE) from None

    async def _accept(self, protocol: str, stream: Any) -> None:
        sender = str(stream.muxed_conn.peer_id)
        reason = self._admission(sender)
        if reason is not None:
            self.refused[reason] += 1
            await _answer(stream, _REFUSED, reason.encode())
            return
        self._running[sender] += 1
        try:
            await self._serve(self._served[protocol], sender, stream)
        finally:
            self._running[sender] -= 1
            if not self._running[sender]:
                del self._running[sender]

    def _admission(self, sender: str) -> RequestReason | None:
        if not self._limits.allows_request(sender):
            return RequestReason.TOO_MANY
        if self._running[sender] >= self._limits.config.concurrent_requests:
            return RequestReason.BUSY
        return None

    async def _serve(self, served: _Served, sender: str, stream: Any) -> None:
        try:
            with trio.fail_after(READ_SECONDS):
                length = int.from_bytes(await read_exactly(stream, 4), "big")
                data = await read_exactly(stream, length) if length <= served.limit else None
        except (trio.TooSlowError, StreamEnded):
            self.refused[RequestReason.BROKEN] += 1
            await abandon(stream)
            return
        if data is None:
            self.refused[RequestReason.REQUEST_TOO_LARGE] += 1
            self._limits.charge(sender, Offence.INVALID_MESSAGE)
            await _answer(stream, _REFUSED, RequestReason.REQUEST_TOO_LARGE.encode())
            return
        status, answer = await self._run_handler(served.handler, sender, data)
        if not self._has_room(sender, len(answer)):
            self.refused[RequestReason.BUSY] += 1
            status, answer = _REFUSED, RequestReason.BUSY.encode()
        self.flying[sender] += len(answer)
        try:
            await _answer(stream, status, answer)
        finally:
            self.flying[sender] -= len(answer)
            if not self.flying[sender]:
                del self.flying[sender]

    def _has_room(self, sender: str, size: int) -> bool:
        """Whether a reply may wait to be read: a peer that does not read keeps no other from its answers."""
        before, after = self.flying[sender], self.flying[sender] + size
        fits_own = not before or after <= MAX_FLYING_BYTES_OF_ONE
        return fits_own and (after <= ALWAYS_BYTES or self.flying.total() + size <= MAX_FLYING_BYTES)

    async def _run_handler(self, handler: Handler, sender: str, data: bytes) -> tuple[int, bytes | memoryview]:
        try:
            with trio.fail_after(SERVE_SECONDS):
                return _OK, await handler(sender, data)
        except trio.TooSlowError:
            reason: str = RequestReason.TIMEOUT
        except Refused as refusal:
            reason = str(refusal)
        except ValueError as error:
            reason = f"{RequestReason.MALFORMED}: {error}"
        except Exception:
            # One request must not stop the peer; the fault is logged with its traceback.
            log.exception("a request handler failed", sender=sender)
            reason = RequestReason.INTERNAL
        self.refused[reason.partition(":")[0][:64]] += 1
        return _REFUSED, reason.encode()[:MAX_REASON_BYTES]


class Reply:
    """A peer's answer on its way: `size` bytes, of which the rest is yet to be read."""

    def __init__(self, peer: str, stream: Any) -> None:
        self.size = 0
        self._peer = peer
        self._stream = stream
        self._rest: int | None = None

    @property
    def is_read(self) -> bool:
        """Whether nothing more comes."""
        return self._rest == 0

    async def begin(self, data: bytes, limit: int) -> None:
        """Send the request and read the length of the answer; raise `RequestFailed`, also with the peer's refusal."""
        try:
            await write(self._stream, len(data).to_bytes(4, "big") + data)
            status, *length = await read_exactly(self._stream, 5)
        except StreamEnded:
            raise RequestFailed(self._peer, RequestReason.BROKEN) from None
        size = int.from_bytes(bytes(length), "big")
        if size > (limit if status == _OK else MAX_REASON_BYTES):
            raise RequestFailed(self._peer, RequestReason.REPLY_TOO_LARGE)
        self.size = self._rest = size
        if status != _OK:
            raise RequestFailed(self._peer, (await self.read(size)).decode("utf-8", "replace"))

    async def read(self, count: int) -> bytes:
        """Return the next `count` bytes; raise `RequestFailed` when they do not come, `ValueError` beyond the end."""
        if self._rest is None or count > self._rest:
            raise ValueError(f"{count} bytes are more than is left of the reply")
        try:
            data = await read_exactly(self._stream, count)
        except StreamEnded:
            raise RequestFailed(self._peer, RequestReason.BROKEN) from None
        self._rest -= count
        return data


async def _answer(stream: Any, status: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    try:
        with trio.fail_after(SERVE_SECONDS):
            head = bytes([status]) + len(view).to_bytes(4, "big")
            await write(stream, head + bytes(view[:_JOINED_BYTES]))
            if len(view) > _JOINED_BYTES:
                await write(stream, view[_JOINED_BYTES:])
    except (trio.TooSlowError, StreamEnded):
        await abandon(stream)
        return
    await finish(stream)
