"""What every attack on results is held to."""

from tests.attacks.figures import Figures


def assert_always_convicted(figures: Figures) -> None:
    """Every run ends with the cheat's conviction, nobody else loses anything, and the mean is that of theory."""
    assert figures.convicted == figures.runs
    assert_nobody_else_suffers(figures)
    low, high = figures.bounds()
    assert low <= figures.mean <= high, f"{figures.mean} cheated cells, not {1 / figures.theory}"


def assert_nobody_else_suffers(figures: Figures) -> None:
    """No honest peer has lost its seat or been charged."""
    assert (figures.honest_evictions, figures.honest_charges) == (0, 0)
