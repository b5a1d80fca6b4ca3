"""Exact reads, bounded writes and safe endings on libp2p streams."""

from typing import Any

import trio
from libp2p.io.exceptions import IOException
from libp2p.network.stream.exceptions import StreamError

WRITE_BYTES = 512 * 1024
READ_BYTES = 1 << 20
_GOODBYE_SECONDS = 1.0

STREAM_ERRORS = (StreamError, IOException, trio.ClosedResourceError, trio.BrokenResourceError)


class StreamEnded(Exception):
    """The stream closed, was reset, or its connection died before the expected bytes came."""


class Reader:
    """Exact reads of a long-lived stream, few of which reach the stream itself."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._ahead = memoryview(b"")

    async def exactly(self, count: int) -> bytes:
        """Return exactly `count` bytes; raise `StreamEnded`. The caller has bounded `count`."""
        if len(self._ahead) >= count:
            piece, self._ahead = bytes(self._ahead[:count]), self._ahead[count:]
            return piece
        buffer = bytearray(count)
        await self.into(memoryview(buffer))
        return bytes(buffer)

    async def into(self, view: memoryview) -> None:
        """Fill `view`; raise `StreamEnded`."""
        done = 0
        while done < len(view):
            if not self._ahead:
                self._ahead = memoryview(await read_some(self._stream, READ_BYTES))
            size = min(len(self._ahead), len(view) - done)
            view[done : done + size] = self._ahead[:size]
            self._ahead = self._ahead[size:]
            done += size


async def read_exactly(stream: Any, count: int) -> bytes:
    """Return exactly `count` bytes; raise `StreamEnded`. The caller has bounded `count`."""
    if count == 0:
        return b""
    pieces, missing = list[bytes](), count
    while missing:
        pieces.append(await read_some(stream, missing))
        missing -= len(pieces[-1])
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


async def read_some(stream: Any, limit: int) -> bytes:
    """Return between 1 and `limit` bytes; raise `StreamEnded`."""
    try:
        piece: bytes = await stream.read(limit)
    except STREAM_ERRORS as error:
        raise StreamEnded(str(error) or type(error).__name__) from None
    if not piece:
        raise StreamEnded("end of stream")
    return piece


async def write(stream: Any, data: bytes | memoryview) -> None:
    """Write all of `data`; raise `StreamEnded`."""
    try:
        await stream.write(data)
    except STREAM_ERRORS as error:
        raise StreamEnded(str(error) or type(error).__name__) from None


def shielded(seconds: float) -> trio.CancelScope:
    """Return a scope for what must still be done when the caller is cancelled, for `seconds` at most."""
    scope = trio.move_on_after(seconds)
    scope.shield = True
    return scope


async def abandon(stream: Any) -> None:
    """Reset a stream that cannot be used any more, also inside a cancelled scope."""
    with shielded(_GOODBYE_SECONDS):
        try:
            await stream.reset()
        except STREAM_ERRORS:
            return


async def finish(stream: Any) -> None:
    """Close a stream after its last byte, also inside a cancelled scope."""
    with shielded(_GOODBYE_SECONDS):
        try:
            await stream.close()
        except STREAM_ERRORS:
            return
