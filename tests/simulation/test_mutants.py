"""Each broken rule is noticed within its budget of seeds, on which the unbroken protocol passes."""

from functools import lru_cache

import pytest

from tests.simulation.mutants import MUTANTS
from tests.simulation.runs import Run, judged


@lru_cache(maxsize=1024)
def sound(mode: str, seed: int) -> bool:
    """Whether the unmutated protocol passes this seed."""
    return not judged(Run(mode, seed)).faults


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_killed(name: str) -> None:
    mutation = MUTANTS[name]
    runs = (judged(Run(mutation.mode, seed, name)) for seed in range(mutation.budget))
    killed = next((v for v in runs if any(mutation.symptom in fault for fault in v.faults)), None)
    assert killed is not None, f"{name}: survived {mutation.budget} seeds of {mutation.mode}"
    assert all(sound(mutation.mode, seed) for seed in range(killed.run.seed + 1))
