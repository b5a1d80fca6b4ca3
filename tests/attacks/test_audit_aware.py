"""The evader, who reads the chain: it is caught after as many cheated cells as who knows nothing."""

import pytest

from tests.attacks.evasion import Evader, in_quiet_blocks, one_at_a_time, while_auditors_are_away
from tests.attacks.figures import Figures, follow
from tests.attacks.judged import assert_nobody_else_suffers
from tests.attacks.kit import Character, agree, auditors_of, swarm_of

RATE = 2000
RUNS = 16
BLOCKS = 900


def evaded(name: str, evader: Evader, friends: int = 0, away: int = 0) -> Figures:
    """Return what comes of an evader; `away` honest auditors never answer, `friends` let it pass."""
    figures = Figures(name, 0.0)
    for run in range(RUNS):
        swarm = swarm_of(f"{name} {run}", RATE, newcomer_cells=50)
        cheat = swarm.seated(1)[run % 2]
        pool = auditors_of(swarm, cheat)
        swarm.silent |= {(account, "commit") for account in pool[friends : friends + away]}
        swarm.characters |= {account: Character(judges=agree) for account in pool[:friends]}
        figures.theory = RATE / 10_000 * (1 - friends / (len(pool) - away))
        swarm.characters[cheat] = Character(attack="gw x 1.01", is_cheating=evader(swarm, cheat))
        follow(swarm, cheat, figures, BLOCKS)
    return figures


@pytest.mark.parametrize("evader", [in_quiet_blocks, one_at_a_time])
def test_who_knows_all_that_is_public_is_caught_after_as_many_cells_as_who_knows_nothing(evader: Evader) -> None:
    figures = evaded(evader.__name__, evader)
    assert figures.convicted == RUNS
    assert_nobody_else_suffers(figures)
    low, high = figures.bounds(3.0)
    assert 1.5 < low <= figures.mean <= high < 8.5, figures.mean


def test_waiting_for_auditors_to_be_away_buys_what_they_would_have_found_and_no_more() -> None:
    figures = evaded("away", while_auditors_are_away, friends=1, away=1)
    assert figures.convicted == RUNS
    assert_nobody_else_suffers(figures)
    low, high = figures.bounds(3.0)
    assert low <= figures.mean <= high, figures.mean
