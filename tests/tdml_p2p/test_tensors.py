"""Tensor streams between real hosts: equality, credit, refusals, deadlines, losses and hostile bytes."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from libp2p.peer.id import ID

from tdml_p2p.host import Network
from tdml_p2p.streams import StreamEnded, read_exactly, write
from tdml_p2p.tensor_frames import (
    CONTROL_BYTES,
    Control,
    ControlKind,
    FrameReason,
    Record,
    RecordKind,
    RefusalReason,
    decode_control,
    encode_lengths,
)
from tdml_p2p.tensors import PROTOCOL, Frame, LinkLost, PeerLost, SendRefused, SendTimeout, TensorConfig
from tests.tdml_p2p.network_kit import QUICK, meshed, until

SESSION = bytes(range(32))
OTHER = bytes(32)
SMALL = replace(QUICK, tensors=TensorConfig(max_frame=8 << 20, window=1 << 20, open_seconds=0.2))


def pattern(size: int, salt: int = 0) -> memoryview:
    return memoryview(bytes((i * 31 + salt) % 251 for i in range(4096)) * (size // 4096 + 1))[:size]


@asynccontextmanager
async def pair() -> AsyncIterator[tuple[Network, Network]]:
    async with meshed(2, SMALL) as (sender, receiver):
        yield sender, receiver


async def test_frames_arrive_in_order_and_byte_equal() -> None:
    async with pair() as (sender, receiver):
        channel = receiver.tensors.open_session(SESSION)
        large = pattern(5 << 20, 3)
        sent = [(b"first", [large, pattern(7)]), (b"", []), (b"h" * 65536, [pattern(0)])]
        got: list[Frame | LinkLost] = []

        async def receive() -> None:
            while len(got) < len(sent):
                got.append(await channel.receive())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            for header, tensors in sent:
                await sender.tensors.send(receiver.peer, SESSION, header, tensors, 10)
        assert got == [Frame(sender.peer, header, tuple(tensors)) for header, tensors in sent]
        assert sender.tensors.bytes_sent == receiver.tensors.inbound.bytes_received == (5 << 20) + 7


async def test_both_directions_at_once() -> None:
    async with pair() as (first, second):
        into = {peer: peer.tensors.open_session(SESSION) for peer in (first, second)}
        data = pattern(3 << 20)
        async with trio.open_nursery() as nursery:
            for peer, other in ((first, second), (second, first)):
                nursery.start_soon(peer.tensors.send, other.peer, SESSION, b"x", [data], 10)
            for peer, other in ((first, second), (second, first)):
                assert await into[peer].receive() == Frame(other.peer, b"x", (data,))


async def test_a_slow_reader_stops_the_sender_and_nothing_is_lost() -> None:
    async with pair() as (sender, receiver):
        channel = receiver.tensors.open_session(SESSION)
        data = pattern(400 << 10)
        done = 0

        async def send_all() -> None:
            nonlocal done
            for number in range(12):
                await sender.tensors.send(receiver.peer, SESSION, bytes([number]), [data], 20)
                done += 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_all)
            await until(lambda: done >= 2)
            for _ in range(20):
                await trio.sleep(0.005)
            assert done <= 3
            for number in range(12):
                frame = await channel.receive()
                assert isinstance(frame, Frame)
                assert (frame.header, frame.tensors[0]) == (bytes([number]), data)


async def test_a_deadline_ends_a_send_that_gets_no_credit_and_a_new_link_brings_none() -> None:
    async with pair() as (sender, receiver):
        channel = receiver.tensors.open_session(SESSION)
        data = pattern(500 << 10)
        for _ in range(2):
            await sender.tensors.send(receiver.peer, SESSION, b"", [data], 10)
        for _ in range(2):
            with pytest.raises(SendTimeout):
                await sender.tensors.send(receiver.peer, SESSION, b"", [data], 0.2)
        assert isinstance(await channel.receive(), Frame)
        assert isinstance(await channel.receive(), Frame)
        await sender.tensors.send(receiver.peer, SESSION, b"last", [data], 10)
        frame = await channel.receive()
        while isinstance(frame, LinkLost):
            frame = await channel.receive()
        assert frame == Frame(sender.peer, b"last", (data,))


async def test_a_large_frame_over_a_slow_link_is_late_only_when_the_link_takes_nothing() -> None:
    async with pair() as (sender, receiver):
        channel = receiver.tensors.open_session(SESSION)
        link_write = sender.tensors._write

        async def slowly(link: Any, data: bytes | memoryview) -> None:
            await trio.sleep(0.25)
            await link_write(link, data)

        sender.tensors._write = slowly  # type: ignore[method-assign]
        data = pattern(4 << 20)
        async with trio.open_nursery() as nursery:
            started = trio.current_time()
            nursery.start_soon(sender.tensors.send, receiver.peer, SESSION, b"", [data], 1.0)
            assert await channel.receive() == Frame(sender.peer, b"", (data,))
        assert trio.current_time() - started > 1.5


async def test_a_session_that_opens_late_gets_the_frame() -> None:
    async with pair() as (sender, receiver), trio.open_nursery() as nursery:
        nursery.start_soon(sender.tensors.send, receiver.peer, SESSION, b"early", [], 10)
        await until(lambda: receiver.tensors.inbound.refused[RefusalReason.UNKNOWN_SESSION] == 1)
        channel = receiver.tensors.open_session(SESSION)
        assert await channel.receive() == Frame(sender.peer, b"early", ())


async def test_refusals_have_names() -> None:
    async with pair() as (sender, receiver):

        async def reason(session: bytes) -> str:
            with pytest.raises(SendRefused) as refused:
                await sender.tensors.send(receiver.peer, session, b"", [], 10)
            return refused.value.reason

        assert await reason(OTHER) == RefusalReason.UNKNOWN_SESSION
        channel = receiver.tensors.open_session(SESSION)
        await sender.tensors.send(receiver.peer, SESSION, b"one", [], 10)
        assert await channel.receive() == Frame(sender.peer, b"one", ())
        receiver.evict(SESSION, sender.peer)
        await until(lambda: SESSION in sender.tensors._links[receiver.peer].refused)
        assert await reason(SESSION) == RefusalReason.EVICTED
        with pytest.raises(ValueError, match="too large"):
            await sender.tensors.send(receiver.peer, SESSION, b"", [pattern((8 << 20) + 1)], 10)
        with pytest.raises(ValueError, match="open already"):
            receiver.tensors.open_session(SESSION)


async def test_a_closed_session_can_be_opened_again() -> None:
    async with pair() as (sender, receiver):
        for number in range(3):
            channel = receiver.tensors.open_session(SESSION)
            await sender.tensors.send(receiver.peer, SESSION, bytes([number]), [pattern(600 << 10)], 10)
            await channel.receive()
            receiver.tensors.close_session(SESSION)
            with pytest.raises(trio.ClosedResourceError):
                await channel.receive()
        assert receiver.tensors.inbound.refused[FrameReason.SESSION_NOT_OPENED] == 0


async def test_unread_frames_of_a_closed_session_give_their_credit_back() -> None:
    async with pair() as (sender, receiver):
        receiver.tensors.open_session(OTHER)
        for _ in range(2):
            await sender.tensors.send(receiver.peer, OTHER, b"", [pattern(400 << 10)], 10)
        receiver.tensors.close_session(OTHER)
        channel = receiver.tensors.open_session(SESSION)
        await sender.tensors.send(receiver.peer, SESSION, b"", [pattern(900 << 10)], 10)
        assert isinstance(await channel.receive(), Frame)


async def test_a_peer_that_dies_in_the_middle_is_lost_to_sender_and_receiver() -> None:
    async with pair() as (sender, receiver):
        outgoing = sender.tensors.open_session(SESSION)
        incoming = receiver.tensors.open_session(SESSION)
        await sender.tensors.send(receiver.peer, SESSION, b"", [], 10)
        assert isinstance(await incoming.receive(), Frame)

        async def kill() -> None:
            await until(lambda: sender.tensors._links[receiver.peer].credit < 1 << 19)
            await receiver.disconnect(sender.peer)

        await sender.tensors.send(receiver.peer, SESSION, b"", [pattern(500 << 10)], 10)
        await until(lambda: receiver.tensors.inbound.bytes_received == 500 << 10)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(kill)
            with pytest.raises(PeerLost):
                await sender.tensors.send(receiver.peer, SESSION, b"", [pattern(8 << 20)], 10)
        assert await outgoing.receive() == LinkLost(receiver.peer)
        assert isinstance(await incoming.receive(), Frame)
        assert await incoming.receive() == LinkLost(sender.peer)


async def test_a_peer_that_nobody_knows_is_lost_at_once() -> None:
    async with pair() as (sender, _):
        with pytest.raises(PeerLost):
            await sender.tensors.send(SESSION_PEER, SESSION, b"", [], 10)


SESSION_PEER = "12D3KooWCryG7Mon9orvQxcS1rYZjotPgpwoJNHHKcLLfE4Hf5mV"


@asynccontextmanager
async def raw_stream(sender: Network, receiver: Network) -> AsyncIterator:
    stream = await sender.host.new_stream(ID.from_string(receiver.peer), [PROTOCOL])
    grant = decode_control(await read_exactly(stream, CONTROL_BYTES))
    assert grant == Control(ControlKind.GRANT, value=1 << 20)
    yield stream
    await stream.reset()


async def enter(stream) -> None:
    await stream.write(Record(RecordKind.OPEN, SESSION).encode())
    assert decode_control(await read_exactly(stream, CONTROL_BYTES)).kind is ControlKind.ACCEPT


async def is_reset(stream) -> bool:
    try:
        with trio.fail_after(5):
            while True:
                await read_exactly(stream, 1)
    except StreamEnded:
        return True


HOSTILE = {
    FrameReason.NOT_A_RECORD: b"\0" * 52,
    FrameReason.FRAME_TOO_LARGE: Record(RecordKind.FRAME, SESSION, 1, 0, 4 << 30).encode(),
    FrameReason.HEADER_TOO_LARGE: Record(RecordKind.FRAME, SESSION, 1, 1 << 30, 0).encode(),
    FrameReason.SESSION_NOT_OPENED: Record(RecordKind.FRAME, OTHER, 0, 0, 0).encode(),
    FrameReason.LENGTHS_DIFFER: Record(RecordKind.FRAME, SESSION, 1, 0, 9).encode() + encode_lengths([8]),
    FrameReason.CREDIT_EXCEEDED: Record(RecordKind.FRAME, SESSION, 1, 0, 2 << 20).encode()
    + encode_lengths([2 << 20])
    + bytes(2 << 20),
}


async def test_hostile_bytes_cost_one_stream_and_have_a_name() -> None:
    async with pair() as (sender, receiver):
        channel = receiver.tensors.open_session(SESSION)
        await sender.tensors.send(receiver.peer, SESSION, b"before", [], 10)
        assert isinstance(await channel.receive(), Frame)
        for reason, data in HOSTILE.items():
            async with raw_stream(sender, receiver) as stream:
                await enter(stream)
                # Half a window of unread frames, so that credit is short.
                await stream.write(
                    Record(RecordKind.FRAME, SESSION, 1, 0, 512 << 10).encode()
                    + encode_lengths([512 << 10])
                    + bytes(512 << 10)
                )
                with suppress(StreamEnded):
                    await write(stream, data)
                assert await is_reset(stream)
            assert receiver.tensors.inbound.refused[reason] == 1, reason
            assert isinstance(await channel.receive(), Frame)
            assert await channel.receive() == LinkLost(sender.peer)
        await sender.tensors.send(receiver.peer, SESSION, b"after", [], 10)
        assert await channel.receive() == Frame(sender.peer, b"after", ())


@pytest.mark.parametrize("size", [0, 1, 51, 52, 60, 100])
async def test_a_stream_cut_at_any_byte_costs_nothing_else(size: int) -> None:
    async with pair() as (sender, receiver):
        channel = receiver.tensors.open_session(SESSION)
        whole = Record(RecordKind.FRAME, SESSION, 1, 4, 64).encode() + b"head" + encode_lengths([64]) + bytes(64)
        for end in ("close", "reset"):
            async with raw_stream(sender, receiver) as stream:
                await enter(stream)
                await stream.write(whole[:size] or b"")
                await getattr(stream, end)()
        await until(lambda: not receiver.tensors.inbound._links)
        await sender.tensors.send(receiver.peer, SESSION, b"after", [], 10)
        assert await channel.receive() == Frame(sender.peer, b"after", ())


@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.binary(max_size=300), min_size=1, max_size=12))
async def test_fuzzed_streams_never_harm_the_receiver(blobs: list[bytes]) -> None:
    async with pair() as (sender, receiver):
        channel = receiver.tensors.open_session(SESSION)
        for blob in blobs:
            async with raw_stream(sender, receiver) as stream:
                await enter(stream)
                with suppress(StreamEnded):
                    await write(stream, blob)
        receiver.limits.offences.clear()
        receiver.limits._peers.clear()
        await sender.tensors.send(receiver.peer, SESSION, b"after", [], 10)
        frame = await channel.receive()
        while not isinstance(frame, Frame) or frame.header != b"after":
            frame = await channel.receive()
