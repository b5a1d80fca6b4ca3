"""Benches are run by hand: the processes that they start must find their modules, from any folder."""

from pathlib import Path

from bench.numerics import FP32, STAGES, honest_results, prepare, record_cells, run
from trainer.compare import compare


def test_a_calibration_compares_results_of_other_processes(tmp_path: Path) -> None:
    manifest, states, _ = prepare(tmp_path, 1, "fp32")
    cells = record_cells(tmp_path, manifest, states)
    others = honest_results(tmp_path, "batch split")
    for index in range(STAGES):
        assert compare(others[index], run(manifest, states, cells, index), FP32).is_match
        assert not compare(others[index], run(manifest, states, cells, (index + 1) % STAGES), FP32).is_match
