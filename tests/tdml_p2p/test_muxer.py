"""The multiplexer over a pair of sockets: saturation both ways, torn writes, resets, peers that read nothing."""

import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.peer.id import ID
from libp2p.stream_muxer.exceptions import MuxedStreamError
from libp2p.stream_muxer.yamux.yamux import YAMUX_HEADER_FORMAT

from tdml_p2p import muxer
from tdml_p2p.muxer import Muxer

PEER = ID(b"peer")


class Plain:
    """What a muxer needs of a secured connection, without encryption."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream

    async def read(self, n: int | None = None) -> bytes:
        try:
            return bytes(await self.stream.receive_some(n))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return b""

    async def write(self, data: bytes) -> None:
        try:
            await self.stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ConnectionClosedError(str(error), transport="tcp") from None

    async def close(self) -> None:
        await self.stream.aclose()


@asynccontextmanager
async def sockets() -> AsyncIterator[tuple[Plain, Plain]]:
    left, right = trio.socket.socketpair()
    with left, right:
        yield Plain(trio.SocketStream(left)), Plain(trio.SocketStream(right))


@asynccontextmanager
async def pair() -> AsyncIterator[tuple[Muxer, Muxer]]:
    async with sockets() as (left, right), trio.open_nursery() as nursery:
        ends = Muxer(left, PEER, is_initiator=True), Muxer(right, PEER, is_initiator=False)
        for end in ends:
            nursery.start_soon(end.start)
            await end.event_started.wait()
        yield ends
        for end in ends:
            await end.close()


async def joined(first: Muxer, second: Muxer) -> tuple[Any, Any]:
    """Return both ends of a new stream."""
    opened = await first.open_stream()
    return opened, await second.accept_stream()


async def read_all(stream: Any, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        data += await stream.read(count - len(data))
    return bytes(data)


async def test_full_rate_both_ways_while_streams_open() -> None:
    sent = bytes(range(256)) * (6 << 12)
    async with pair() as (first, second):
        there = await joined(first, second)
        back = await joined(second, first)
        arrived = []

        async def receive(stream: Any) -> None:
            arrived.append(await read_all(stream, len(sent)) == sent)

        async def open_and_drop(end: Muxer) -> None:
            for _ in range(40):
                await (await end.open_stream()).reset()

        async def drain(end: Muxer) -> None:
            for _ in range(40):
                await end.accept_stream()

        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                for write, read in (there, back):
                    nursery.start_soon(write.write, sent)
                    nursery.start_soon(receive, read)
                for end in (first, second):
                    nursery.start_soon(open_and_drop, end)
                    nursery.start_soon(drain, end)
        assert arrived == [True, True]


async def test_a_cancelled_write_leaves_the_connection_whole() -> None:
    async with pair() as (first, second):
        torn, _unread = await joined(first, second)
        with trio.move_on_after(0.05) as scope:
            await torn.write(bytes(8 << 20))
        assert scope.cancelled_caught
        writing, reading = await joined(first, second)
        await writing.write(b"still here")
        assert await reading.read(64) == b"still here"


async def test_a_local_reset_wakes_the_reader() -> None:
    async with pair() as (first, second):
        stream, _ = await joined(first, second)
        woken = []

        async def read() -> None:
            with pytest.raises(MuxedStreamError):
                await stream.read(1)
            woken.append(True)

        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(read)
                await trio.testing.wait_all_tasks_blocked()
                await stream.reset()
        assert woken == [True]


async def test_the_end_of_the_connection_wakes_readers_and_writers() -> None:
    async with pair() as (first, second):
        stream, _ = await joined(first, second)
        ended = []

        async def fails(action: Any, argument: Any) -> None:
            with pytest.raises((MuxedStreamError, ConnectionClosedError)):
                await action(argument)
            ended.append(action.__name__)

        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(fails, stream.read, 1)
                nursery.start_soon(fails, stream.write, bytes(8 << 20))
                await trio.testing.wait_all_tasks_blocked()
                await second.secured_conn.close()
        assert sorted(ended) == ["read", "write"]


async def test_closing_does_not_wait_for_a_peer_that_reads_nothing() -> None:
    async with sockets() as (left, _deaf), trio.open_nursery() as nursery:
        end = Muxer(left, PEER, is_initiator=True)
        nursery.start_soon(end.start)
        await end.event_started.wait()
        stream = await end.open_stream()
        stream.send_window = 1 << 30
        with trio.move_on_after(0.1):
            await stream.write(bytes(16 << 20))
        with trio.fail_after(4):
            await end.close()
        assert end.is_closed


@pytest.mark.parametrize("most", [1 << 16, 1 << 30])
async def test_a_peer_that_ignores_the_window_is_cut_off(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(muxer, "MAX_BUFFERED_BYTES", most)
    async with pair() as (first, second):
        stream, _unread = await joined(first, second)
        stream.send_window = 1 << 30
        with pytest.raises((MuxedStreamError, ConnectionClosedError)):
            await stream.write(bytes(16 << 20))
        with trio.fail_after(5):
            await second.event_closed.wait()


def frame(kind: int, flags: int, stream: int, length: int, version: int = 0) -> bytes:
    return struct.pack(YAMUX_HEADER_FORMAT, version, kind, flags, stream, length)


BROKEN = {
    "version": frame(0, 0, 1, 0, version=1),
    "type": frame(4, 0, 1, 0),
    "a stream of our own number": frame(1, 1, 2, 0),
    "stream zero": frame(1, 1, 0, 0),
    "one stream twice": frame(1, 1, 1, 0) * 2,
    "data beyond the window": frame(1, 1, 1, 0) + frame(0, 0, 1, 1 << 20),
    "data of nobody beyond every window": frame(0, 0, 9, (16 << 20) + 1),
    "goodbye": frame(3, 0, 0, 0),
    "half a frame": frame(0, 0, 1, 0)[:5],
}


async def ended_by(data: bytes) -> bool:
    async with sockets() as (left, right), trio.open_nursery() as nursery:
        end = Muxer(left, PEER, is_initiator=False)
        nursery.start_soon(end.start)
        await end.event_started.wait()
        await right.write(data)
        await right.stream.send_eof()
        with trio.fail_after(5):
            await end.event_closed.wait()
        return end.is_closed and not end.streams


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN)
async def test_a_broken_frame_ends_the_connection(data: bytes) -> None:
    assert await ended_by(data)


@given(data=st.lists(st.binary(max_size=40) | st.builds(frame, *[st.integers(0, 5)] * 4), max_size=8))
def test_any_bytes_end_the_connection_and_nothing_else(data: list[bytes]) -> None:
    assert trio.run(ended_by, b"".join(data))


async def test_a_ping_is_answered() -> None:
    async with sockets() as (left, right), trio.open_nursery() as nursery:
        end = Muxer(left, PEER, is_initiator=False)
        nursery.start_soon(end.start)
        await right.write(frame(2, 1, 0, 77))
        with trio.fail_after(5):
            assert await right.read(12) == frame(2, 2, 0, 77)
        await end.close()


async def test_what_is_queued_together_stays_in_frames_of_one_noise_message() -> None:
    sent = bytes(range(256)) * 1000
    async with pair() as (first, second):
        stream, other = await joined(first, second)
        units: list[bytes] = []
        write = first._write_frame

        async def keep(data: bytes) -> None:
            units.append(data)
            await write(data)

        first._write_frame = keep
        await stream.write(sent)
        assert await read_all(other, len(sent)) == sent
    frames, sizes = b"".join(units), list[int]()
    while frames:
        version, kind, flags, number, length = struct.unpack_from(YAMUX_HEADER_FORMAT, frames)
        assert (version, kind, flags, number) == (0, 0, 0, stream.stream_id)
        sizes.append(length)
        frames = frames[12 + length :]
    assert len(units) == 1
    assert max(sizes) == muxer._FRAME_BYTES
    assert sum(sizes) == len(sent)
