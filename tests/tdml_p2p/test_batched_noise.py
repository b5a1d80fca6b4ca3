"""Noise in batches: the bytes of the stock reader and writer, however they are cut on the way; nothing false passes."""

from collections.abc import Iterator
from typing import Any, cast

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.security.noise.io import MAX_PLAINTEXT_LENGTH, NoiseTransportReadWriter
from noise.connection import NoiseConnection
from noise.exceptions import NoiseInvalidMessage

from tdml_p2p.batched_noise import BatchedNoise, batch


class Wire:
    """What one end has written, read in parts of these sizes; nothing at the end."""

    def __init__(self, sizes: Iterator[int] | None = None) -> None:
        self.data = bytearray()
        self.writes = 0
        self._sizes = sizes

    async def write(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        self.data += data
        self.writes += 1

    async def read(self, count: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        most = len(self.data) if count is None else count
        size = most if self._sizes is None or count is not None else min(next(self._sizes), most)
        part = bytes(self.data[:size])
        del self.data[:size]
        return part


def ends(wire: Wire) -> tuple[NoiseTransportReadWriter, NoiseTransportReadWriter]:
    """Return the stock writer and reader of one wire after a handshake."""
    first, second = (NoiseConnection.from_name(b"Noise_NN_25519_ChaChaPoly_SHA256") for _ in range(2))
    first.set_as_initiator()
    second.set_as_responder()
    for end in (first, second):
        end.start_handshake()
    second.read_message(first.write_message())
    first.read_message(second.write_message())
    return NoiseTransportReadWriter(cast(Any, wire), first), NoiseTransportReadWriter(cast(Any, wire), second)


async def read_all(reader: BatchedNoise) -> bytes:
    found = b""
    with pytest.raises(ConnectionClosedError):
        while True:
            part = await reader.read_msg()
            assert part
            found += part
    return found


MESSAGES = st.lists(st.sampled_from((0, 1, 300, MAX_PLAINTEXT_LENGTH, 2 * MAX_PLAINTEXT_LENGTH + 7)), max_size=5)


@given(MESSAGES, st.lists(st.integers(1, 100_000), min_size=1))
def test_what_is_written_is_read_however_it_is_cut(lengths: list[int], sizes: list[int]) -> None:
    async def main() -> None:
        turns = (sizes[turn % len(sizes)] for turn in range(10**9))
        wire = Wire(turns)
        writer, reader = ends(wire)
        sent = [bytes([number % 251]) * length for number, length in enumerate(lengths)]
        for message in sent:
            await BatchedNoise(writer).write_msg(message)
        assert await read_all(BatchedNoise(reader)) == b"".join(sent)

    trio.run(main)


async def test_the_stock_ends_understand_it() -> None:
    wire, message = Wire(), bytes(range(256)) * 1000
    writer, reader = ends(wire)
    await BatchedNoise(writer).write_msg(message)
    assert wire.writes == 1
    assert b"".join([await reader.read_msg() for _ in range(4)]) == message
    await writer.write_msg(message)
    assert await BatchedNoise(reader).read_msg() == message


async def test_a_changed_byte_is_refused() -> None:
    wire = Wire()
    writer, reader = ends(wire)
    await BatchedNoise(writer).write_msg(bytes(100))
    wire.data[50] ^= 1
    with pytest.raises(NoiseInvalidMessage):
        await BatchedNoise(reader).read_msg()


async def test_half_a_message_is_the_end_and_no_data() -> None:
    wire = Wire()
    writer, reader = ends(wire)
    await BatchedNoise(writer).write_msg(bytes(100))
    del wire.data[60:]
    with pytest.raises(ConnectionClosedError):
        await BatchedNoise(reader).read_msg()


class Session:
    """A secured connection, of which only this is looked at."""

    def __init__(self, conn: object) -> None:
        self.conn = conn


def test_only_noise_is_batched_and_once() -> None:
    other, noise = Session(object()), Session(ends(Wire())[0])
    former = other.conn
    batch(other)
    assert other.conn is former
    batch(noise)
    batched = noise.conn
    batch(noise)
    assert isinstance(batched, BatchedNoise)
    assert noise.conn is batched
