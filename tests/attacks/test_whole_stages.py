"""Both replicas of a stage together: the same false results or optimiser's steps, each finding the other right."""

import pytest

from tests.attacks.figures import Prepare, both, cheating, measure
from tests.attacks.judged import assert_always_convicted

VALIDATORS = 12
"""Eight of whom may be drawn for a stage at an end of the pipeline: two friends are a quarter."""


@pytest.mark.parametrize(
    "prepare",
    [both("layer skipped"), both("y x 1.001", is_of_steps=True)],
    ids=["cells", "steps"],
)
def test_a_stage_that_colludes_is_convicted_by_auditors_outside_it(prepare: Prepare) -> None:
    figures = measure("pair", prepare, 8, stage=0, colluding=2, validators=VALIDATORS, step_share=10_000)
    assert figures.theory == pytest.approx(0.075)
    assert_always_convicted(figures)


def test_a_false_step_beside_a_right_one_is_audited_at_once() -> None:
    alone = cheating("y x 1.001", is_of_steps=True, after=b"false")
    figures = measure("alone", alone, 8, stage=0, colluding=2, share=10.0, validators=VALIDATORS)
    assert figures.theory == pytest.approx(0.75)
    assert_always_convicted(figures)
