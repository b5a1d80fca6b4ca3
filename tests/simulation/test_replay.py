"""A run is its mode, seed, mutant and crash point: the same again gives the same trace, here and by command."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.simulation.mutants import MUTANTS
from tests.simulation.runs import Run, judged
from tests.simulation.scenario import MODES

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("mode", MODES)
def test_same_seed_same_trace(mode: str) -> None:
    first, again, other = judged(Run(mode, 7)), judged(Run(mode, 7)), judged(Run(mode, 8))
    assert first == again
    assert first.trace != other.trace


@pytest.mark.parametrize(
    "run",
    [Run("mixed", 16, "quorum-of-2W//3-forks"), Run("crash", 5, crash_at=9), Run("crowded", 0)],
    ids=lambda run: run.mode,
)
def test_the_printed_command_replays_the_run(run: Run) -> None:
    verdict = judged(run)
    assert str(verdict).endswith(f"replay: {run.command}")
    _, *words = shlex.split(run.command)
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == (1 if verdict.faults else 0), done.stderr
    assert f"trace {verdict.trace}" in done.stdout
    assert str(verdict) in done.stdout


def test_every_mutant_has_a_mode_and_a_symptom() -> None:
    assert all(mutation.mode in MODES and mutation.symptom for mutation in MUTANTS.values())
