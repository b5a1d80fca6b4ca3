"""Yamux with the repairs that a long-lived daemon needs.

Three properties of libp2p 0.8.1 make the stock multiplexer unsafe here: a task cancelled while it writes
leaves the Noise nonce ahead of what was sent, so the whole connection dies; a local reset forgets the
event that a reader waits for, so that reader never wakes; and a peer that ignores the receive window
fills memory. Each override below closes one of them.
"""

from collections.abc import Awaitable, Callable
from typing import Any

import trio
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.stream_muxer.muxer_multistream import MuxerMultistream
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID, Yamux

from tdml_p2p.streams import shielded

WRITE_STALL_SECONDS = 20.0
MAX_BUFFERED_BYTES = 96 << 20
"""Bytes of unread stream data of one connection."""


class Muxer(Yamux):
    """A Yamux connection whose writes are never torn, whose resets wake readers, and whose memory is bounded."""

    async def _write_frame(self, data: bytes) -> None:
        with shielded(WRITE_STALL_SECONDS) as stalled:
            async with self._write_lock:
                await self.secured_conn.write(data)
        if stalled.cancelled_caught:
            with shielded(WRITE_STALL_SECONDS):
                await self._cleanup_on_error()
            raise ConnectionClosedError("the peer took no data", transport="tcp")
        await trio.lowlevel.checkpoint()

    def _finalize_stream_locked(self, stream: Any, *, fully_closed: bool) -> None:
        waiting = self.stream_events.get(stream.stream_id)
        super()._finalize_stream_locked(stream, fully_closed=fully_closed)
        if waiting is not None and fully_closed:
            waiting.set()

    async def _read_data_body(self, length: int) -> bytes:
        if length + sum(map(len, self.stream_buffers.values())) > MAX_BUFFERED_BYTES:
            raise ConnectionClosedError("the peer ignores the receive window", transport="tcp")
        body: bytes = await super()._read_data_body(length)
        return body


class Muxers(MuxerMultistream):
    """The choice of one: Yamux, in the form above."""

    def __init__(self, timeout: int) -> None:
        super().__init__({PROTOCOL_ID: Muxer}, timeout)

    async def new_conn(self, conn: Any, peer_id: Any) -> Any:
        """Return the multiplexed connection over a secured one."""
        protocol, _ = await self._selector.select(conn, conn.is_initiator, self.negotiate_timeout)
        muxer = Muxer(conn, peer_id, is_initiator=conn.is_initiator, on_close=_nothing)
        return self._annotate_connection(muxer, conn, protocol)


_nothing: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint
