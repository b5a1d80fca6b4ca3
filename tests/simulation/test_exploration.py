"""Small-scope exhaustive exploration: agreement in every reachable state, and broken rules found.

States visited: 198,204 with the Twin leading view 1, 357,363 leading view 2, 60,409 leading neither; with
restarts at any time 29,371, 18,691 and 12,691, fewer because a restart makes equal what differs in memory.
"""

import pytest

from tests.simulation.exploration import Exploration
from tests.simulation.mutants import MUTANTS

FLOOR = {False: (190_000, 350_000, 60_000), True: (29_000, 18_000, 12_000)}


@pytest.mark.parametrize("restarts", [False, True], ids=["alive", "restarts"])
@pytest.mark.parametrize("twin_leads", [1, 2, 3])
def test_no_reachable_state_breaks_agreement(twin_leads: int, restarts: bool) -> None:
    report = Exploration(twin_leads, restarts=restarts).run()
    assert report.broken == ""
    assert report.states >= FLOOR[restarts][twin_leads - 1]
    assert report.transitions > report.states
    assert report.decisions > 1_000


@pytest.mark.parametrize(
    ("name", "restarts", "what"),
    [
        ("quorum-of-2W//3", False, "final and nullified"),
        ("finalizes-unnotarized", True, "honest conflict"),
        ("skips-nullifications", True, "final against another block"),
        ("nullifies-finalized", True, "honest conflict"),
        ("finalizes-nullified", False, "honest conflict"),
        ("notarizes-twice", False, "honest conflict"),
        ("record-lost-at-crash", True, "honest conflict"),
    ],
)
def test_exploration_finds_the_broken_rule(name: str, restarts: bool, what: str) -> None:
    report = Exploration(1, MUTANTS[name], restarts=restarts).run(400_000)
    assert report.broken.startswith(what)
    assert ">" in report.broken
