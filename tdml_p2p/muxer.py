"""Yamux with the repairs that a long-lived daemon needs.

The stock multiplexer of libp2p 0.8.1 is unsafe here: a task cancelled while it writes leaves the Noise
nonce ahead of what was sent, so the connection dies; its reader writes answers itself, so two peers that
send at full rate stop each other for good; a reset forgets the event that a reader waits for; a writer
gives up after five seconds without window; and a peer that ignores the window fills memory. Below, one
task per connection writes, from a bounded queue.
"""

import struct
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import trio
from libp2p.io.exceptions import ConnectionClosedError, IOException
from libp2p.stream_muxer.exceptions import MuxedStreamError
from libp2p.stream_muxer.muxer_multistream import MuxerMultistream
from libp2p.stream_muxer.yamux.yamux import (
    PROTOCOL_ID,
    TYPE_DATA,
    TYPE_GO_AWAY,
    YAMUX_HEADER_FORMAT,
    Yamux,
    YamuxStream,
)

from tdml_p2p.streams import shielded

WRITE_STALL_SECONDS = 20.0
WINDOW_STALL_SECONDS = 60.0
MAX_BUFFERED_BYTES = 96 << 20
"""Bytes of unread stream data of one connection."""
_FRAME_BYTES = 64 * 1024 - 12
_QUEUED_BYTES = 512 * 1024
_MAX_ANSWER_BYTES = 4 << 20
_BATCH_BYTES = 256 * 1024
_FAREWELL_SECONDS = 0.5
_LOOK_AGAIN_SECONDS = 0.25


class Stream(YamuxStream):
    """A Yamux stream whose writer waits on the window instead of polling it, and for longer."""

    _window: int
    _window_changed: trio.Event
    _unreported: int

    @property
    def send_window(self) -> int:
        """Bytes that the receiver has room for."""
        return self._window

    @send_window.setter
    def send_window(self, value: int) -> None:
        self._window = value
        self._window_changed.set()
        self._window_changed = trio.Event()

    async def write(self, data: bytes | memoryview) -> None:
        """Write all of `data`; raise `MuxedStreamError` when the stream is closed or gets no window."""
        view = memoryview(data)
        start = 0
        while start < len(view):
            await self._wait_for_window()
            size = min(self._window, _FRAME_BYTES, len(view) - start)
            self._window -= size
            header = struct.pack(YAMUX_HEADER_FORMAT, 0, TYPE_DATA, 0, self.stream_id, size)
            await self.conn._write_frame(b"".join((header, view[start : start + size])))
            start += size

    async def _auto_tune_and_send_window_update(self, *, bytes_read: int = 0) -> None:
        """Report what was read in halves of the window; the stock one answers every small read with a frame."""
        self._unreported += bytes_read
        if self._unreported >= self.target_recv_window // 2:
            read, self._unreported = self._unreported, 0
            await super()._auto_tune_and_send_window_update(bytes_read=read)

    async def _wait_for_window(self) -> None:
        give_up_at = trio.current_time() + WINDOW_STALL_SECONDS
        while not self.closed and not self.send_closed and self._window <= 0:
            if trio.current_time() > give_up_at:
                raise MuxedStreamError("the peer reads nothing")
            with trio.move_on_after(_LOOK_AGAIN_SECONDS):
                await self._window_changed.wait()
        if self.closed or self.send_closed:
            raise MuxedStreamError("the stream is closed for sending")


class Muxer(Yamux):
    """A Yamux connection whose writes are never torn, whose resets wake readers, and whose memory is bounded."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._queue: deque[bytes] = deque()
        self._queued = 0
        self._work = trio.Event()
        self._room = trio.Event()
        self._reader: trio.lowlevel.Task | None = None

    async def start(self) -> None:
        """Read and write frames until the connection ends."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._write_queue)
            await super().start()
            nursery.cancel_scope.cancel()

    async def handle_incoming(self) -> None:
        """Read frames; what the reader itself answers is queued, never waited for."""
        self._reader = trio.lowlevel.current_task()
        await super().handle_incoming()

    async def open_stream(self) -> Any:
        """Return a new stream towards the peer."""
        return _extended(await super().open_stream())

    async def accept_stream(self) -> Any:
        """Return the next stream that the peer opened."""
        return _extended(await super().accept_stream())

    async def _write_frame(self, data: bytes) -> None:
        if trio.lowlevel.current_task() is self._reader:
            if self._queued > _MAX_ANSWER_BYTES:
                raise ConnectionClosedError("the peer reads none of the answers", transport="tcp")
        else:
            while self._queued > _QUEUED_BYTES and not self.event_shutting_down.is_set():
                await self._room.wait()
        if self.event_closed.is_set():
            raise ConnectionClosedError("the connection is closed", transport="tcp")
        self._queue.append(data)
        self._queued += len(data)
        self._work.set()
        await trio.lowlevel.checkpoint()

    async def _flush(self) -> None:
        with shielded(_FAREWELL_SECONDS):
            while self._queued and not self.event_shutting_down.is_set():
                await self._room.wait()

    async def _write_queue(self) -> None:
        try:
            while not self.event_closed.is_set():
                await self._work.wait()
                self._work = trio.Event()
                while self._queue:
                    batch = self._take_batch()
                    with trio.move_on_after(WRITE_STALL_SECONDS) as stalled:
                        await self.secured_conn.write(batch)
                    if stalled.cancelled_caught:
                        raise ConnectionClosedError("the peer takes no data", transport="tcp")
                    self._queued -= len(batch)
                    self._wake_writers()
        except (IOException, OSError, trio.ClosedResourceError, trio.BrokenResourceError):
            await self._cleanup_on_error()

    def _take_batch(self) -> bytes:
        frames = [self._queue.popleft()]
        size = len(frames[0])
        while self._queue and size + len(self._queue[0]) <= _BATCH_BYTES:
            frames.append(self._queue.popleft())
            size += len(frames[-1])
        return frames[0] if len(frames) == 1 else b"".join(frames)

    def _wake_writers(self) -> None:
        self._room.set()
        self._room = trio.Event()

    async def _cleanup_on_error(self) -> None:
        if self.event_closed.is_set():
            return
        self._queue.clear()
        self._queued = 0
        # Half a clean-up, cut off by the end of the reader, would leave waiters asleep.
        with shielded(WRITE_STALL_SECONDS):
            await super()._cleanup_on_error()
        self._wake_writers()
        self._work.set()

    async def close(self, error_code: int = 0) -> None:
        """Say goodbye if the peer still reads, then close the socket, which frees every blocked writer."""
        if not self.event_shutting_down.is_set():
            self._queue.append(struct.pack(YAMUX_HEADER_FORMAT, 0, TYPE_GO_AWAY, 0, 0, error_code))
            self._queued += len(self._queue[-1])
            self._work.set()
            await self._flush()
        await self._cleanup_on_error()

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


def _extended(stream: Any) -> Any:
    """Return the stream, which libp2p made of its own class, as one of ours."""
    if not isinstance(stream, Stream):
        stream._window = vars(stream).pop("send_window")
        stream._window_changed = trio.Event()
        stream._unreported = 0
        stream.__class__ = Stream
    return stream


_nothing: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint
