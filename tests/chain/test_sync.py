"""Range sync: replies within bounds, final blocks checked one by one, liars reported."""

import contextlib
from collections.abc import Callable, Iterable, Sequence

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from chain.blocks import (
    Block,
    Certificate,
    Header,
    Reason,
    Refused,
    ValidatorSet,
    Vote,
    VoteKind,
    certify,
    vote_bytes,
)
from chain.codec import DecodeError, encode
from chain.engine_blocks import Tip
from chain.engine_peers import Peers
from chain.engine_ranges import SYNC_RANGE
from chain.engine_seam import RequestFailed
from chain.engine_sync import CatchUp, CatchUpConfig
from chain.engine_threads import Threads
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
    """One serving peer: `twist` has its way with each answer, None is no answer at all."""

    def __init__(
        self,
        finals: list[FinalBlock],
        twist: Callable[[RangeRequest, tuple[FinalBlock, ...]], bytes | None] | None = None,
        claims: int | None = None,
    ) -> None:
        self.finals = finals
        self.claims = len(finals) if claims is None else claims
        self.base = 1
        self.asked: list[RangeRequest] = []
        self._twist = twist

    async def answer(self, data: bytes) -> bytes:
        await trio.sleep(0.01)
        request = decode_request(data, CHAIN)
        if isinstance(request, StatusRequest):
            known = self.finals[self.claims - 1].block.hash if 0 < self.claims <= len(self.finals) else CHAIN
            return encode(StatusReply(self.claims, known, self.base))
        assert isinstance(request, RangeRequest)
        self.asked.append(request)
        chosen = tuple(self.finals[request.first - 1 : request.first - 1 + request.count])
        answer = self._twist(request, chosen) if self._twist else packed(chosen)
        if answer is None:
            await trio.sleep_forever()
        assert answer is not None
        return answer


def packed(finals: Iterable[FinalBlock]) -> bytes:
    return pack_range([(encode(f.block), encode(f.certificate)) for f in finals])


class Net:
    """The peers that a follower is connected to."""

    def __init__(self, **servers: Server) -> None:
        self.servers = servers
        self.penalized: list[str] = []

    async def publish(self, topic: str, data: bytes) -> None:
        raise AssertionError("sync never publishes")

    def peers(self) -> tuple[str, ...]:
        return tuple(self.servers)

    def penalize(self, peer: str, reason: str) -> None:
        self.penalized.append(peer)

    async def request(self, peer: str, data: bytes) -> bytes:
        if peer not in self.servers:
            raise RequestFailed("gone")
        return await self.servers[peer].answer(data)


class FakeState:
    """A state in which every height has the same validators."""

    def validators(self) -> ValidatorSet:
        return SET


class Follower:
    """Catches up without executing."""

    def __init__(self, net: Net) -> None:
        self.taken: list[FinalBlock] = []
        self.batches: list[int] = []
        self.suspects: list[FinalBlock] = []
        self.foreign: list[Certificate] = []
        self.peers = Peers(net, 5.0)
        threads, suspect = Threads(offload=False), self.suspects.append
        self.catch_up = CatchUp(
            CatchUpConfig(self.peers, self.tip, self.commit, suspect, self.foreign.append, threads, verify)
        )

    def tip(self) -> Tip:
        header = self.taken[-1].block.header if self.taken else None
        return Tip(CHAIN, FakeState(), header, signers=SET)  # type: ignore[arg-type]

    async def commit(self, finals: Sequence[FinalBlock]) -> None:
        self.batches.append(len(finals))
        for final in finals:
            if final.block.height > len(self.taken):
                check_final(final, self.tip().header, SET, verify)
                self.taken.append(final)

    async def reach(self, height: int) -> None:
        with trio.fail_after(600):
            while len(self.taken) < height:
                await self.catch_up.follow(everyone=True)
                await trio.sleep(1)


LONG = chain_of(700)


async def test_ranges_come_from_several_peers_at_once_and_in_order(autojump_clock: trio.testing.MockClock) -> None:
    net = Net(**{f"p{i}": Server(LONG) for i in range(6)})
    follower = Follower(net)
    await follower.catch_up.follow(everyone=True)
    assert follower.taken == LONG
    assert sum(1 for server in net.servers.values() if server.asked) == 4
    asked = [request.first for server in net.servers.values() for request in server.asked]
    assert len(asked) == len(set(asked)) == -(-700 // SYNC_RANGE)
    assert net.penalized == []
    assert not follower.catch_up.is_behind


def _foreign(request: RangeRequest, finals: tuple[FinalBlock, ...]) -> bytes:
    return packed([finals[0], FinalBlock(finals[1].block, finals[0].certificate)])


def _forged(request: RangeRequest, finals: tuple[FinalBlock, ...]) -> bytes:
    wrong = structs.replace(finals[1].certificate, view=2)
    return packed([finals[0], FinalBlock(finals[1].block, wrong)])


def _forked(request: RangeRequest, finals: tuple[FinalBlock, ...]) -> bytes:
    """A block on another parent, finalized by nobody that matters."""
    header = structs.replace(finals[0].block.header, parent=bytes(32))
    other = Block(header, (), finals[0].block.parent_certificate)
    return packed([FinalBlock(other, finalize(other))])


LIES: dict[str, Callable[[RangeRequest, tuple[FinalBlock, ...]], bytes]] = {
    "malformed": lambda request, finals: b"\xc1" * 40,
    "wrong-block": _foreign,
    "bad-signature": _forged,
    "wrong-height": lambda request, finals: packed(reversed(finals)),
    "wrong-height ": lambda request, finals: packed(LONG[: len(finals)] if request.first > 1 else LONG[1:3]),
    "too-many-blocks": lambda request, finals: packed([*finals, LONG[request.first - 1 + len(finals)]]),
    "wrong-height  ": _forked,
}


@pytest.mark.parametrize("lie", LIES)
async def test_a_liar_is_banned_once_and_its_ranges_are_asked_elsewhere(
    lie: str, autojump_clock: trio.testing.MockClock
) -> None:
    net = Net(liar=Server(LONG[:300], LIES[lie]), honest=Server(LONG[:300]))
    follower = Follower(net)
    await follower.reach(300)
    assert follower.taken == LONG[:300]
    assert net.penalized == ["liar"]
    assert follower.peers.faults == {lie.strip(): 1}
    asked = len(net.servers["liar"].asked)
    await follower.catch_up.follow(everyone=True)
    assert len(net.servers["liar"].asked) == asked <= 2


async def test_a_fork_at_the_tip_is_noticed_and_looked_at(autojump_clock: trio.testing.MockClock) -> None:
    header = structs.replace(LONG[9].block.header, timestamp=5)
    other = Block(header, (), LONG[9].block.parent_certificate)
    forked = Server([*LONG[:9], FinalBlock(other, finalize(other))])
    forger = Server([*LONG[:9], FinalBlock(other, structs.replace(finalize(other), view=2))])
    mixer = Server([*LONG[:9], FinalBlock(other, LONG[9].certificate)])
    net = Net(honest=Server(LONG[:10]))
    follower = Follower(net)
    await follower.catch_up.follow(everyone=True)
    net.servers |= {"forked": forked, "forger": forger, "mixer": mixer}
    await follower.catch_up.follow(everyone=True)
    assert follower.peers.faults == {"fork": 1, "bad-signature": 1, "wrong-block": 1}
    assert sorted(net.penalized) == ["forger", "mixer"]
    assert [final.block.hash for final in follower.suspects] == [other.hash] * 3


async def test_a_silent_peer_holds_up_nobody_for_long(autojump_clock: trio.testing.MockClock) -> None:
    silent = {f"s{i}": Server(LONG, lambda request, finals: None) for i in range(3)}
    net = Net(**silent, honest=Server(LONG))
    follower = Follower(net)
    start = trio.current_time()
    await follower.catch_up.follow(everyone=True)
    assert follower.taken == LONG
    assert trio.current_time() - start < 11
    assert net.penalized == []
    assert follower.peers.faults["stalled"] == 3


async def test_peers_that_only_stall_are_asked_less_and_less(autojump_clock: trio.testing.MockClock) -> None:
    net = Net(silent=Server(LONG, lambda request, finals: None))
    follower = Follower(net)
    for _ in range(600):
        await follower.catch_up.follow(everyone=True)
        await trio.sleep(1)
    assert 3 <= len(net.servers["silent"].asked) <= 14


@pytest.mark.parametrize("claims", [10**12, 2**63 - 1])
async def test_a_false_height_is_believed_only_until_it_must_be_served(
    claims: int, autojump_clock: trio.testing.MockClock
) -> None:
    empty = Server(LONG[:10], claims=claims)
    follower = Follower(Net(boaster=empty, honest=Server(LONG[:10])))
    await follower.catch_up.follow(everyone=True)
    assert follower.taken == LONG[:10]
    assert follower.catch_up.target == 10
    assert not follower.catch_up.is_behind
    assert set(follower.peers.faults) == {"empty-answer"}


async def test_short_answers_are_completed_and_pruned_peers_asked_only_for_what_they_have(
    autojump_clock: trio.testing.MockClock,
) -> None:
    short = Server(LONG[:300], lambda request, finals: packed(finals[:50]))
    pruned = Server(LONG[:300])
    pruned.base = 200
    follower = Follower(Net(short=short, pruned=pruned))
    await follower.catch_up.follow(everyone=True)
    assert follower.taken == LONG[:300]
    assert all(request.first >= 200 for request in pruned.asked)
    assert follower.peers.faults == {}


async def test_a_peer_that_is_gone_is_not_asked_again_and_again(autojump_clock: trio.testing.MockClock) -> None:
    asked = 0

    class Leaving(Net):
        async def request(self, peer: str, data: bytes) -> bytes:
            nonlocal asked
            if isinstance(decode_request(data, CHAIN), StatusRequest):
                return await super().request(peer, data)
            asked += 1
            self.servers.pop(peer, None)
            follower.peers.connected()  # as the status of the peer asks for it
            await trio.sleep(0.01)
            raise RequestFailed("gone")

    follower = Follower(Leaving(one=Server(LONG)))
    with trio.move_on_after(20) as limit:
        await follower.catch_up.follow(everyone=True)
    assert asked == 1
    assert not limit.cancelled_caught


async def test_nobody_to_follow_is_no_reason_to_wait(autojump_clock: trio.testing.MockClock) -> None:
    far = Server(LONG)
    far.base = 500
    for net in (Net(), Net(far=far), Net(same=Server([]))):
        follower = Follower(net)
        with trio.fail_after(1):
            await follower.catch_up.follow(everyone=True)
        assert follower.taken == []
