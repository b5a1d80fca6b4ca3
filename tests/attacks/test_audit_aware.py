"""The evader: it reads the chain, and cheats only where, as far as anybody can know, the draw is least likely."""

from collections.abc import Callable

import pytest

from tests.attacks.judged import assert_nobody_else_suffers
from tests.attacks.kit import Character, Figures, Place, RealSwarm, agree, auditors_of, follow, swarm_of

RATE = 2000
RUNS = 16
BLOCKS = 900
Evader = Callable[[RealSwarm, bytes], Callable[[RealSwarm, Place], bool]]


def is_at_the_lowest_rate(swarm: RealSwarm, cheat: bytes) -> bool:
    """Whether no newcomer's, flagged or watched worker's rate holds for it now."""
    worker, task = swarm.state.worker(swarm.task, cheat), swarm.state.task(swarm.task)
    assert worker is not None
    assert task is not None
    is_known = worker.settled_cells >= swarm.state.params.newcomer_cells
    is_bonded = worker.bond + worker.withheld >= task.worker_bond
    return is_known and is_bonded and max(worker.flagged_until, worker.watched_until) <= swarm.state.height


def is_unobserved(swarm: RealSwarm, cheat: bytes) -> bool:
    """Whether no audit of it is open."""
    return not any(audit.worker == cheat for audit in swarm.audits())


def in_quiet_blocks(swarm: RealSwarm, cheat: bytes) -> Callable[[RealSwarm, Place], bool]:
    """Cheat in all that is claimed while none of its audits is open."""
    return lambda one, _: is_at_the_lowest_rate(one, cheat) and is_unobserved(one, cheat)


def one_at_a_time(swarm: RealSwarm, cheat: bytes) -> Callable[[RealSwarm, Place], bool]:
    """Cheat in one cell, and in no other before it has seen that one settle."""
    risked = [0]

    def is_cheating(one: RealSwarm, place: Place) -> bool:
        is_quiet = is_at_the_lowest_rate(one, cheat) and is_unobserved(one, cheat)
        if not is_quiet or one.settled < risked[-1]:
            return False
        risked.append(place.step)
        return True

    return is_cheating


def while_auditors_are_away(swarm: RealSwarm, cheat: bytes) -> Callable[[RealSwarm, Place], bool]:
    """Cheat only while somebody who might be drawn is left out of the draws."""
    honest = [account for account in auditors_of(swarm, cheat) if account not in swarm.characters]

    def is_cheating(one: RealSwarm, _: Place) -> bool:
        away = [account for account in honest if one.state.account(account).absent_until > one.state.height]
        return bool(away) and is_at_the_lowest_rate(one, cheat)

    return is_cheating


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
