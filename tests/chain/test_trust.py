"""Weak subjectivity: a chain without the trusted block is refused, and an old tip asks for one."""

import sqlite3
from contextlib import AsyncExitStack, closing
from dataclasses import replace
from pathlib import Path

import pytest
import trio
import trio.testing

from chain.engine import Distrusted
from chain.hashing import digest
from chain.light import Trust
from tests.chain.hub import CONFIG, Hub, clock_ms, genesis_of, keys, running, until_height

MEMBERS = keys(5)
GENESIS = genesis_of(MEMBERS[:4], MEMBERS[4:])
FALSE = digest("another chain")


async def grown(stack: AsyncExitStack, hub: Hub, folder: Path, height: int) -> list[bytes]:
    """Start four validators and return the hashes of their first blocks."""
    engines = [
        await stack.enter_async_context(running(hub, folder / str(i), GENESIS, key))
        for i, key in enumerate(MEMBERS[:4])
    ]
    await until_height(engines[0], height)
    found = [engines[0].reader.store.block(h) for h in range(1, height + 1)]
    return [pair[0].hash for pair in found if pair]


async def test_servers_without_the_trusted_block_are_not_followed(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    hub = Hub()
    async with AsyncExitStack() as stack:
        hashes = await grown(stack, hub, tmp_path, 8)
        hub.config = replace(CONFIG, trust=Trust(5, FALSE))
        async with running(hub, tmp_path / "wary", GENESIS, MEMBERS[4]) as wary:
            await trio.sleep(30)
            assert wary.state.height == 0
            assert {reason for _, reason in hub.penalized} == {f"wrong-block: not the trusted block {Trust(5, FALSE)}"}
        hub.config, hub.penalized = replace(CONFIG, trust=Trust(5, hashes[4])), []
        async with running(hub, tmp_path / "sure", GENESIS, MEMBERS[4]) as sure:
            with trio.fail_after(20):
                await until_height(sure, 8)
            assert hub.penalized == []


async def test_an_own_store_without_the_trusted_block_ends_the_start(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    hub = Hub()
    async with AsyncExitStack() as stack:
        hashes = await grown(stack, hub, tmp_path, 6)
    for trust in (Trust(4, hashes[3]), Trust(10**6, FALSE)):
        hub.config = replace(CONFIG, trust=trust)
        async with running(hub, tmp_path / "0", GENESIS, MEMBERS[0]) as engine:
            assert engine.state.height >= 6
    hub.config = replace(CONFIG, trust=Trust(4, FALSE))
    with pytest.RaisesGroup(Distrusted, flatten_subgroups=True, allow_unwrapped=True):
        async with running(hub, tmp_path / "0", GENESIS, MEMBERS[0]):
            pass


async def test_validators_cannot_make_final_what_does_not_lead_to_the_trusted_block(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    hub = Hub(config=replace(CONFIG, trust=Trust(3, FALSE)))
    async with running(hub, tmp_path / "0", genesis_of(MEMBERS[:1], []), MEMBERS[0]) as engine:
        await trio.sleep(60)
        assert engine.state.height == 0
        assert engine.status()["syncing"]
        assert engine.status()["warning"] == (
            f"The trusted block {Trust(3, FALSE)} is not here, and no peer has shown yet what leads to it: "
            "until one does, nothing beyond block 0 is taken."
        )


async def test_a_clock_behind_the_chain_is_told(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    hub = Hub()
    async with AsyncExitStack() as stack:
        for i, key in enumerate(MEMBERS[:4]):
            await stack.enter_async_context(running(hub, tmp_path / str(i), GENESIS, key))
        hub.config = replace(CONFIG, clock_ms=lambda: clock_ms() - 61_000)
        late = await stack.enter_async_context(running(hub, tmp_path / "late", GENESIS, MEMBERS[4], validate=False))
        await until_height(late, 3)
        assert 60_000 < late.status()["clock_behind_ms"] < 62_000
        assert next(iter(hub.engines.values())).status()["clock_behind_ms"] < 1000


async def test_an_old_tip_asks_for_a_trusted_block(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    hub = Hub()
    genesis = genesis_of(MEMBERS[:2], [], unbonding_blocks=300)
    async with AsyncExitStack() as stack:
        engines = [
            await stack.enter_async_context(running(hub, tmp_path / str(i), genesis, key))
            for i, key in enumerate(MEMBERS[:2])
        ]
        await until_height(engines[0], 2)
        assert engines[0].status()["warning"] is None
        hub.group = {peer: i for i, peer in enumerate(hub.engines)}
        await trio.sleep(300)
        said = engines[0].status()["warning"]
        assert said.startswith("The newest block here is 5 minutes old, more than the trusting period of 3 minutes")
        assert "--trust HEIGHT:HASH" in said


async def test_a_trusted_block_silences_the_warning_only_where_it_is_kept(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    hub = Hub()
    genesis = genesis_of(MEMBERS[:2], [], unbonding_blocks=300)
    async with AsyncExitStack() as stack:
        for i, key in enumerate(MEMBERS[:2]):
            engine = await stack.enter_async_context(running(hub, tmp_path / str(i), genesis, key))
        await until_height(engine, 4)
        kept = engine.reader.store.block(2)
        assert kept is not None
        trust = Trust(2, kept[0].hash)
    await trio.sleep(300)
    hub.config = replace(CONFIG, trust=trust)
    async with running(hub, tmp_path / "0", genesis, MEMBERS[0], validate=False) as engine:
        assert engine.status()["warning"] is None
    with closing(sqlite3.connect(tmp_path / "0" / "chain.db")) as database, database:
        database.execute("DELETE FROM blocks WHERE height < 4")
    async with running(hub, tmp_path / "0", genesis, MEMBERS[0], validate=False) as engine:
        assert "--trust HEIGHT:HASH of a newer block" in engine.status()["warning"]
