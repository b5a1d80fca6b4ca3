"""Thresholds of a calibration as a vote writes them."""

from pathlib import Path

import pytest

from cli.keys import thresholds, wanted_params
from tdml_p2p.errors import UserError

NOW = {"tau": [2500, 27_000, 35_000], "fraud_factor": 100, "pending": None}


def test_a_vote_takes_its_thresholds_from_a_calibration(tmp_path: Path) -> None:
    file = tmp_path / "calibration.json"
    file.write_text('{"worst": [3e-7, 2e-6, 3.5e-6], "comparisons": 9}')
    wanted = wanted_params(NOW, (*thresholds(file), "fraud_factor=90"))
    assert (wanted["tau"], wanted["fraud_factor"]) == ([3000, 20_000, 35_000], 90)
    assert thresholds(None) == ()


def test_a_calibration_under_which_honest_results_would_be_frauds_is_no_vote(tmp_path: Path) -> None:
    file = tmp_path / "calibration.json"
    file.write_text('{"worst": [1e-10, 2e-6, 3.5e-6], "comparisons": 9}')
    with pytest.raises(UserError, match="honest now would be frauds"):
        wanted_params(NOW, thresholds(file))
