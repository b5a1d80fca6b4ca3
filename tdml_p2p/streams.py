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


async def read_into(stream: Any, view: memoryview) -> None:
    """Fill `view` from `stream`; raise `StreamEnded`."""
    done = 0
    while done < len(view):
        piece = await read_some(stream, min(len(view) - done, READ_BYTES))
        view[done : done + len(piece)] = piece
        done += len(piece)


async def read_exactly(stream: Any, count: int) -> bytes:
    """Return exactly `count` bytes; raise `StreamEnded`. The caller has bounded `count`."""
    if count == 0:
        return b""
    piece = await read_some(stream, count)
    if len(piece) == count:
        return piece
    buffer = bytearray(count)
    buffer[: len(piece)] = piece
    await read_into(stream, memoryview(buffer)[len(piece) :])
    return bytes(buffer)


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
