"""Yamux with the repairs that a long-lived daemon needs.

The stock multiplexer of libp2p 0.8.1 is unsafe here: a task cancelled while it writes leaves the Noise
nonce ahead of what was sent, so the connection dies; its reader writes answers itself, so two peers that
send at full rate stop each other for good; a reset forgets the event that a reader waits for; a writer
gives up after five seconds without window; a peer that ignores the window fills memory; and its reader
goes on behind a broken frame. Below, one task per connection reads, one writes from a bounded queue, and
whatever breaks the rules of the Yamux specification ends the connection.
"""

import struct
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import structlog
import trio
from libp2p.io.exceptions import ConnectionClosedError, IOException
from libp2p.stream_muxer.exceptions import MuxedStreamError
from libp2p.stream_muxer.muxer_multistream import MuxerMultistream
from libp2p.stream_muxer.yamux.yamux import (
    FLAG_ACK,
    FLAG_FIN,
    FLAG_RST,
    FLAG_SYN,
    HEADER_SIZE,
    MAX_WINDOW_SIZE,
    PROTOCOL_ID,
    TYPE_DATA,
    TYPE_GO_AWAY,
    TYPE_PING,
    TYPE_WINDOW_UPDATE,
    YAMUX_HEADER_FORMAT,
    Yamux,
    YamuxStream,
)

from tdml_p2p.batched_noise import batch
from tdml_p2p.streams import shielded

log = structlog.get_logger(__name__)

WRITE_STALL_SECONDS = 20.0
WINDOW_STALL_SECONDS = 60.0
MAX_BUFFERED_BYTES = 96 << 20
"""Bytes of unread stream data of one connection."""
_FRAME_BYTES = 65_519 - 12
_FRAMES_AT_ONCE = 4
"""What is queued together: a turn of the event loop for each frame would cost more than its cipher."""
_QUEUED_BYTES = 512 * 1024
_MAX_ANSWER_BYTES = 4 << 20
_BATCH_BYTES = 256 * 1024
_FAREWELL_SECONDS = 0.5
_LOOK_AGAIN_SECONDS = 0.25
_BODY_SECONDS = 60.0


class _Violation(IOException):
    """The peer broke the multiplexer's rules, or ended the connection by them."""


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
            size = min(self._window, _FRAMES_AT_ONCE * _FRAME_BYTES, len(view) - start)
            self._window -= size
            parts = list[bytes | memoryview]()
            for first in range(start, start + size, _FRAME_BYTES):
                part = view[first : min(first + _FRAME_BYTES, start + size)]
                parts += [struct.pack(YAMUX_HEADER_FORMAT, 0, TYPE_DATA, 0, self.stream_id, len(part)), part]
            await self.conn._write_frame(b"".join(parts))
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
        self._inbox = bytearray()
        self._rtt: float = 0.0
        self._reader: trio.lowlevel.Task | None = None

    async def start(self) -> None:
        """Read and write frames until the connection ends."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._write_queue)
            await super().start()
            nursery.cancel_scope.cancel()

    async def handle_incoming(self) -> None:
        """Read frames to the end of the connection; what the reader answers is queued, never waited for."""
        self._reader = trio.lowlevel.current_task()
        try:
            while not self.event_shutting_down.is_set():
                await self._take_frame()
        except (IOException, OSError, trio.ClosedResourceError, trio.BrokenResourceError, trio.TooSlowError) as error:
            log.debug("connection ended", peer=str(self.peer_id), reason=f"{type(error).__name__}: {error}")
        except Exception:
            # A fault of one connection must not end the peer.
            log.exception("a connection's reader failed", peer=str(self.peer_id))
        finally:
            await self._cleanup_on_error()

    async def _take_frame(self) -> None:
        version, kind, flags, stream_id, length = struct.unpack(YAMUX_HEADER_FORMAT, await self._take(HEADER_SIZE))
        if version != 0 or kind > TYPE_GO_AWAY:
            raise _Violation(f"frame of version {version} and type {kind}")
        if kind == TYPE_GO_AWAY:
            raise _Violation("the peer said goodbye")
        if kind == TYPE_PING:
            await self._on_ping(flags, length)
            return
        if flags & FLAG_SYN:
            await self._on_syn(stream_id)
        stream = self.streams.get(stream_id)
        if kind == TYPE_DATA:
            await self._on_data(stream, length)
        elif stream is not None:
            stream.send_window += length
        if stream is not None and flags & (FLAG_FIN | FLAG_RST):
            self._on_end(stream, bool(flags & FLAG_RST))

    async def _on_ping(self, flags: int, number: int) -> None:
        if flags & FLAG_SYN:
            await self._write_frame(struct.pack(YAMUX_HEADER_FORMAT, 0, TYPE_PING, FLAG_ACK, 0, number))
        elif flags & FLAG_ACK:
            measured = trio.current_time() - self._ping_sent_time
            self._rtt = (self._rtt + measured) / 2 if self._rtt else measured
            self._ping_event.set()

    async def _on_syn(self, stream_id: int) -> None:
        if stream_id == 0 or stream_id % 2 == self.next_stream_id % 2 or stream_id in self.streams:
            raise _Violation(f"stream {stream_id} cannot be opened by the peer")
        stream = YamuxStream(stream_id, self, False)
        self.streams[stream_id] = stream
        self.stream_buffers[stream_id] = bytearray()
        self.stream_events[stream_id] = trio.Event()
        await self._write_frame(struct.pack(YAMUX_HEADER_FORMAT, 0, TYPE_WINDOW_UPDATE, FLAG_ACK, stream_id, 0))
        await self.new_stream_send_channel.send(stream)

    async def _on_data(self, stream: YamuxStream | None, length: int) -> None:
        if length > (MAX_WINDOW_SIZE if stream is None else stream.recv_window):
            raise _Violation("the peer ignores the receive window")
        if length + sum(map(len, self.stream_buffers.values())) > MAX_BUFFERED_BYTES:
            raise _Violation("too much unread data")
        if len(self._inbox) < length:
            with trio.fail_after(_BODY_SECONDS):
                await self._fill(length)
        buffer = self.stream_buffers.get(stream.stream_id) if stream else None
        if stream is None or buffer is None:
            del self._inbox[:length]
            return  # the rest of a stream that was closed here
        stream.recv_window -= length
        with memoryview(self._inbox) as inbox, inbox[:length] as data:
            buffer += data
        del self._inbox[:length]
        self.stream_events[stream.stream_id].set()

    def _on_end(self, stream: YamuxStream, is_reset: bool) -> None:
        stream.recv_closed = True
        stream.reset_received = stream.reset_received or is_reset
        stream.closed = is_reset or stream.send_closed
        waiting = self.stream_events.get(stream.stream_id)
        if waiting is not None:
            waiting.set()
        if stream.closed:
            self._finalize_stream_locked(stream, fully_closed=True)

    async def _take(self, count: int) -> bytes:
        """Return the next `count` bytes of the connection."""
        await self._fill(count)
        taken = bytes(self._inbox[:count])
        del self._inbox[:count]
        return taken

    async def _fill(self, count: int) -> None:
        """Wait until `count` bytes of the connection are here."""
        while len(self._inbox) < count:
            data = await self.secured_conn.read(None)
            if not data:
                raise ConnectionClosedError("the peer closed the connection", transport="tcp")
            self._inbox += data

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


class Muxers(MuxerMultistream):
    """The choice of one: Yamux, in the form above."""

    def __init__(self, timeout: int) -> None:
        super().__init__({PROTOCOL_ID: Muxer}, timeout)

    async def new_conn(self, conn: Any, peer_id: Any) -> Any:
        """Return the multiplexed connection over a secured one."""
        protocol, _ = await self._selector.select(conn, conn.is_initiator, self.negotiate_timeout)
        batch(conn)
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
