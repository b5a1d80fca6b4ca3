"""Data that is not given: a worker that does not open what it claimed is never slashed, but loses its seat."""

from chain.keys import peer_id
from tests.attacks.kit import Character, swarm_of


def test_a_cheat_that_opens_nothing_is_paid_for_nothing_that_was_drawn_and_loses_its_seat() -> None:
    swarm = swarm_of("closed", 2000)
    cheat = swarm.seated(1)[0]
    swarm.characters[cheat] = Character(attack="zero gradients")
    swarm.silent.add((cheat, "open"))
    for _ in range(300):
        swarm.work(1)
        if cheat not in swarm.seated(1):
            break
    evicted = swarm.ledger.happened("evicted")
    assert [(event["worker"], event["reason"]) for event in evicted] == [(peer_id(cheat), "withheld")]
    assert not swarm.ledger.happened("slashed")
    mine = [event for event in swarm.ledger.happened("withheld") if event["worker"] == peer_id(cheat)]
    assert len(mine) >= swarm.state.params.withheld_limit
    worker = swarm.state.worker(swarm.task, cheat)
    assert worker is not None
    assert worker.bond + worker.withheld < 20_000
