"""Friends of a cheat that judge: as third opinion and as voters with less than a third of the stake."""

import pytest

from tests.attacks.figures import measure
from tests.attacks.judged import assert_nobody_else_suffers
from tests.attacks.kit import Character, RealSwarm, agree


@pytest.mark.parametrize("friends", [1, 2])
def test_friends_among_the_voters_do_not_save_a_cheat(friends: int) -> None:
    def prepare(swarm: RealSwarm, cheat: bytes) -> None:
        others = [account for account in swarm.seated(0) if account != cheat]
        swarm.characters[cheat] = Character(attack="layer skipped")
        swarm.characters |= {account: Character(judges=agree) for account in others[:friends]}

    figures = measure(f"jurors {friends}", prepare, 10, stage=1)
    assert figures.convicted == figures.runs
    assert_nobody_else_suffers(figures)


def test_a_third_peer_that_calls_a_fraud_small_only_calls_the_voters() -> None:
    def prepare(swarm: RealSwarm, cheat: bytes) -> None:
        swarm.characters[cheat] = Character(attack="gw skipped")
        for account in swarm.seated(1):
            if account != cheat:
                swarm.characters[account] = Character(judges=lambda one, audit, round_: agree(one, audit, round_))

    figures = measure("third", prepare, 10, stage=1, colluding=1)
    assert figures.convicted == figures.runs
    assert figures.ends["faulted"] == 0
