"""Calibrations: τ is ten times the worst honest deviation, and nothing that no network can run on is taken."""

import json

import pytest

from chain.bounds import problem, vote_problem
from chain.calibration import MAX_BYTES, calibrated, read_calibration
from chain.params import Params


def file(*worst: float, comparisons: int = 100, **notes: object) -> bytes:
    return json.dumps({"worst": worst, "comparisons": comparisons, **notes}).encode()


def test_tau_is_ten_times_the_worst_deviation_rounded_up() -> None:
    changed = calibrated(Params(), read_calibration(file(2.341e-7, 0, 3.5e-6, machine="any")))
    assert changed.tau == (2341, 1, 35_000)
    assert calibrated(Params(), read_calibration(file(2.3411e-7, 0, 3.5e-6))).tau[0] == 2342
    assert problem(changed) is None


def test_a_calibration_of_bf16_is_of_unlike_kernels_and_leaves_the_other_thresholds() -> None:
    found = read_calibration(file(4e-4, 4e-3, 5e-3, precision="bf16"))
    changed = calibrated(Params(), found)
    assert (changed.tau, changed.wide_tau) == (Params().tau, (4_000_000, 40_000_000, 50_000_000))
    with pytest.raises(ValueError, match="no calibration"):
        read_calibration(file(4e-4, 4e-3, 5e-3, precision="fp8"))
    assert problem(Params(wide_tau=(1, 1, 250_000_001))) is not None
    assert "wide_tau" in str(vote_problem(Params(wide_tau=(9, 9, 9)), Params(wide_tau=(9, 9, 2))))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{" * 5000,
        file(1e-7, 1e-7),
        file(1e-7, 1e-7, 1.0),
        file(1e-7, 1e-7, -1e-9),
        file(1e-7, 1e-7, float("nan")),
        file(1e-7, 1e-7, 1e-7, comparisons=0),
        file(1e-7, 1e-7, 2e-3),
        file(1e-7, 1e-7, 1e-7, notes="x" * MAX_BYTES),
    ],
)
def test_what_is_no_calibration_or_too_wide_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"calibration|bytes|no network"):
        calibrated(Params(), read_calibration(data))


def test_thresholds_under_which_zeros_would_be_no_fraud_are_refused() -> None:
    widest = Params(tau=(10_000_000, 10_000_000, 10_000_000), fraud_factor=100)
    assert problem(widest) is None
    found = problem(Params(tau=(10_000_001, 1, 1), fraud_factor=100))
    assert found is not None
    assert "zeros" in found
    assert vote_problem(Params(), Params(fraud_factor=30_000)) is not None
