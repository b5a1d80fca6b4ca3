"""Range sync: replies within bounds, final blocks checked one by one, liars reported."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from chain.blocks import Block, Certificate, Header, Reason, Refused, Vote, VoteKind, certify, vote_bytes
from chain.codec import DecodeError, encode
from chain.engine_blocks import Tip
from chain.engine_seam import RequestFailed
from chain.engine_sync import CatchUp
from chain.hashing import ZERO
from chain.keys import verify
from chain.sync import (
    MAX_RANGE,
    RANGE_BYTES,
    FinalBlock,
    RangeRequest,
    StatusReply,
    StatusRequest,
    check_final,
    decode_range,
    decode_request,
    decode_status,
    pack_range,
)
from tests.chain.test_blocks import CHAIN, KEYS, SET, block


def finalize(of: Block, kind: VoteKind = VoteKind.FINALIZE) -> Certificate:
    said = vote_bytes(kind, CHAIN, of.height, 1, of.hash)
    return certify([Vote(kind, CHAIN, of.height, 1, of.hash, key.account, key.sign(said)) for key in KEYS[:3]], SET)


def chain_of(length: int) -> list[FinalBlock]:
    finals: list[FinalBlock] = []
    parent: Header | None = None
    for height in range(1, length + 1):
        certificate = finals[-1].certificate if finals else None
        header = structs.replace(
            block(1).header,
            height=height,
            parent=parent.hash if parent else CHAIN,
            certificate_hash=certificate.hash if certificate else ZERO,
        )
        made = Block(header, (), certificate)
        finals.append(FinalBlock(made, finalize(made)))
        parent = header
    return finals


FINALS = chain_of(3)


def test_a_true_chain_is_followed() -> None:
    parent = None
    for final in FINALS:
        check_final(final, parent, SET, verify)
        parent = final.block.header


def test_false_final_blocks_are_refused_by_name() -> None:
    first, second, third = FINALS
    stale = structs.replace(SET, members=SET.members[:3])
    cases = [
        (Reason.WRONG_HEIGHT, second, None, SET),
        (Reason.WRONG_HEIGHT, third, first.block.header, SET),
        (Reason.WRONG_KIND, FinalBlock(first.block, finalize(first.block, VoteKind.NOTARIZE)), None, SET),
        (Reason.WRONG_BLOCK, FinalBlock(first.block, second.certificate), None, SET),
        (Reason.WRONG_BLOCK, first, None, stale),
        (
            Reason.WRONG_BLOCK,
            FinalBlock(structs.replace(second.block, parent_certificate=third.certificate), second.certificate),
            first.block.header,
            SET,
        ),
        (
            Reason.BAD_SIGNATURE,
            FinalBlock(first.block, structs.replace(first.certificate, view=2)),
            None,
            SET,
        ),
    ]
    for reason, final, parent, validators in cases:
        with pytest.raises(Refused) as refusal:
            check_final(final, parent, validators, verify)
        assert refusal.value.reason == reason


def test_replies_are_packed_within_their_bounds() -> None:
    encoded = [(encode(f.block), encode(f.certificate)) for f in FINALS]
    assert decode_range(pack_range(encoded)) == tuple(FINALS)
    assert decode_range(pack_range([])) == ()
    assert len(decode_range(pack_range(encoded[:1] * (MAX_RANGE + 5)))) == MAX_RANGE
    large = (encode(bytes(RANGE_BYTES)), encode(b""))
    assert len(pack_range([large, large])) < RANGE_BYTES + 100


def test_requests_of_another_network_are_refused() -> None:
    request = StatusRequest(CHAIN, 5)
    assert decode_request(encode(request), CHAIN) == request
    with pytest.raises(Refused):
        decode_request(encode(request), bytes(32))
    with pytest.raises(DecodeError):
        decode_request(encode(RangeRequest(CHAIN, 1, MAX_RANGE + 1)), CHAIN)


@given(st.binary(max_size=300))
def test_any_bytes_decode_or_raise_decode_error(data: bytes) -> None:
    for decoder in (decode_range, decode_status, lambda d: decode_request(d, CHAIN)):
        with contextlib.suppress(DecodeError, Refused):
            decoder(data)


class Server:
    """A peer that answers from a list of blocks, after `twist` has had its way with the reply."""

    def __init__(self, finals: list[FinalBlock], height: int, twist: bytes | None = None) -> None:
        self.finals, self.height, self.twist = finals, height, twist
        self.penalized: list[str] = []
        self.requests = 0

    async def publish(self, topic: str, data: bytes) -> None:
        raise AssertionError("sync never publishes")

    def peers(self) -> tuple[str, ...]:
        return ("server",)

    def penalize(self, peer: str, reason: str) -> None:
        self.penalized.append(reason)

    async def request(self, peer: str, data: bytes) -> bytes:
        self.requests += 1
        match decode_request(data, CHAIN):
            case StatusRequest():
                return encode(StatusReply(self.height, ZERO))
            case RangeRequest(_, first, count):
                if self.twist is not None:
                    return self.twist
                chosen = self.finals[first - 1 : first - 1 + count]
                return pack_range([(encode(f.block), encode(f.certificate)) for f in chosen])
        raise RequestFailed("unknown")


class FakeState:
    """A state in which every height has the same validators."""

    def validators(self) -> object:
        return SET


async def follow(server: Server) -> list[FinalBlock]:
    taken: list[FinalBlock] = []

    def tip() -> Tip:
        header = taken[-1].block.header if taken else None
        return Tip(CHAIN, FakeState(), header)  # type: ignore[arg-type]

    async def commit(final: FinalBlock) -> None:
        taken.append(final)

    await CatchUp(server, tip, commit, verify).follow("server")
    return taken


async def test_an_honest_server_is_followed_to_its_tip() -> None:
    server = Server(FINALS, 3)
    assert await follow(server) == FINALS
    assert server.penalized == []


async def test_a_server_of_false_blocks_is_reported() -> None:
    forged = [FINALS[0], FinalBlock(FINALS[1].block, FINALS[0].certificate)]
    server = Server(forged, 2)
    assert await follow(server) == FINALS[:1]
    assert len(server.penalized) == 1
    garbage = Server(FINALS, 3, twist=b"\xc1")
    assert await follow(garbage) == []
    assert len(garbage.penalized) == 1


async def test_a_server_that_promises_and_gives_nothing_is_left() -> None:
    server = Server([], 10**12)
    assert await follow(server) == []
    assert server.requests == 2
