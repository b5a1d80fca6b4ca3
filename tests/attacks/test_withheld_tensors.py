"""A cheat that recomputes what is drawn, opens with an honest sketch, and gives its false tensor to nobody."""

from chain.keys import peer_id
from tests.attacks.figures import Figures, follow
from tests.attacks.judged import assert_nobody_else_suffers
from tests.attacks.kit import USUAL, Character, RealSwarm, agree, outsiders, swarm_of

GW = frozenset({"gw"})


def swarm_with(character: Character, run: str) -> tuple[RealSwarm, bytes]:
    swarm = swarm_of(run, 2000)
    cheat = swarm.seated(1)[0]
    swarm.characters[cheat] = character
    return swarm, cheat


def test_an_honest_sketch_over_a_tensor_that_nobody_gets_costs_the_seat() -> None:
    for run in range(4):
        swarm, cheat = swarm_with(Character(attack="gw skipped", opens=USUAL, withholds=GW), f"withheld {run}")
        figures = Figures("withheld", 0.2)
        follow(swarm, cheat, figures)
        evicted = swarm.ledger.happened("evicted")
        assert [(event["worker"], event["reason"]) for event in evicted] == [(peer_id(cheat), "withheld")]
        assert {event["ballot"] for event in swarm.ledger.happened("ballot")} == {"data-missing"}
        assert not swarm.ledger.happened("slashed")
        assert_nobody_else_suffers(figures)
        paid = swarm.state.worker(swarm.task, cheat)
        assert paid is not None
        assert paid.bond + paid.withheld < 20_000


def test_the_same_tensor_given_to_those_who_ask_convicts() -> None:
    swarm, cheat = swarm_with(Character(attack="gw skipped", opens=USUAL), "given")
    follow(swarm, cheat, Figures("given", 0.2))
    assert [event["worker"] for event in swarm.ledger.happened("slashed")] == [peer_id(cheat)]


def test_friends_who_say_that_all_is_there_do_not_help() -> None:
    swarm, cheat = swarm_with(Character(attack="gw skipped", opens=USUAL, withholds=GW), "friends")
    friend = outsiders(swarm)[0]
    swarm.characters[friend] = Character(judges=agree)
    follow(swarm, cheat, Figures("friends", 0.2))
    assert cheat not in swarm.seated(1)


def test_who_says_that_data_is_missing_which_is_there_costs_nobody_anything() -> None:
    swarm = swarm_of("nothing missing", 2000)
    *_, liar = outsiders(swarm)
    swarm.characters[liar] = Character(misses=True)
    for _ in range(40):
        swarm.work(1)
    disputed = swarm.ledger.happened("disputed")
    cleared = {event["audit"] for event in swarm.ledger.happened("acquitted")}
    open_still = {audit.id.hex() for audit in swarm.audits()}
    assert disputed
    assert {event["audit"] for event in disputed} <= cleared | open_still
    assert not {"evicted", "charged", "withheld", "undecided"} & set(swarm.ledger.kinds())
    assert swarm.settled > 4
