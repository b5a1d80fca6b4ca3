"""A training client that is interrupted or killed, and goes on with `--resume`."""

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
from processes_kit import (
    PATIENCE,
    Swarm,
    client,
    finished,
    losses,
    model_opens,
    network,
    step_of,
    training,
    undisturbed,
)

from tdml_p2p.config import TrainConfig

pytestmark = [pytest.mark.slow, pytest.mark.trio]
Events = list[dict[str, Any]]


async def run(
    swarm: Swarm, train: TrainConfig, events: Events, until: int = 0, end: signal.Signals | None = None
) -> int:
    """Run the client to its end, or send it `end` after step `until`; return its exit code."""
    async with client(swarm, train) as running:
        with trio.fail_after(PATIENCE):
            if end is not None:
                await step_of(running, events, until)
                running.process.send_signal(end)
            return await finished(running, events)


def steps(events: Events) -> list[int]:
    return [event["step"] for event in events if event["event"] == "step"]


async def test_an_interrupted_run_goes_on_at_the_next_step(tmp_path: Path) -> None:
    train = training(tmp_path, steps=12)
    first: Events = []
    second: Events = []
    async with network(tmp_path / "network", peers=5, workers=4) as swarm:
        assert await run(swarm, train, first, 4, signal.SIGINT) == 130
        assert await run(swarm, replace(train, resume=True), second) == 0
    [saved] = [event["step"] for event in first if event["event"] == "saved"]
    assert saved >= 4
    assert steps(second) == list(range(saved + 1, 13))
    kept = [event for event in first if event.get("step", 0) <= saved]
    assert losses(kept + second) == pytest.approx(undisturbed(train), rel=1e-4)
    model_opens(train.out)


async def test_a_killed_run_goes_on_from_its_newest_checkpoint(tmp_path: Path) -> None:
    train = replace(training(tmp_path, steps=40), save_every=4)
    first: Events = []
    second: Events = []
    async with network(tmp_path / "network", peers=5, workers=4) as swarm:
        async with client(swarm, train) as running:
            with trio.fail_after(PATIENCE):
                async for event in running.events():
                    first.append(event)
                    if event["event"] == "saved":
                        break
            running.process.send_signal(signal.SIGKILL)
            await running.process.wait()
        assert await run(swarm, replace(train, resume=True), second) == 0
    saved = next(event["step"] for event in first if event["event"] == "saved")
    assert steps(second) == list(range(saved + 1, 41))
    assert losses(first + second) == pytest.approx(undisturbed(train), rel=1e-4)
    model_opens(train.out)
