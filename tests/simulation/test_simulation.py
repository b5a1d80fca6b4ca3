"""Consensus under loss, duplication, reordering, partitions, crashes at every durable write and a Twin."""

from typing import Any

import pytest

from tests.simulation import mutants
from tests.simulation.runs import judged

CHUNK = 15
CHUNKS = 40
FIRST = 0


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_no_fork_nobody_stuck_nobody_honest_accused(chunk: int) -> None:
    start = FIRST + chunk * CHUNK
    broken = [verdict for seed in range(start, start + CHUNK) if (verdict := judged(seed)).faults]
    assert not broken, "\n".join(map(str, broken))


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
