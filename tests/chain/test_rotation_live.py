"""Real engines: a validator goes on under a fresh key, and a vote changes how the chain runs."""

from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import trio.testing
from msgspec.structs import replace

from chain.engine import ChainEngine
from chain.keys import PrivateKey
from chain.randomness import onion_of
from chain.transactions import RotateKey, VoteParams, rotation_bytes
from tests.chain.hub import Hub, genesis_of, keys, running, until_height

QUICK: dict[str, Any] = {"epoch_blocks": 4, "block_interval_ms": 500, "heartbeat_ms": 500, "unbonding_blocks": 400}


async def until_in_set(engine: ChainEngine, key: PrivateKey, *, present: bool) -> None:
    async with engine.subscribe() as blocks:
        while (key.account in engine.state.validators()) != present:
            await blocks.receive()


async def test_a_validator_stops_rotates_and_validates_again_under_its_new_key(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    members, hub = keys(5), Hub()
    old, new = members[3], members[4]
    genesis = genesis_of(members[:4], [], **QUICK)
    with trio.fail_after(600):
        async with AsyncExitStack() as stack:
            engines = [
                await stack.enter_async_context(running(hub, tmp_path / str(i), genesis, members[i])) for i in range(3)
            ]
            async with running(hub, tmp_path / "3", genesis, old) as leaving:
                proof = new.sign(rotation_bytes(genesis.chain_id, old.account))
                payload = RotateKey(new.account, onion_of(new).tip, proof)
                assert (await leaving.receipt(await leaving.submit(payload))).ok
                await until_in_set(engines[0], old, present=False)
                assert not leaving.status()["is_validator"]
                await until_height(leaving, leaving.state.height + 2)
            back = await stack.enter_async_context(running(hub, tmp_path / "4", genesis, new))
            await until_in_set(engines[0], new, present=True)
            async with back.subscribe() as blocks:
                while (await blocks.receive()).block.header.proposer != new.account:
                    pass
            assert back.status()["is_validator"]
            assert engines[0].state.validator(new.account).missed == ()  # type: ignore[union-attr]
            assert engines[0].state.heir(old.account) == new.account
    assert hub.refused == []
    assert hub.penalized == []


async def test_a_vote_slows_the_heartbeat_of_a_running_chain(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    members, hub = keys(4), Hub()
    genesis = genesis_of(members, [], **QUICK)
    with trio.fail_after(600):
        async with AsyncExitStack() as stack:
            engines = [
                await stack.enter_async_context(running(hub, tmp_path / str(i), genesis, key))
                for i, key in enumerate(members)
            ]
            vote = VoteParams(replace(genesis.params, heartbeat_ms=4000))
            for engine in engines[:3]:
                assert (await engine.receipt(await engine.submit(vote))).ok
            async with engines[0].subscribe() as blocks:
                while engines[0].state.params != vote.params:
                    await blocks.receive()
            first = engines[0].state.height + 1
            await until_height(engines[0], first)
            began = trio.current_time()
            await until_height(engines[0], first + 5)
            assert 18 <= trio.current_time() - began <= 24
    assert hub.refused == []
