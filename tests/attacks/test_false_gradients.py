"""Gradients that are turned round, zero, random, or shifted to steer the model."""

import pytest

from tests.attacks.figures import cheating, measure
from tests.attacks.judged import assert_always_convicted


@pytest.mark.parametrize("colluding", [0, 1])
@pytest.mark.parametrize(
    "attack",
    ["sign flip", "sign flip of gw", "zero gradients", "random gradients", "gw mean shift", "gw Gaussian 30 I"],
)
def test_who_sends_false_gradients_is_always_convicted(attack: str, colluding: int) -> None:
    assert_always_convicted(measure(attack, cheating(attack), 6, colluding=colluding))
