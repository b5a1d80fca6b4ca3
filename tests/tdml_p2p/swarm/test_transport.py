"""The swarm's transport takes what members signed, refuses and counts the rest, and answers with receipts."""

import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import cast

import pytest
import torch
import trio
import trio.testing

from chain.keys import PrivateKey, peer_id
from tdml_p2p.swarm.envelope import (
    MAX_RECEIPTS,
    Carried,
    Receipts,
    decode_envelope,
    encode_envelope,
    is_acknowledged,
    receipt,
    statement,
)
from tdml_p2p.swarm.transport import SwarmTransport
from tdml_p2p.tensors import Frame, LinkLost, TensorStreams
from tdml_p2p.tensors import PeerLost as StreamLost
from trainer.content import address_of
from trainer.messages import Activation, Commit, Message, encode_header, payload_of
from trainer.payloads import pack
from trainer.transport import Lost, PeerLost, Received

TASK = bytes(range(32))
ME, MEMBER, STRANGER = (PrivateKey(bytes([number]) * 32) for number in (1, 2, 3))
MEMBER_NAME, STRANGER_NAME, MY_NAME = (peer_id(key.account) for key in (MEMBER, STRANGER, ME))


class FakeStreams:
    """The tensor streams of one host: frames put in by tests, and those that were sent."""

    def __init__(self) -> None:
        self.feed, self.frames = trio.open_memory_channel[Frame | LinkLost](math.inf)
        self.sent: list[tuple[str, bytes, tuple[memoryview, ...]]] = []
        self.lost: set[str] = set()
        self.max_frame = 1 << 30
        self.closed: list[bytes] = []

    def open_session(self, session: bytes) -> trio.MemoryReceiveChannel[Frame | LinkLost]:
        assert session == TASK
        return self.frames

    def close_session(self, session: bytes) -> None:
        self.closed.append(session)

    async def send(
        self, peer: str, session: bytes, header: bytes, tensors: Sequence[memoryview], deadline: float
    ) -> None:
        await trio.lowlevel.checkpoint()
        assert session == TASK
        assert deadline > 0
        if peer in self.lost:
            raise StreamLost(peer)
        if sum(map(len, tensors)) > self.max_frame:
            raise ValueError("too large")
        self.sent.append((peer, header, tuple(tensors)))


class Bench:
    """A transport on stand-in streams; `members` are whose frames are read."""

    def __init__(self) -> None:
        self.streams = FakeStreams()
        self.members = {MEMBER_NAME, MY_NAME}
        streams = cast(TensorStreams, self.streams)
        self.transport = SwarmTransport(TASK, ME, MY_NAME, streams, lambda peer: peer in self.members)
        self.taken: list[Received] = []

    async def arrive(self, *frames: Frame | LinkLost) -> None:
        """Let frames arrive and be dealt with."""
        for frame in frames:
            self.streams.feed.send_nowait(frame)
        await trio.testing.wait_all_tasks_blocked()

    async def read(self) -> None:
        while True:
            self.taken.append(await self.transport.receive())


@asynccontextmanager
async def running() -> AsyncIterator[Bench]:
    bench = Bench()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.transport.run)
        nursery.start_soon(bench.read)
        yield bench
        nursery.cancel_scope.cancel()


def activation(step: int = 1) -> Activation:
    return Activation(0, step, 0, 0, pack(torch.full((1, 2, 4), float(step))))


def frame(message: Message, key: PrivateKey = MEMBER, signer: PrivateKey | None = None, task: bytes = TASK) -> Frame:
    """Return the frame in which `key`'s peer sends a message, signed by `signer` if that is another."""
    header = encode_header(message)
    tensors = tuple(one.data for one in payload_of(message))
    addresses = [address_of(data) for data in tensors]
    proofs = tuple((one, (signer or key).sign(statement(task, header, one))) for one in addresses)
    return Frame(peer_id(key.account), encode_envelope(Carried(header, proofs)), tensors)


def receipts_of(bench: Bench) -> list[Receipts]:
    found = [decode_envelope(header) for peer, header, _ in bench.streams.sent if peer == MEMBER_NAME]
    return [one for one in found if isinstance(one, Receipts)]


async def test_a_members_message_arrives_with_its_proof(autojump_clock: trio.testing.MockClock) -> None:
    async with running() as bench:
        await bench.arrive(frame(activation()))
    (received,) = bench.taken
    assert (received.sender, received.message) == (MEMBER_NAME, activation())
    assert [address for address, _ in received.proof] == [address_of(activation().payload[0].data)]
    assert not bench.transport.refused


async def test_frames_of_a_stranger_are_refused_and_counted() -> None:
    async with running() as bench:
        await bench.arrive(frame(activation(), STRANGER), frame(Commit(0, 1), STRANGER), frame(Commit(0, 2)))
    assert [received.message for received in bench.taken] == [Commit(0, 2)]
    assert bench.transport.refused == {"not-a-member": 2}


async def test_frames_of_an_evicted_member_are_refused_at_once() -> None:
    async with running() as bench:
        await bench.arrive(frame(activation(1)))
        bench.members.discard(MEMBER_NAME)
        await bench.arrive(frame(activation(2)))
    assert [received.message for received in bench.taken] == [activation(1)]
    assert bench.transport.refused == {"not-a-member": 1}


async def test_receipts_of_a_stranger_are_not_kept() -> None:
    async with running() as bench:
        batch = encode_envelope(receipt(TASK, STRANGER, (bytes(64),)))
        await bench.arrive(Frame(STRANGER_NAME, batch, ()))
    assert not bench.transport.receipts
    assert bench.transport.refused == {"not-a-member": 1}


def without_proofs(good: Frame) -> Frame:
    envelope = decode_envelope(good.header)
    assert isinstance(envelope, Carried)
    return Frame(good.sender, encode_envelope(Carried(envelope.header, ())), good.tensors)


def with_other_bytes(good: Frame) -> Frame:
    data = bytearray(good.tensors[0])
    data[0] ^= 1
    return Frame(good.sender, good.header, (memoryview(data),))


def with_other_header(good: Frame) -> Frame:
    envelope = decode_envelope(good.header)
    assert isinstance(envelope, Carried)
    return Frame(good.sender, encode_envelope(Carried(encode_header(activation(9)), envelope.proofs)), good.tensors)


@pytest.mark.parametrize(
    "false",
    [
        frame(activation(), signer=STRANGER),
        frame(activation(), task=bytes(32)),
        without_proofs(frame(activation())),
        with_other_bytes(frame(activation())),
        with_other_header(frame(activation())),
    ],
    ids=["another-signer", "another-task", "no-proofs", "other-bytes", "other-header"],
)
async def test_false_proofs_are_refused_and_not_acknowledged(
    false: Frame, autojump_clock: trio.testing.MockClock
) -> None:
    async with running() as bench:
        await bench.arrive(false)
        await trio.sleep(1)
    assert not bench.taken
    assert bench.transport.refused == {"false-proof": 1}
    assert not bench.streams.sent


@pytest.mark.parametrize("header", [b"", b"\xc1", b"\x93" * 5000, encode_envelope(Carried(b"\xc1", ()))])
async def test_a_malformed_frame_is_refused_and_the_next_one_read(header: bytes) -> None:
    async with running() as bench:
        await bench.arrive(Frame(MEMBER_NAME, header, ()), frame(Commit(0, 1)))
    assert [received.message for received in bench.taken] == [Commit(0, 1)]
    assert sum(bench.transport.refused.values()) == 1


async def test_tensors_that_the_header_does_not_announce_are_refused() -> None:
    good = frame(activation())
    async with running() as bench:
        await bench.arrive(Frame(good.sender, good.header, ()), Frame(good.sender, good.header, good.tensors * 2))
    assert not bench.taken
    assert sum(bench.transport.refused.values()) == 2


async def test_tensors_are_acknowledged_under_one_signature(autojump_clock: trio.testing.MockClock) -> None:
    async with running() as bench:
        await bench.arrive(frame(activation(1)), frame(activation(2)), frame(Commit(0, 1)))
        await trio.sleep(1)
    (batch,) = receipts_of(bench)
    assert batch.proofs == tuple(signature for received in bench.taken for _, signature in received.proof)
    assert len(batch.proofs) == 2
    assert is_acknowledged(TASK, MY_NAME, batch)


async def test_many_tensors_are_acknowledged_in_bounded_batches(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tdml_p2p.swarm.transport.MAX_RECEIPTS", 2)
    async with running() as bench:
        await bench.arrive(*(frame(activation(step)) for step in range(5)))
        await trio.sleep(1)
    assert [len(batch.proofs) for batch in receipts_of(bench)] == [2, 2, 1]
    assert MAX_RECEIPTS > 2


async def test_a_peer_that_is_gone_does_not_stop_receipts(autojump_clock: trio.testing.MockClock) -> None:
    async with running() as bench:
        bench.streams.lost.add(MEMBER_NAME)
        await bench.arrive(frame(activation(1)))
        await trio.sleep(1)
        bench.streams.lost.clear()
        await bench.arrive(frame(activation(2)))
        await trio.sleep(1)
    assert len(receipts_of(bench)) == 1


async def test_receipts_are_kept_when_signed_and_refused_when_not() -> None:
    async with running() as bench:
        good, false = receipt(TASK, MEMBER, (bytes(64),)), receipt(TASK, STRANGER, (bytes([1]) * 64,))
        await bench.arrive(*(Frame(MEMBER_NAME, encode_envelope(one), ()) for one in (good, false)))
    assert dict(bench.transport.receipts) == {bytes(64): MEMBER_NAME}
    assert bench.transport.refused == {"false-receipt": 1}


async def test_only_the_newest_receipts_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tdml_p2p.swarm.transport._KEPT_RECEIPTS", 3)
    async with running() as bench:
        proofs = tuple(bytes([number]) * 64 for number in range(5))
        await bench.arrive(Frame(MEMBER_NAME, encode_envelope(receipt(TASK, MEMBER, proofs)), ()))
    assert tuple(bench.transport.receipts) == proofs[2:]


async def test_what_is_sent_is_what_a_member_takes() -> None:
    async with running() as bench:
        await bench.transport.send(MEMBER_NAME, activation())
    ((peer, header, tensors),) = bench.streams.sent
    assert peer == MEMBER_NAME
    assert bench.transport.bytes_sent == 32
    async with running() as other:
        other.members = {MY_NAME}
        await other.arrive(Frame(MY_NAME, header, tensors))
        assert [received.message for received in other.taken] == [activation()]


async def test_a_message_to_oneself_arrives_without_the_network() -> None:
    async with running() as bench:
        await bench.transport.send(MY_NAME, activation())
        await trio.testing.wait_all_tasks_blocked()
    assert [(received.sender, received.message) for received in bench.taken] == [(MY_NAME, activation())]
    assert not bench.streams.sent


async def test_a_lost_link_is_told_to_the_sender_and_to_the_reader() -> None:
    async with running() as bench:
        bench.streams.lost.add(MEMBER_NAME)
        with pytest.raises(PeerLost):
            await bench.transport.send(MEMBER_NAME, Commit(0, 1))
        await bench.arrive(LinkLost(MEMBER_NAME))
    assert [received.message for received in bench.taken] == [Lost(MEMBER_NAME)]


async def test_a_frame_beyond_the_bounds_is_a_lost_message_and_no_crash() -> None:
    async with running() as bench:
        bench.streams.max_frame = 0
        with pytest.raises(PeerLost):
            await bench.transport.send(MEMBER_NAME, activation())


def test_closing_ends_the_session() -> None:
    bench = Bench()
    bench.transport.close()
    assert bench.streams.closed == [TASK]
