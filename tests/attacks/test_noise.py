"""Results with noise on them."""

import pytest

from tests.attacks.figures import cheating, measure
from tests.attacks.judged import assert_always_convicted


@pytest.mark.parametrize("colluding", [0, 1])
@pytest.mark.parametrize("attack", ["noise 1e-2", "noise 1e-3"])
def test_who_adds_noise_is_always_convicted(attack: str, colluding: int) -> None:
    assert_always_convicted(measure(attack, cheating(attack), 6, colluding=colluding))
