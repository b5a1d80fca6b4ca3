"""Validators with 30 % of the stake that act as one: they accuse the honest, acquit each other, lie in every vote."""

from collections import Counter

import pytest

from chain.keys import peer_id
from chain.records import Audit
from tests.attacks.figures import Figures, follow
from tests.attacks.kit import Character, Place, RealSwarm, agree, swarm_of, swarm_of_keys
from tests.chain.ledger_kit import KEYS

RATE = 5000
RUNS = 6
BLOCKS = 45
FALSE = "y x 1.01"


def one_in_four(_: RealSwarm, place: Place) -> bool:
    return (place.step + place.cell) % 4 == 0


def cartel(run: int, bad_seats: int) -> tuple[RealSwarm, set[bytes], bytes]:
    """Return a swarm in which 3 of 10 validators collude, and their worker; `bad_seats` of the 3 have seats as well."""
    swarm = swarm_of(f"cartel {run}", RATE)
    cheat = swarm.seated(run % 3)[run % 2]
    seats = {worker.account for worker in swarm.state.workers(swarm.task)}
    outside = sorted(set(swarm.state.validators().powers) - seats)
    bad = {cheat, *outside[: 3 - bad_seats], *sorted(seats - {cheat})[: bad_seats - 1]}

    def judge(one: RealSwarm, audit: Audit, round_: int) -> str:
        return agree(one, audit, round_) if audit.worker in bad else "sign flip"

    swarm.characters |= {account: Character(judges=judge) for account in bad}
    swarm.characters[cheat] = Character(attack=FALSE, is_cheating=one_in_four, judges=judge)
    return swarm, bad, cheat


def test_of_hundreds_of_disputes_every_verdict_is_right() -> None:
    """False accusations, friends acquitted: over 200 disputes, no honest worker convicted, each cheat convicted."""
    disputes: Counter[str] = Counter()
    for run in range(RUNS):
        swarm, bad, cheat = cartel(run, bad_seats=1 + run % 2)
        for _ in range(BLOCKS):
            swarm.work(1)
        names = {peer_id(account) for account in bad}
        assert {event["worker"] for event in swarm.ledger.happened("slashed")} == {peer_id(cheat)}
        assert len(swarm.ledger.happened("evicted")) == 1
        assert {event["auditor"] for event in swarm.ledger.happened("charged")} <= names
        ended = {e["audit"]: kind for kind in ("convicted", "acquitted", "void") for e in swarm.ledger.happened(kind)}
        assert not swarm.ledger.happened("undecided")
        for event in swarm.ledger.happened("disputed"):
            if (end := ended.get(event["audit"])) is None:
                continue  # not over yet
            disputes[end] += 1
            assert (end == "acquitted") == (event["worker"] != peer_id(cheat)) or end == "void", event
    assert disputes["convicted"] == RUNS
    assert sum(disputes.values()) >= 200


@pytest.mark.parametrize("run", range(3))
def test_false_accusations_cost_the_cartel_its_stake_and_the_accused_nothing(run: int) -> None:
    swarm, bad, cheat = cartel(run, bad_seats=1)
    swarm.characters[cheat] = Character(judges=swarm.characters[cheat].judges)
    for _ in range(BLOCKS):
        swarm.work(1)
    charged = swarm.ledger.happened("charged")
    assert len(charged) > 20
    left = sum(swarm.state.account(account).bonded for account in bad)
    assert left == 3_000_000 - 20_000 * len(charged)
    assert not {"evicted", "withheld", "faulted", "undecided", "slashed"} & set(swarm.ledger.kinds())
    for worker in swarm.state.workers(swarm.task):
        assert (worker.bond, worker.withholdings, worker.settled_cells) == (20_000, 0, 8 * swarm.settled)


@pytest.mark.parametrize("attack", [FALSE, "gw x 1.001"])
def test_a_third_of_the_voters_cannot_keep_a_friend_in_its_seat(attack: str) -> None:
    """3 of 10 validators are a third of the 9 that vote where the tenth accuses: the accuser's stake counts as well."""
    for run in range(3):
        swarm, cheat = swarm_of_keys(f"friend {run}", [*KEYS[:5], KEYS[11]], RATE), KEYS[11].account
        seats = {worker.account for worker in swarm.state.workers(swarm.task)}
        friends = sorted(set(swarm.state.validators().powers) - seats)[:3]
        assert len(swarm.state.validators().powers) == 10
        swarm.characters |= {friend: Character(judges=agree) for friend in friends}
        swarm.characters[cheat] = Character(attack=attack, is_cheating=one_in_four)
        follow(swarm, cheat, figures := Figures(attack, RATE / 10_000))
        assert [event["worker"] for event in swarm.ledger.happened("evicted")] == [peer_id(cheat)]
        assert figures.convicted == (attack == FALSE)
        assert (figures.ends["undecided"], figures.honest_charges) == (0, 0)
