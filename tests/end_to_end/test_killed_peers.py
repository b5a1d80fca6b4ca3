"""kill -9 of a worker in the middle of a step, and of a validator that comes back."""

import signal
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
    happened = [kind for kind, _ in events_on_chain(train.out / "chain.db")]
    assert not PUNISHMENTS & set(happened)
    assert "left" in {event["event"] for event in events}


async def test_a_killed_validator_catches_up_and_never_signs_twice(tmp_path: Path) -> None:
    async with network(tmp_path / "network", peers=4, workers=0) as swarm:
        swarm.peers[3].process.send_signal(signal.SIGKILL)
        for _ in range(3):
            before = int(swarm.ask(0, "status")["height"])
            await swarm.peers[3].process.wait()
            await height_of(swarm, 0, before + 2)
            async with peer(swarm, 3):
                await height_of(swarm, 3, before + 3)
                height = str(before + 1)
                assert swarm.ask(3, "block", id=height)["hash"] == swarm.ask(0, "block", id=height)["hash"]
                swarm.peers[3].process.send_signal(signal.SIGKILL)
    kinds = [kind for kind, _ in events_on_chain(swarm.home(0) / "chain.db")]
    assert "equivocation" not in kinds


async def height_of(swarm: Swarm, index: int, height: int) -> None:
    """Wait until a peer has that block; heartbeat blocks come without transactions."""
    with trio.fail_after(PATIENCE):
        while int(swarm.ask(index, "status")["height"]) < height:
            await trio.sleep(0.1)
