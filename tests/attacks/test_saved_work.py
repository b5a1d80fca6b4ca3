"""Work that a cheat with a bill to save leaves out."""

import pytest

from tests.attacks.figures import cheating, measure
from tests.attacks.judged import assert_always_convicted


@pytest.mark.parametrize("colluding", [0, 1])
@pytest.mark.parametrize(
    "attack", ["layer skipped", "gw skipped", "int8 weights", "bf16 compute", "stale weights", "replayed cell"]
)
def test_who_saves_work_is_always_convicted(attack: str, colluding: int) -> None:
    assert_always_convicted(measure(attack, cheating(attack), 6, colluding=colluding))
