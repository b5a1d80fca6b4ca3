"""kill -9 of a worker in the middle of a step, and of a validator that comes back."""

import signal
from contextlib import closing
from itertools import combinations
from pathlib import Path

import pytest
import trio
from processes_kit import (
    PATIENCE,
    Swarm,
    client,
    events_on_chain,
    finished,
    losses,
    network,
    peer,
    step_of,
    training,
    undisturbed,
)

from chain.blocks import VoteKind, is_conflict
from chain.keys import account_of
from chain.signing import SigningRecord
from chain.store import Store
from cli.sources import DaemonSource
from tdml_p2p.home import Home

pytestmark = [pytest.mark.slow, pytest.mark.trio]
PUNISHMENTS = {"convicted", "slashed", "equivocation", "jailed"}


async def test_a_killed_worker_costs_nothing_but_itself(tmp_path: Path) -> None:
    train = training(tmp_path, steps=14)
    events: list[dict[str, object]] = []
    async with network(tmp_path / "network", peers=5, workers=4) as swarm, client(swarm, train) as running:
        with trio.fail_after(PATIENCE):
            await step_of(running, events, 3)
        swarm.peers[2].process.send_signal(signal.SIGKILL)
        with trio.fail_after(2 * PATIENCE):
            code = await finished(running, events)
    assert code == 0, running.log.read_text()[-2000:]
    assert losses(events) == pytest.approx(undisturbed(train), rel=1e-4)
    assert [event["step"] for event in events if event["event"] == "step"] == list(range(1, 15))
    happened = [kind for kind, _ in events_on_chain(train.out / "chain.db")]
    assert not PUNISHMENTS & set(happened)
    assert "left" in {event["event"] for event in events}


async def test_a_killed_validator_catches_up_and_never_signs_twice(tmp_path: Path) -> None:
    async with network(tmp_path / "network", peers=4, workers=0) as swarm, trio.open_nursery() as nursery:
        nursery.start_soon(pay, swarm)
        swarm.peers[3].process.send_signal(signal.SIGKILL)
        for _ in range(3):
            await swarm.peers[3].process.wait()
            missed = height(swarm, 0) + 2
            await height_of(swarm, 0, missed)
            async with peer(swarm, 3):
                await height_of(swarm, 3, missed)
                await signs_again(swarm, 3)
                assert swarm.ask(3, "block", id=str(missed))["raw"] == swarm.ask(0, "block", id=str(missed))["raw"]
                swarm.peers[3].process.send_signal(signal.SIGKILL)
        nursery.cancel_scope.cancel()
    kinds = [kind for kind, _ in events_on_chain(swarm.home(0) / "chain.db")]
    assert not PUNISHMENTS & set(kinds)
    agreed = [chain_of(swarm.home(index) / "chain.db") for index in range(4)]
    shared = min(map(len, agreed))
    assert shared > 6
    assert all(blocks[:shared] == agreed[0][:shared] for blocks in agreed)
    assert sum(transactions for _, _, transactions in agreed[0]) > 0
    assert_signed_once(swarm, 3, [block_hash for block_hash, _, _ in max(agreed, key=len)])


async def pay(swarm: Swarm) -> None:
    """Send one transfer after the other from the first peer to the second."""
    body = {"kind": "transfer", "to": swarm.network.peers[1], "amount": "1"}
    source = DaemonSource(swarm.home(0))
    while True:
        await trio.to_thread.run_sync(source.post, "/transactions", body, abandon_on_cancel=True)


def chain_of(path: Path) -> list[tuple[bytes, bytes, int]]:
    """Return hash, state root and number of transactions of every block in a chain's database, in order."""
    with closing(Store.open_read_only(path)) as store:
        pairs = [store.block(at) for at in range(1, store.tip()[0].height + 1)]
    return [(block.hash, block.header.state_root, len(block.transactions)) for block, _ in pairs]


def assert_signed_once(swarm: Swarm, index: int, chain: list[bytes]) -> None:
    """Check that no two votes of a peer's signing record conflict, and that none finalizes another chain."""
    home = Home(swarm.home(index))
    key, genesis = home.load_key(), home.load_genesis()
    assert genesis is not None
    record = SigningRecord.open(
        home.signing_path, chain_id=genesis.chain_id, account=key.account, sign=key.sign, tip=len(chain)
    )
    with closing(record):
        votes = [record.votes(at) for at in range(1, len(chain) + 1)]
    assert any(votes)
    for block_hash, at_height in zip(chain, votes, strict=True):
        assert not [pair for pair in combinations(at_height, 2) if is_conflict(*pair)]
        assert {vote.block_hash for vote in at_height if vote.kind == VoteKind.FINALIZE} <= {block_hash}


async def signs_again(swarm: Swarm, index: int) -> None:
    """Wait until a certificate of a new block carries a validator's signature."""
    place = sorted(map(account_of, swarm.network.peers)).index(account_of(swarm.network.peers[index]))
    at = height(swarm, 0) + 1
    with trio.fail_after(PATIENCE):
        await height_of(swarm, 0, at)
        while not swarm.ask(0, "certificate", id=str(at))["bitmap"][place]:
            at += 1
            await height_of(swarm, 0, at)


def height(swarm: Swarm, index: int) -> int:
    return int(swarm.ask(index, "status")["height"])


async def height_of(swarm: Swarm, index: int, wanted: int) -> None:
    """Wait until a peer has that block."""
    with trio.fail_after(PATIENCE):
        while height(swarm, index) < wanted:
            await trio.sleep(0.1)
