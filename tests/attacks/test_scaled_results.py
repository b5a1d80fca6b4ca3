"""Results of the right direction and the wrong size, each tensor alone."""

import pytest

from tests.attacks.figures import cheating, measure
from tests.attacks.judged import assert_always_convicted


@pytest.mark.parametrize("colluding", [0, 1])
@pytest.mark.parametrize("attack", ["y x 1.01", "gx x 1.01", "gw x 1.01", "y x 1.001"])
def test_who_scales_a_result_is_always_convicted(attack: str, colluding: int) -> None:
    assert_always_convicted(measure(attack, cheating(attack), 6, colluding=colluding))
