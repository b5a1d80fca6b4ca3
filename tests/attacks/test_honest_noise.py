"""Honest peers on unlike hardware: nobody is ever disputed, let alone evicted."""

from bench.support.recordings import HONEST, STAGES
from tests.attacks.kit import Character, recordings, result_of, swarm_of
from tests.trainer.tolerances import FP32
from trainer.compare import compare


def test_peers_with_other_kernels_and_batch_splits_are_never_disputed() -> None:
    kernels = list(HONEST)
    for run in range(3):
        swarm = swarm_of(f"unlike {run}", 3000)
        for index, account in enumerate(sorted(swarm.state.validators().powers)):
            swarm.characters[account] = Character(kernel=kernels[(index + run) % len(kernels)])
        for _ in range(30):
            swarm.work(1)
        assert len(swarm.ledger.happened("passed")) > 100
        assert not {"disputed", "evicted", "charged", "withheld"} & set(swarm.ledger.kinds())


def test_every_two_configurations_agree_in_every_recorded_cell() -> None:
    for stage in range(STAGES):
        for number in range(len(recordings().cells[stage])):
            results = [result_of(kernel, stage, number) for kernel in HONEST]
            assert all(compare(one, other, FP32).is_match for one in results for other in results)
