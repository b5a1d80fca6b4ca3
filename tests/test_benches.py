"""Benches are run by hand: they must load, and the processes that they start find their modules, from any folder."""

from importlib import import_module
from pathlib import Path

import pytest

from bench.numerics import FP32, STAGES, honest_results, prepare, record_cells, run
from trainer.compare import compare

BENCHES = sorted(path.stem for path in Path(__file__).parents[1].joinpath("bench").glob("*.py"))


@pytest.mark.parametrize("name", [name for name in BENCHES if name != "__init__"])
def test_every_bench_loads_and_says_what_it_measures(name: str) -> None:
    bench = import_module(f"bench.{name}")
    assert bench.__doc__
    assert callable(bench.main)


def test_a_calibration_compares_results_of_other_processes(tmp_path: Path) -> None:
    manifest, states, _ = prepare(tmp_path, 1, "fp32")
    cells = record_cells(tmp_path, manifest, states)
    others = honest_results(tmp_path, "batch split")
    for index in range(STAGES):
        assert compare(others[index], run(manifest, states, cells, index), FP32).is_match
        assert not compare(others[index], run(manifest, states, cells, (index + 1) % STAGES), FP32).is_match
