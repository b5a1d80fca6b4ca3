"""A swarm of any shape trains the same model as one process."""

import pytest
import torch
import trio
from swarm_kit import Kit, assert_same_model, batches_of, in_virtual_time, manifest_of, relative, trained

from trainer.local import train_locally
from trainer.worker_ports import ThreadCompute

STEPS = 20


@pytest.mark.parametrize(("stages", "replicas"), [(1, 1), (2, 2), (4, 2), (2, 3)])
def test_parameters_equal_those_of_one_process(stages: int, replicas: int) -> None:
    torch.set_num_threads(1)
    manifest = manifest_of(stages=stages, steps=STEPS, layers=4)
    kit = Kit(manifest, replicas)

    async def train() -> None:
        states = await kit.train()
        expected_losses: list[float] = []
        expected = train_locally(manifest, batches_of(manifest), STEPS, lambda step: expected_losses.append(step.loss))
        assert [state.step for state in states] == [STEPS] * stages
        assert relative(torch.cat([state.weights for state in states]), expected.weights) < 1e-5
        assert relative(torch.cat([state.m for state in states]), expected.m) < 1e-4
        assert kit.losses == pytest.approx(expected_losses, rel=1e-5)
        assert expected_losses[-1] < expected_losses[0]

    in_virtual_time(train)
    kit.check_exactly_once()
    assert all(not worker.refused for worker in kit.workers.values())
    assert not kit.coordinator.refused


def test_threads_compute_the_same_bits() -> None:
    torch.set_num_threads(1)
    manifest = manifest_of(stages=2, steps=2)
    kit = Kit(manifest)
    kit.computes = {peer: ThreadCompute() for stage in kit.governor.members.stages for peer in stage}
    inline = trained(Kit(manifest))

    async def train() -> None:
        assert_same_model(await kit.train(), inline)

    trio.run(train)
    assert not kit.coordinator.refused


def test_with_one_replica_a_stage_the_same_seed_gives_the_same_bits_however_fast_the_workers_are() -> None:
    manifest = manifest_of(stages=2, steps=3)
    roots = [
        [state.root for state in trained(Kit(manifest, replicas=1, cell_seconds=seconds))]
        for seconds in ({}, {"s0r0": 0.5}, {"s1r0": 0.2})
    ]
    assert roots[0] == roots[1] == roots[2]
