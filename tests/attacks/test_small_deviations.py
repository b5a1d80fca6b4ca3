"""The careful cheat: results between the tolerance and a hundred times it, which are faults and no fraud."""

import pytest

from chain.keys import peer_id
from tests.attacks.figures import Figures, follow
from tests.attacks.judged import assert_nobody_else_suffers
from tests.attacks.kit import MICROBATCHES, Character, swarm_of


@pytest.mark.parametrize("attack", ["gx x 1.001", "gw x 1.001", "noise 1e-4"])
def test_who_errs_again_and_again_loses_the_seat_and_keeps_the_bond(attack: str) -> None:
    for run in range(2):
        swarm = swarm_of(f"{attack} {run}", 2000)
        cheat = swarm.seated(1)[0]
        swarm.characters[cheat] = Character(attack=attack)
        figures = Figures(attack, 0.2)
        follow(swarm, cheat, figures)
        evicted = swarm.ledger.happened("evicted")
        assert [(event["worker"], event["reason"]) for event in evicted] == [(peer_id(cheat), "faulted")]
        assert not swarm.ledger.happened("slashed")
        assert_nobody_else_suffers(figures)
        passed = [event for event in swarm.ledger.happened("passed") if event["worker"] == peer_id(cheat)]
        assert all(event["cell"] == MICROBATCHES for event in passed)  # its optimiser's steps are right


def test_two_colluding_judges_cannot_make_an_honest_worker_lose_its_seat_by_small_lies() -> None:
    swarm = swarm_of("small lies", 3000)
    *_, one, two = sorted(swarm.state.validators().powers)
    for account in (one, two):
        swarm.characters[account] = Character(judges=lambda swarm, audit, round_: "gw x 1.001")
    for _ in range(60):
        swarm.work(1)
    assert swarm.ledger.happened("disputed")
    assert not {"evicted", "faulted", "slashed"} & set(swarm.ledger.kinds())
