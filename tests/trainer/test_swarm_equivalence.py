"""A swarm of any shape trains the same model as one process."""

import pytest
import torch
from swarm_kit import Kit, batches_of, in_virtual_time, manifest_of, relative

from trainer.local import train_locally

STEPS = 20


@pytest.mark.parametrize(("stages", "replicas"), [(1, 1), (2, 2), (4, 2), (2, 3)])
def test_parameters_equal_those_of_one_process(stages: int, replicas: int) -> None:
    torch.set_num_threads(1)
    manifest = manifest_of(stages=stages, steps=STEPS, layers=4)
    kit = Kit(manifest, replicas)

    async def train() -> None:
        states = await kit.train()
        expected_losses: list[float] = []
        expected = train_locally(
            manifest, batches_of(manifest), STEPS, lambda step: expected_losses.append(step.loss)
        )
        assert [state.step for state in states] == [STEPS] * stages
        assert relative(torch.cat([state.weights for state in states]), expected.weights) < 1e-5
        assert relative(torch.cat([state.m for state in states]), expected.m) < 1e-4
        assert kit.losses == pytest.approx(expected_losses, rel=1e-5)
        assert expected_losses[-1] < expected_losses[0]

    in_virtual_time(train)
    kit.check_exactly_once()
    assert all(not worker.refused for worker in kit.workers.values())
    assert not kit.coordinator.refused
