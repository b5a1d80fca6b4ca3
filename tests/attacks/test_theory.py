"""Cheated cells until the first is disputed: geometric with h = p·(1−f), p the rate and f the colluding auditors."""

import pytest

from tests.attacks.figures import cheating, measure
from tests.attacks.judged import assert_nobody_else_suffers


@pytest.mark.parametrize(("colluding", "h"), [(0, 0.10), (2, 0.05)])
def test_the_mean_is_that_of_theory(colluding: int, h: float) -> None:
    figures = measure("theory", cheating("gw x 1.01"), 25, colluding=colluding)
    assert figures.theory == pytest.approx(h)
    assert figures.convicted == 25
    assert_nobody_else_suffers(figures)
    low, high = figures.bounds(deviations=3.0)
    assert 0.3 / h < low < figures.mean < high < 1.7 / h
