"""kill -9 of the only worker of a stage: a peer without a seat takes its place, from a verified state."""

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
