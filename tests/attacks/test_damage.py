"""What a saboteur leaves behind: the false cells of steps that settled before the first of them was drawn."""

import pytest

from tests.attacks.figures import Figures, cheating, measure
from tests.attacks.judged import assert_always_convicted
from tests.attacks.kit import MICROBATCHES, REPLICAS, Place, RealSwarm

RUNS = 30
DEPTH = 4
"""Steps that may be claimed and not settled."""


def one_a_step(_: RealSwarm, place: Place) -> bool:
    return place.cell < REPLICAS


def expected(h: float, a_step: int) -> tuple[float, float]:
    """Return mean and variance of the cells that settle: steps are clean with q = (1−h)^k, one after the other."""
    clean = (1 - h) ** a_step
    return a_step * clean / (1 - clean), a_step**2 * clean / (1 - clean) ** 2


def assert_bounded(figures: Figures, a_step: int) -> None:
    mean, variance = expected(figures.theory, a_step)
    assert mean <= (1 - figures.theory) / figures.theory + 1e-9  # what the concepts page says
    found = sum(figures.settled) / figures.runs
    assert abs(found - mean) < 3 * (variance / figures.runs) ** 0.5, f"{found} settled, not {mean}"
    for settled, cells, claimed in zip(figures.settled, figures.cells, figures.claimed, strict=True):
        assert settled < cells
        assert claimed - settled <= DEPTH * a_step, "more was undone than can be under way"


@pytest.mark.parametrize("colluding", [0, 1])
def test_one_false_cell_a_step_leaves_as_many_as_slip_through(colluding: int) -> None:
    figures = measure("one a step", cheating("y x 1.01", is_cheating=one_a_step), RUNS, colluding=colluding)
    assert_always_convicted(figures)
    assert_bounded(figures, 1)
    assert sum(figures.settled) > 0


def test_false_cells_only_leave_fewer_for_the_first_that_is_drawn_undoes_its_step() -> None:
    figures = measure("all", cheating("y x 1.01"), RUNS)
    assert_always_convicted(figures)
    assert_bounded(figures, MICROBATCHES // REPLICAS)
