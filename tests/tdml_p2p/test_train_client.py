"""Training runs that end early and go on: killed, interrupted, with their task or without it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from train_kit import Client, settings, swarm

from tdml_p2p.config import TrainConfig
from tdml_p2p.swarm.preparation import prepare
from trainer.checkpoint import Checkpoint, resume, whole_tensors
from trainer.local import train_locally, whole

pytestmark = [pytest.mark.trio, pytest.mark.slow]


def assert_as_undisturbed(train: TrainConfig) -> None:
    """The folder holds what one process makes of the same run."""
    fresh = prepare(replace(train, resume=False))
    saved = resume(train.out)
    assert saved.step == train.steps
    expected = train_locally(fresh.manifest, fresh.batches, train.steps)
    reference = whole_tensors(whole(fresh.manifest), (expected,))
    for name, tensor in whole_tensors(saved.manifest, saved.states).items():
        assert float((tensor - reference[name]).norm() / reference[name].norm()) < 1e-5
    assert [step for step, _ in saved.losses] == list(range(1, train.steps + 1))


async def test_a_killed_run_goes_on_from_its_newest_verified_checkpoint(tmp_path: Path) -> None:
    train = settings(tmp_path, steps=30, save_every=3)

    def kill(client: Client, event: dict[str, Any]) -> None:
        if event["event"] == "saved":
            client.crash()

    async with swarm(tmp_path) as peers:
        first = Client(train, peers[0].invite, kill)
        assert await first.run() is None
        (saved,) = first.of("saved")
        assert saved % 3 == 0
        assert resume(train.out).step == saved
        assert resume(train.out).is_verified
        second = Client(replace(train, resume=True), peers[0].invite)
        assert await second.run() == 0
        assert second.of("posted") == [saved]
        assert second.of("posted", "task") != first.of("posted", "task")
        assert second.of("step")[0] == saved + 1
        old = peers[0].engine.state.task(bytes.fromhex(first.of("posted", "task")[0]))
        assert old is None or not old.is_open
    assert_as_undisturbed(train)
