"""Below a trusted block only its ancestors are taken, whoever holds the keys of validators that have left."""

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import pytest
import trio
import trio.testing
from msgspec import structs

from chain import trusted_path
from chain.blocks import Header, Reason, Refused
from chain.codec import DecodeError, encode
from chain.engine import ChainEngine, Distrusted
from chain.engine_gate import ACCEPTED, Disposition
from chain.hashing import digest
from chain.light import Trust
from chain.sync import (
    MAX_HEADERS,
    HeadersReply,
    HeadersRequest,
    LightRequest,
    StatusReply,
    StatusRequest,
    SyncRequest,
    decode_headers,
    decode_request,
)
from chain.trusted_path import TrustedPath
from tests.chain.hub import CONFIG, Hub, genesis_of, keys, running, until_height
from tests.chain.test_blocks import CHAIN
from tests.chain.test_sync import chain_of

MEMBERS = keys(5)
GENESIS = genesis_of(MEMBERS[:4], MEMBERS[4:])
HEIGHT = 6
HEADERS = [final.block.header for final in chain_of(20)]
TRUST = Trust(20, HEADERS[-1].hash)


@pytest.fixture(autouse=True)
def _few_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trusted_path, "MAX_HEADERS", 2)


@dataclass
class Liar:
    """A server of a false history of the same genesis, whose validators' keys it holds."""

    false: ChainEngine
    true: ChainEngine
    answers: Callable[[SyncRequest], ChainEngine | bytes | None]

    def deliver(self, topic: str, sender: str, data: bytes) -> Disposition:
        return ACCEPTED

    async def take(self, data: bytes) -> Disposition:
        return ACCEPTED

    async def serve(self, sender: str, data: bytes) -> bytes:
        answer = self.answers(decode_request(data, GENESIS.chain_id))
        if isinstance(answer, bytes):
            return answer
        return await (answer or self.false).serve(sender, data)


@asynccontextmanager
async def two_histories(folder: Path) -> AsyncIterator[tuple[ChainEngine, ChainEngine, Trust]]:
    """Grow two networks of one genesis and the same keys; yield a peer of each and a trusted block of the first."""
    for name in ("", "late"):
        hub = Hub()
        async with AsyncExitStack() as stack:
            for i, key in enumerate(MEMBERS[:4]):
                home = folder / f"{name}{i}"
                engine = await stack.enter_async_context(running(hub, home, GENESIS, key, name=name and f"{name}{i}"))
            await until_height(engine, HEIGHT + 2)
    async with (
        running(Hub(), folder / "3", GENESIS, MEMBERS[3], validate=False) as true,
        running(Hub(), folder / "late3", GENESIS, MEMBERS[3], validate=False) as false,
    ):
        named = true.reader.store.block(HEIGHT)
        assert named is not None
        assert false.reader.store.block_by_hash(named[0].hash) is None
        yield true, false, Trust(HEIGHT, named[0].hash)


def joined_to(trust: Trust, **peers: "ChainEngine | Liar") -> Hub:
    return Hub(engines=cast(dict[str, ChainEngine], peers), config=replace(CONFIG, trust=trust))


async def test_a_false_history_below_the_trusted_block_is_not_taken(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with two_histories(tmp_path) as (true, false, trust):
        none = encode(HeadersReply(()))
        claims = encode(StatusReply(HEIGHT - 1, bytes(32), 1))
        liars = {
            "shows-the-trusted-block": lambda r: true if isinstance(r, LightRequest) else None,
            "shows-true-headers": lambda r: true if isinstance(r, LightRequest | HeadersRequest) else None,
            "claims-less": lambda r: claims if isinstance(r, StatusRequest) else None,
            "has-no-headers": lambda r: {LightRequest: true, HeadersRequest: none}.get(type(r)),
        }
        hub = joined_to(trust, **{name: Liar(false, true, answers) for name, answers in liars.items()})
        async with running(hub, tmp_path / "late", GENESIS, MEMBERS[4]) as late:
            await trio.sleep(60)
            assert late.state.height == 0
            assert late.status()["syncing"]
            hub.engines["honest"] = true
            with trio.fail_after(60):
                await until_height(late, true.state.height)
            assert late.status()["warning"] is None
        assert {peer for peer, _ in hub.penalized} <= liars.keys() - {"claims-less"}


async def test_a_false_history_that_is_stored_already_is_told_and_blamed_on_nobody(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with two_histories(tmp_path) as (true, false, trust):
        hub = Hub(engines={"false": false})
        async with running(hub, tmp_path / "late", GENESIS, MEMBERS[4]) as late:
            hub.engines["false"] = cast(
                ChainEngine,
                Liar(
                    false,
                    true,
                    lambda r: encode(StatusReply(3, bytes(32), 1)) if isinstance(r, StatusRequest) else None,
                ),
            )
            await until_height(late, 3)
            hub.engines.clear()
            assert late.state.height < HEIGHT
        hub = joined_to(trust, honest=true)
        with pytest.RaisesGroup(
            pytest.RaisesExc(Distrusted, match="another history: move chain.db away"),
            flatten_subgroups=True,
            allow_unwrapped=True,
        ):
            async with running(hub, tmp_path / "late", GENESIS, MEMBERS[4]):
                await trio.sleep(60)
        assert hub.penalized == []


def test_the_path_takes_ancestors_only() -> None:
    path = TrustedPath(TRUST, CHAIN)
    request = path.wanted(0)
    assert request == HeadersRequest(CHAIN, 20, 2)
    assert not path.allows(19, HEADERS[18].hash)
    for bad in ([HEADERS[18]], [HEADERS[19], HEADERS[18]], [structs.replace(HEADERS[19], timestamp=8)]):
        with pytest.raises(Refused) as refusal:
            path.extend(bad)
        assert refusal.value.reason == Reason.WRONG_BLOCK
    assert path.lowest == 20
    while (request := path.wanted(0)) is not None:
        path.extend(HEADERS[request.last - request.count : request.last])
    assert path.lowest == 0
    assert all(path.allows(header.height, header.hash) for header in HEADERS)
    assert not any(path.allows(header.height, digest("another")) for header in HEADERS)
    assert path.allows(21, digest("whatever"))
    path.check(0, CHAIN)
    path.check(7, HEADERS[6].hash)
    for height in (0, 7):
        with pytest.raises(Distrusted):
            path.check(height, digest("another"))
    path.forget()
    assert path.lowest == 20


@pytest.mark.parametrize("trust", [Trust(19, TRUST.block_hash), Trust(21, TRUST.block_hash)])
def test_a_trusted_block_of_another_height_is_told(trust: Trust) -> None:
    with pytest.raises(Distrusted):
        TrustedPath(trust, CHAIN).extend([HEADERS[19]])
    with pytest.raises(Distrusted):
        TrustedPath(TRUST, digest("another network")).extend([HEADERS[19]])


def test_header_replies_are_bounded() -> None:
    request = HeadersRequest(CHAIN, 20, 2)
    assert decode_headers(encode(HeadersReply(tuple(HEADERS[18:]))), request) == tuple(HEADERS[18:])
    for headers, reason in (((), Reason.EMPTY_ANSWER), (HEADERS[17:], Reason.TOO_MANY_BLOCKS)):
        with pytest.raises(Refused) as refusal:
            decode_headers(encode(HeadersReply(tuple(headers))), request)
        assert refusal.value.reason == reason
    with pytest.raises(DecodeError):
        decode_headers(encode((tuple([HEADERS[0]] * (MAX_HEADERS + 1)),)), request)
    with pytest.raises(DecodeError):
        decode_request(encode(HeadersRequest(CHAIN, 20, MAX_HEADERS + 1)), CHAIN)


async def test_the_served_headers_end_with_the_one_asked_for(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with running(Hub(), tmp_path / "0", genesis_of(MEMBERS[:1], []), MEMBERS[0]) as engine:
        await until_height(engine, 5)
        chain_id = genesis_of(MEMBERS[:1], []).chain_id

        async def heights(last: int, count: int) -> list[int]:
            request = HeadersRequest(chain_id, last, count)
            try:
                found: tuple[Header, ...] = decode_headers(await engine.serve("peer", encode(request)), request)
            except Refused:
                return []
            return [header.height for header in found]

        assert await heights(4, 3) == [2, 3, 4]
        assert await heights(2, 9) == [1, 2]
        assert await heights(10**6, 3) == []
