"""Chains that go on, or halt and say so, when things are bad: real engines in virtual time."""

from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from msgspec import structs

from chain.blocks import Proposal, decode_message
from chain.codec import encode
from chain.engine import ChainEngine
from chain.genesis import Genesis
from chain.keys import PrivateKey, peer_id
from chain.randomness import onion_of
from chain.transactions import Bond, RegisterValidator, Transfer, Unbond, Unjail
from tests.chain.hub import Hub, genesis_of, keys, running, until_height


async def start_all(
    stack: AsyncExitStack, hub: Hub, folder: Path, genesis: Genesis, members: list[PrivateKey]
) -> list[ChainEngine]:
    return [
        await stack.enter_async_context(running(hub, folder / str(i), genesis, key)) for i, key in enumerate(members)
    ]


def agree(engines: list[ChainEngine], height: int) -> bool:
    """Whether all hold the same block of a height."""
    return len({found[0].hash for engine in engines if (found := engine.reader.store.block(height))}) == 1


async def all_reach(engines: list[ChainEngine], height: int, seconds: float) -> None:
    """Wait until every engine has a block of `height`; fail when that takes longer."""
    with trio.fail_after(seconds):
        for engine in engines:
            await until_height(engine, height)
    assert agree(engines, height)


async def keep_busy(engine: ChainEngine, to: bytes) -> None:
    """Send a transfer a second, so that blocks are due at full rate."""
    while True:
        await engine.submit(Transfer(to, 1))
        await trio.sleep(1)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
async def test_few_validators(count: int, tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    members, hub = keys(count), Hub()
    genesis = genesis_of(members, [])
    async with AsyncExitStack() as stack:
        engines = await start_all(stack, hub, tmp_path, genesis, members)
        with trio.fail_after(30):
            assert (await engines[0].receipt(await engines[0].submit(Transfer(members[-1].account, 1)))).ok
        await all_reach(engines, 8, 60)
    assert hub.refused == []


@pytest.mark.parametrize("count", [2, 3, 4])
async def test_a_missing_validator_stops_up_to_three_and_not_four(
    count: int, tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    members, hub = keys(count), Hub()
    genesis = genesis_of(members, [])
    async with AsyncExitStack() as stack:
        engines = await start_all(stack, hub, tmp_path, genesis, members[:-1])
        await trio.sleep(120)
        height, halted = engines[0].state.height, engines[0].status()["halted"]
        if count == 4:
            assert height > 3
            assert halted is None
            return
        assert height == 0
        assert peer_id(members[-1].account) in halted
        last = await stack.enter_async_context(running(hub, tmp_path / "last", genesis, members[-1]))
        await all_reach([*engines, last], 3, 60)


async def test_one_with_nine_tenths_of_the_stake_decides_alone(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    members, hub = keys(4), Hub()
    genesis = genesis_of(members, [], (90_000, 4_000, 3_000, 3_000))
    async with AsyncExitStack() as stack:
        engines = await start_all(stack, hub, tmp_path, genesis, members)
        await all_reach(engines, 6, 60)
        proposers = {engines[0].reader.store.block(h)[0].header.proposer for h in range(1, 7)}  # type: ignore[index]
        assert members[0].account in proposers
        hub.group = {peer: i for i, peer in enumerate(hub.engines)}
        height = engines[0].state.height
        await all_reach(engines[:1], height + 3, 200)
        await trio.sleep(60)
        assert engines[1].state.height <= height + 1
        assert "96 % of the stake are silent" in engines[1].status()["halted"]
        hub.group = {}
        await all_reach(engines, engines[0].state.height + 2, 60)
    assert hub.refused == []


@pytest.mark.parametrize("seed", range(3))
async def test_ten_percent_loss(seed: int, tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    members, hub = keys(4), Hub(loss=0.1)
    hub.dice.seed(seed)
    genesis = genesis_of(members, [])
    async with AsyncExitStack() as stack:
        engines = await start_all(stack, hub, tmp_path, genesis, members)
        nursery = await stack.enter_async_context(trio.open_nursery())
        nursery.start_soon(keep_busy, engines[0], members[1].account)
        await all_reach(engines, 30, 120)
        nursery.cancel_scope.cancel()
    assert hub.refused == []
    assert hub.penalized == []


async def test_a_partition_of_thirty_seconds(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """The larger side goes on with 4 of 5; neither does 3 of 5; both heal within seconds."""
    members, hub = keys(5), Hub()
    genesis = genesis_of(members, [])
    async with AsyncExitStack() as stack:
        engines = await start_all(stack, hub, tmp_path, genesis, members)
        await all_reach(engines, 3, 60)
        peers = list(hub.engines)
        nursery = await stack.enter_async_context(trio.open_nursery())
        nursery.start_soon(keep_busy, engines[0], members[1].account)
        for away, goes_on in ((peers[4:], True), (peers[3:], False)):
            hub.group = dict.fromkeys(away, 1)
            await trio.sleep(1)
            height = engines[0].state.height
            await trio.sleep(30)
            assert (engines[0].state.height >= height + 10) == goes_on
            assert engines[4].state.height <= height + 1
            hub.group = {}
            await all_reach(engines, engines[0].state.height + 3, 30)
        nursery.cancel_scope.cancel()
    assert hub.refused == []
    assert hub.penalized == []


async def test_just_less_than_a_third_silent(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    members, hub = keys(5), Hub()
    genesis = genesis_of(members, [], (10_000, 10_000, 13_334, 33_334, 33_332))
    async with AsyncExitStack() as stack:
        engines = await start_all(stack, hub, tmp_path, genesis, members[:4])
        nursery = await stack.enter_async_context(trio.open_nursery())
        nursery.start_soon(keep_busy, engines[0], members[1].account)
        await all_reach(engines, 30, 300)
        assert engines[0].status()["halted"] is None
        nursery.cancel_scope.cancel()


async def test_just_more_than_a_third_silent_halts_says_so_and_recovers(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    members, hub = keys(5), Hub()
    genesis = genesis_of(members, [], (10_000, 10_000, 13_334, 33_332, 33_334))
    async with AsyncExitStack() as stack:
        engines = await start_all(stack, hub, tmp_path, genesis, members[:4])
        async with running(hub, tmp_path / "4", genesis, members[4]) as last:
            await until_height(last, 3)
        await trio.sleep(300)
        height = engines[0].state.height
        for engine in engines:
            halted = engine.status()["halted"]
            assert halted.startswith("The chain waits: validators with 33 % of the stake are silent")
            assert peer_id(members[4].account) in halted
            assert "goes on by itself" in halted
        last = await stack.enter_async_context(running(hub, tmp_path / "4", genesis, members[4]))
        await all_reach([*engines, last], height + 3, 60)
        assert all(engine.status()["halted"] is None for engine in engines)


def withhold(topic: str, to: str, data: bytes) -> bytes | None:
    """Send votes and no block."""
    return None if topic == "block" else data


def to_one_only(topic: str, to: str, data: bytes) -> bytes | None:
    """Show a proposal to one peer alone."""
    return data if topic != "block" or to == peer_id(keys(4)[0].account) else None


def garble(topic: str, to: str, data: bytes) -> bytes | None:
    """Send proposals whose block is not the one that was signed."""
    message = decode_message(data) if topic == "block" else None
    if not isinstance(message, Proposal):
        return data
    header = structs.replace(message.block.header, timestamp=message.block.header.timestamp + 1)
    return encode(structs.replace(message, block=structs.replace(message.block, header=header)))


@pytest.mark.parametrize("twist", [withhold, to_one_only, garble])
async def test_a_bad_proposer_costs_only_its_views(
    twist: object, tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    members, hub = keys(4), Hub()
    genesis = genesis_of(members, [])
    bad = peer_id(members[3].account)
    hub.twists[bad] = twist  # type: ignore[assignment]
    async with AsyncExitStack() as stack:
        engines = await start_all(stack, hub, tmp_path, genesis, members)
        nursery = await stack.enter_async_context(trio.open_nursery())
        nursery.start_soon(keep_busy, engines[0], members[1].account)
        await all_reach(engines, 30, 200)
        nursery.cancel_scope.cancel()
        assert len(engines[0].state.validators()) == 4
    assert set(hub.refused) <= {("block", "wrong-block")}


QUICK: dict[str, Any] = {
    "epoch_blocks": 4,
    "jail_window": 12,
    "jail_missed": 8,
    "jail_blocks": 6,
    "unbonding_blocks": 12,
}


async def until_in_set(engine: ChainEngine, key: PrivateKey, *, present: bool) -> None:
    """Wait until a validator is, or is not, in the next set."""
    async with engine.subscribe() as blocks:
        while (key.account in engine.state.validators()) != present:
            await blocks.receive()


async def test_validators_join_leave_are_jailed_and_come_back_while_the_chain_runs(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    members, hub = keys(6), Hub()
    genesis = genesis_of(members[:5], members[5:], **QUICK)
    with trio.fail_after(900):
        async with AsyncExitStack() as stack:
            engines = await start_all(stack, hub, tmp_path, genesis, members[:4])
            nursery = await stack.enter_async_context(trio.open_nursery())
            nursery.start_soon(keep_busy, engines[0], members[1].account)
            joiner = await stack.enter_async_context(running(hub, tmp_path / "5", genesis, members[5]))
            assert (await joiner.receipt(await joiner.submit(Bond(10_000)))).ok
            assert (await joiner.receipt(await joiner.submit(RegisterValidator(onion_of(members[5]).tip)))).ok
            await until_in_set(engines[0], members[5], present=True)
            await until_in_set(engines[0], members[4], present=False)
            jailed = engines[0].state.validator(members[4].account)
            assert jailed is not None
            assert jailed.is_jailed
            back = await stack.enter_async_context(running(hub, tmp_path / "4", genesis, members[4]))
            await until_height(back, jailed.jailed_until)
            assert (await back.receipt(await back.submit(Unjail()))).ok
            await until_in_set(engines[0], members[4], present=True)
            assert (await engines[3].receipt(await engines[3].submit(Unbond(10_000)))).ok
            await until_in_set(engines[0], members[3], present=False)
            await all_reach([*engines, joiner, back], engines[0].state.height + 10, 60)
            assert joiner.status()["is_validator"]
            assert back.status()["is_validator"]
            assert not engines[3].status()["is_validator"]
            nursery.cancel_scope.cancel()
    assert hub.refused == []
    assert hub.penalized == []
