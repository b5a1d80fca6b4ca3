"""Cheats that choose their moment: few cells, only after a long honest life, only every other step."""

import random

from tests.attacks.figures import cheating, measure
from tests.attacks.judged import assert_always_convicted
from tests.attacks.kit import Place, RealSwarm


def in_one_of_twenty(_: RealSwarm, place: Place) -> bool:
    return random.Random(str(place)).random() < 0.05


def once_trusted(swarm: RealSwarm, place: Place) -> bool:
    """Cheat once the audits of a newcomer are over."""
    return place.step > 8


def test_a_cheat_in_a_twentieth_of_its_cells_is_caught_after_as_many_cheated_cells() -> None:
    figures = measure("sparse", cheating("sign flip", is_cheating=in_one_of_twenty), 8)
    assert_always_convicted(figures)
    assert figures.executions < 0.13 * figures.paid


def test_a_long_honest_life_buys_nothing() -> None:
    figures = measure("sleeper", cheating("int8 weights", is_cheating=once_trusted), 10, newcomer_cells=50)
    assert_always_convicted(figures)
