"""SIGTERM of a worker in the middle of a step: its seat goes back, and the swarm hardly notices."""

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
from processes_kit import PATIENCE, client, events_on_chain, finished, losses, network, step_of, training, undisturbed

pytestmark = [pytest.mark.slow, pytest.mark.trio]


async def test_a_worker_that_is_told_to_stop_hands_its_work_over(tmp_path: Path) -> None:
    train = training(tmp_path, steps=14)
    events: list[dict[str, object]] = []
    async with network(tmp_path / "network", peers=5, workers=4) as swarm, client(swarm, train) as running:
        with trio.fail_after(PATIENCE):
            await step_of(running, events, 3)
        swarm.peers[2].process.send_signal(signal.SIGTERM)
        with trio.fail_after(2 * PATIENCE):
            code = await finished(running, events)
        assert await swarm.peers[2].process.wait() == 0
    assert code == 0, running.log.read_text()[-2000:]
    assert losses(events) == pytest.approx(undisturbed(train), rel=1e-4)
    assert [event["step"] for event in events if event["event"] == "step"] == list(range(1, 15))
    assert len([event for event in events if event["event"] == "left"]) == 1
    left = [data for kind, data in events_on_chain(train.out / "chain.db") if kind == "left"]
    assert len(left) == 1


async def test_the_only_worker_of_a_stage_hands_its_state_to_a_spare_before_it_stops(tmp_path: Path) -> None:
    train = replace(training(tmp_path, steps=16), replicas=1, save_every=0)
    events: list[dict[str, Any]] = []
    async with network(tmp_path / "network", peers=4, workers=3) as swarm, client(swarm, train) as running:
        with trio.fail_after(PATIENCE):
            await step_of(running, events, 4)
        [formed] = [event for event in events if event["event"] == "formed"]
        [leaver] = formed["stages"][1]
        told = swarm.peers[swarm.network.peers.index(leaver)]
        told.process.send_signal(signal.SIGTERM)
        with trio.fail_after(2 * PATIENCE):
            code = await finished(running, events)
        assert await told.process.wait() == 0
    assert code == 0, running.log.read_text()[-2000:]
    assert losses(events) == pytest.approx(undisturbed(train), rel=1e-4)
    assert [event["step"] for event in events if event["event"] == "step"] == list(range(1, 17))
    kinds = [event["event"] for event in events]
    assert kinds.count("joined") == 3
    assert "moved" not in kinds
