"""A stage loses all its workers, one or two at once: peers without a seat take over, from a verified state."""

import signal
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from processes_kit import PATIENCE, client, finished, losses, model_opens, network, step_of, training, undisturbed

pytestmark = [pytest.mark.slow, pytest.mark.trio]


@pytest.mark.parametrize("kill_after", [1, 24])
async def test_a_stage_that_loses_its_only_worker_is_taken_over(tmp_path: Path, kill_after: int) -> None:
    train = replace(training(tmp_path, steps=40), replicas=1, save_every=0)
    events: list[dict[str, object]] = []
    async with network(tmp_path / "network", peers=4, workers=3) as swarm, client(swarm, train) as running:
        with trio.fail_after(PATIENCE):
            await step_of(running, events, kill_after)
        [formed] = [event for event in events if event["event"] == "formed"]
        [victim] = formed["stages"][1]  # type: ignore[index]
        swarm.peers[swarm.network.peers.index(victim)].process.send_signal(signal.SIGKILL)
        with trio.fail_after(2 * PATIENCE):
            code = await finished(running, events)
    assert code == 0, running.log.read_text()[-2000:]
    assert losses(events) == pytest.approx(undisturbed(train), rel=1e-4)
    [moved] = [event["step"] for event in events if event["event"] == "moved"]
    assert bool(moved) == (kill_after > 1)
    model_opens(train.out)


async def test_a_stage_whose_two_workers_freeze_together_goes_on_from_a_verified_state(tmp_path: Path) -> None:
    train = replace(training(tmp_path, steps=40), replicas=2, save_every=0)
    events: list[dict[str, object]] = []
    async with network(tmp_path / "network", peers=7, workers=5) as swarm, client(swarm, train) as running:
        with trio.fail_after(PATIENCE):
            await step_of(running, events, 24)
        [formed] = [event for event in events if event["event"] == "formed"]
        pair = [swarm.peers[swarm.network.peers.index(peer)].process for peer in formed["stages"][1]]  # type: ignore[index]
        for process in pair:
            process.send_signal(signal.SIGSTOP)
        try:
            with trio.fail_after(5 * PATIENCE):
                code = await finished(running, events)
        finally:
            for process in pair:
                process.send_signal(signal.SIGCONT)
    assert code == 0, running.log.read_text()[-2000:]
    assert losses(events) == pytest.approx(undisturbed(train), rel=1e-4)
    [moved] = [event["step"] for event in events if event["event"] == "moved"]
    assert moved
    model_opens(train.out)
