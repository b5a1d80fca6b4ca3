"""Engines with real databases on an in-memory network and a virtual clock."""

from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trio
import trio.testing
from msgspec import structs

from chain.blocks import Block, Vote, VoteKind, decode_message, vote_bytes
from chain.codec import encode
from chain.engine import Action, ChainEngine
from chain.genesis import Genesis
from chain.hashing import ZERO
from chain.keys import PrivateKey
from chain.randomness import onion_of
from chain.transactions import Bond, RegisterValidator, Transfer
from tests.chain.hub import START_MS, Hub, genesis_of, keys, running, until_height


async def start_all(
    stack: AsyncExitStack, hub: Hub, folder: Path, genesis: Genesis, members: list[PrivateKey]
) -> list[ChainEngine]:
    return [
        await stack.enter_async_context(running(hub, folder / str(i), genesis, key)) for i, key in enumerate(members)
    ]


async def test_four_validators_finalize_transfers(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    members, hub = keys(4), Hub()
    genesis = genesis_of(members, [])
    async with AsyncExitStack() as stack:
        engines = await start_all(stack, hub, tmp_path, genesis, members)
        to = members[1].account
        names = [await engines[0].submit(Transfer(to, 10)) for _ in range(5)]
        names.append(await engines[2].submit(Transfer(to, 1)))
        with trio.fail_after(20):
            receipts = [await engines[0].receipt(name) for name in names[:5]]
            receipts.append(await engines[2].receipt(names[5]))
            assert all(receipt.ok for receipt in receipts)
            height = engines[0].state.height
            for engine in engines:
                await until_height(engine, height)
        assert len({engine.state.root for engine in engines}) == 1
        assert engines[3].state.account(to).balance == 1_000_051
        assert hub.refused == []
        assert hub.penalized == []


async def test_idle_chain_beats_slowly_and_takes_a_transaction_at_once(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    members, hub = keys(4), Hub()
    async with AsyncExitStack() as stack:
        engines = await start_all(stack, hub, tmp_path, genesis_of(members, []), members)
        await until_height(engines[0], 2)
        start, height = trio.current_time(), engines[0].state.height
        await until_height(engines[0], height + 4)
        assert 19 <= trio.current_time() - start <= 22
        await trio.sleep(2)
        start = trio.current_time()
        assert (await engines[0].receipt(await engines[0].submit(Transfer(members[1].account, 1)))).ok
        assert trio.current_time() - start < 0.6


async def test_busy_chain_makes_a_block_each_interval(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    members, hub = keys(4), Hub()
    async with AsyncExitStack() as stack:
        engines = await start_all(stack, hub, tmp_path, genesis_of(members, []), members)
        await until_height(engines[0], 1)
        start = trio.current_time()
        for _ in range(10):
            assert (await engines[1].receipt(await engines[1].submit(Transfer(members[2].account, 1)))).ok
        assert 8 <= trio.current_time() - start <= 14
        assert engines[0].status()["view"] == 1


async def test_crashed_validator_restarts_from_disk_and_catches_up(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    members, hub = keys(4), Hub()
    genesis = genesis_of(members, [])
    async with AsyncExitStack() as stack:
        engines = await start_all(stack, hub, tmp_path, genesis, members[:3])
        async with running(hub, tmp_path / "3", genesis, members[3]) as last:
            await until_height(last, 2)
        name = await engines[0].submit(Transfer(members[1].account, 7))
        with trio.fail_after(60):
            assert (await engines[0].receipt(name)).ok
            await until_height(engines[0], 6)
        async with running(hub, tmp_path / "3", genesis, members[3]) as last:
            assert last.state.height >= 2
            with trio.fail_after(60):
                await until_height(last, engines[0].state.height)
                height = engines[0].state.height
                await until_height(last, height + 5)
            assert last.state.account(members[1].account).balance == 1_000_007
            assert last.status()["is_validator"]
    assert hub.refused == []
    assert hub.penalized == []


async def test_all_crash_at_once_and_go_on(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    members, hub = keys(3), Hub()
    genesis = genesis_of(members, [])
    for round_ in range(1, 6):
        async with AsyncExitStack() as stack:
            engines = await start_all(stack, hub, tmp_path, genesis, members)
            with trio.fail_after(60):
                await until_height(engines[0], engines[0].state.height + 1)
                await trio.sleep(0.01 * round_)
        assert hub.refused == []


async def test_late_follower_syncs_fifty_blocks(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    members, hub = keys(5), Hub()
    genesis = genesis_of(members[:4], members[4:])
    async with AsyncExitStack() as stack:
        engines = await start_all(stack, hub, tmp_path, genesis, members[:4])
        await until_height(engines[0], 50)
        late = await stack.enter_async_context(running(hub, tmp_path / "late", genesis, members[4]))
        with trio.fail_after(10):
            await until_height(late, 50)
        assert not late.status()["is_validator"]
        assert (await late.receipt(await late.submit(Transfer(members[0].account, 5)))).ok
        await trio.sleep(1)
        assert engines[0].state.account(members[0].account).balance == 1_000_005


async def test_partition_halts_says_so_and_heals(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    members, hub = keys(4), Hub()
    genesis = genesis_of(members, [])
    async with AsyncExitStack() as stack:
        engines = await start_all(stack, hub, tmp_path, genesis, members)
        await until_height(engines[0], 2)
        assert engines[0].status()["halted"] is None
        peers = list(hub.engines)
        hub.group = {peers[2]: 1, peers[3]: 1}
        await trio.sleep(60)
        height = engines[0].state.height
        halted = engines[0].status()["halted"]
        assert halted is not None
        assert "50 % of the stake are silent" in halted
        hub.group = {}
        with trio.fail_after(30):
            for engine in engines:
                await until_height(engine, height + 2)
        assert engines[0].status()["halted"] is None


async def test_new_validator_votes_when_the_set_contains_it(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    members, hub = keys(5), Hub()
    genesis = genesis_of(members[:4], members[4:])
    async with AsyncExitStack() as stack:
        engines = await start_all(stack, hub, tmp_path, genesis, members)
        new = engines[4]
        assert (await new.receipt(await new.submit(Bond(10_000)))).ok
        tip = onion_of(members[4]).tip
        assert (await new.receipt(await new.submit(RegisterValidator(tip)))).ok
        with trio.fail_after(500):
            async with new.subscribe() as blocks:
                while (await blocks.receive()).block.header.proposer != members[4].account:
                    pass
        assert new.status()["is_validator"]
        assert len(new.state.validators()) == 5
    assert hub.refused == []


async def test_one_validator_alone(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    members, hub = keys(1), Hub()
    genesis = genesis_of(members, [])
    for _ in range(3):
        async with running(hub, tmp_path / "0", genesis, members[0]) as engine:
            with trio.fail_after(30):
                await until_height(engine, engine.state.height + 3)


async def test_subscribers_see_every_block_with_receipts(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    members, hub = keys(1), Hub()
    async with running(hub, tmp_path / "0", genesis_of(members, []), members[0]) as engine:
        async with engine.subscribe() as blocks:
            name = await engine.submit(Transfer(members[0].account, 1))
            first, second = await blocks.receive(), await blocks.receive()
        assert [first.block.height, second.block.height] == [1, 2]
        assert name in {receipt.tx_id for receipt in (*first.receipts, *second.receipts)}


async def test_missing_signing_record_means_following(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    members, hub = keys(1), Hub()
    genesis = genesis_of(members, [])
    async with running(hub, tmp_path / "0", genesis, members[0]) as engine:
        await until_height(engine, 1)
    (tmp_path / "0" / "signing.db").unlink()
    async with running(hub, tmp_path / "0", genesis, members[0]) as engine:
        height = engine.state.height
        await trio.sleep(60)
        assert engine.state.height == height
        assert "signing.db is missing" in engine.status()["follows_because"]


async def test_false_messages_are_refused_by_name(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    members, hub = keys(2), Hub()
    async with running(hub, tmp_path / "0", genesis_of(members, []), members[0]) as engine:
        chain_id = engine.state.chain.chain_id
        stranger = PrivateKey(bytes(31) + b"\x09")

        def vote(key: PrivateKey, chain: bytes, height: int = 1, view: int = 1) -> bytes:
            said = vote_bytes(VoteKind.NULLIFY, chain, height, view, ZERO)
            return encode(Vote(VoteKind.NULLIFY, chain, height, view, ZERO, key.account, key.sign(said)))

        forged = decode_message(vote(stranger, chain_id))
        forged = structs.replace(forged, validator=members[1].account)
        answers = {
            "malformed": engine.deliver("vote", "x", b"\x93\x01"),
            "wrong-chain": engine.deliver("vote", "x", vote(members[1], bytes(32))),
            "unknown-validator": engine.deliver("vote", "x", vote(stranger, chain_id)),
            "bad-signature": engine.deliver("vote", "x", encode(forged)),
            "unknown-topic": engine.deliver("gossip", "x", b""),
        }
        assert {reason: (a.action, a.reason) for reason, a in answers.items()} == {
            reason: (Action.REJECT, reason) for reason in answers
        }
        assert engine.deliver("vote", "x", vote(members[1], chain_id, height=9)).reason == "future-height"
        assert engine.deliver("vote", "x", vote(members[1], chain_id, view=2**31)).reason == "far-view"
        assert engine.deliver("vote", "x", vote(members[1], chain_id)).action == Action.ACCEPT
        assert engine.deliver("vote", "x", vote(members[1], chain_id)).reason == "known"
        assert engine.status()["messages"]["vote reject bad-signature"] == 1


async def test_a_key_that_runs_twice_is_tombstoned_and_the_chain_goes_on(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    members, hub = keys(4), Hub()
    genesis = genesis_of(members, [])
    twin = members[3]
    async with AsyncExitStack() as stack:
        engines = await start_all(stack, hub, tmp_path, genesis, members)
        await stack.enter_async_context(running(hub, tmp_path / "twin", genesis, twin, name="twin"))
        async with engines[0].subscribe() as blocks:
            with trio.fail_after(300):
                while twin.account in engines[0].state.validators():
                    await blocks.receive()
        validator = engines[0].state.validator(twin.account)
        assert validator is not None
        assert validator.is_tombstoned
        assert {account for account, _ in engines[0].state.validators().members} == {key.account for key in members[:3]}
        with trio.fail_after(60):
            await until_height(engines[1], engines[1].state.height + 3)


async def test_a_proposal_that_does_not_execute_costs_its_leader_only_the_view(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    members, hub = keys(4), Hub()
    genesis = genesis_of(members, [])
    async with AsyncExitStack() as stack:
        engines = await start_all(stack, hub, tmp_path, genesis, members)

        def lie(block: Block) -> Block:
            header = structs.replace(block.header, state_root=bytes(32))
            return Block(header, block.transactions, block.parent_certificate)

        machine_type = type(engines[3]._core.machine)
        honest = machine_type.on_built
        monkey = stack.enter_context(pytest.MonkeyPatch.context())
        monkey.setattr(
            machine_type,
            "on_built",
            lambda self, view, block: honest(
                self, view, lie(block) if self.config.account == members[3].account else block
            ),
        )
        proposers: list[bytes] = []
        async with engines[0].subscribe() as blocks:
            with trio.fail_after(300):
                while len(proposers) < 20:
                    proposers.append((await blocks.receive()).block.header.proposer)
        assert set(proposers) == {key.account for key in members[:3]}
        assert len(engines[0].state.validators()) == 4


async def test_a_genesis_of_the_future_waits_for_its_time(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    members, hub = keys(3), Hub()
    genesis = structs.replace(genesis_of(members, []), timestamp=START_MS + 60_000)
    async with AsyncExitStack() as stack:
        engines = await start_all(stack, hub, tmp_path, genesis, members)
        await trio.sleep(40)
        assert engines[0].state.height == 0
        assert any("clock" in str(engine.status()["follows_because"]) for engine in engines)
        assert max(engine.status()["view"] for engine in engines) < 20
        with trio.fail_after(90):
            await until_height(engines[0], 2)
