"""Consensus under loss, duplication, reordering, partitions, crashes at every durable write and a Twin."""

from typing import Any

import pytest

from tests.simulation import mutants
from tests.simulation.oracle import culprits, judge
from tests.simulation.runs import judged
from tests.simulation.scenario import crowded
from tests.simulation.world import World

CHUNK = 15
CHUNKS = 40
FIRST = 0


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_no_fork_nobody_stuck_nobody_honest_accused(chunk: int) -> None:
    start = FIRST + chunk * CHUNK
    broken = [verdict for seed in range(start, start + CHUNK) if (verdict := judged(seed)).faults]
    assert not broken, "\n".join(map(str, broken))


def test_every_fork_names_more_than_a_third_of_the_stake_and_nobody_honest() -> None:
    forks = 0
    for seed in range(60):
        world = World(crowded(seed))
        outcome = world.run()
        honest = {node.account for node in world.honest}
        faults = judge(outcome, world.stakes, {node.index for node in world.honest}, honest)
        guilty = culprits(outcome.certificates, world.stakes)
        assert not guilty & honest, f"crowded seed {seed}"
        assert not any(fault.startswith("honest") for fault in faults), f"crowded seed {seed}: {faults}"
        if any(fault.startswith("fork") for fault in faults):
            forks += 1
            assert 3 * sum(map(world.stakes.__getitem__, guilty)) > sum(world.stakes.values()), seed
    assert forks


def test_same_seed_same_trace() -> None:
    first, again, other = judged(7), judged(7), judged(8)
    assert first == again
    assert first.trace != other.trace


MUTANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "quorum 2W//3": ("quorum", {"set_type": mutants.LowQuorumSet}),
    "quorum 2W//3 forks": ("fork", {"set_type": mutants.LowQuorumSet}),
    "finalize what I did not notarize": ("accused", {"machine_type": mutants.FinalizesWhatItDidNotNotarize}),
    "skip nullifications": ("fork", {"machine_type": mutants.SkipsNullifications}),
    "nullify what I finalized": ("accused", {"machine_type": mutants.NullifiesWhatItFinalized}),
    "no rebroadcast at 10% loss": ("stuck", {"machine_type": mutants.NeverRebroadcasts, "loss": 0.1}),
    "sign record lost at a crash": ("accused", {"keeps_record": False}),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_killed(name: str) -> None:
    symptom, mutation = MUTANTS[name]
    budget = 300
    killed = (seed for seed in range(budget) if any(symptom in fault for fault in judged(seed, **mutation).faults))
    assert next(killed, None) is not None, f"{name}: survived {budget} seeds"
