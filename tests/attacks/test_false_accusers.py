"""Auditors that accuse without cause, or without having computed: they pay, and whom they accuse does not."""

import pytest

from chain.keys import peer_id
from chain.records import Audit
from tests.attacks.kit import Character, RealSwarm, outsiders, swarm_of


def says(result: str) -> Character:
    return Character(judges=lambda swarm, audit, round_: result)


@pytest.mark.parametrize("result", ["sign flip", "replayed cell", "y x 1.001"])
def test_an_auditor_that_claims_another_result_is_charged_each_time(result: str) -> None:
    swarm = swarm_of(f"accuser {result}", 2000)
    liar = outsiders(swarm)[-1]
    swarm.characters[liar] = says(result)
    for _ in range(40):
        swarm.work(1)
    charged = swarm.ledger.happened("charged")
    assert charged
    assert {event["auditor"] for event in charged} == {peer_id(liar)}
    assert not swarm.ledger.happened("evicted")
    disputed = {event["audit"] for event in swarm.ledger.happened("disputed")}
    assert {event["auditor"] for event in swarm.ledger.happened("disputed")} == {peer_id(liar)}
    acquitted = {event["audit"] for event in swarm.ledger.happened("acquitted")}
    assert len(disputed - acquitted) <= len(swarm.audits())


def test_a_juror_that_always_condemns_convicts_nobody() -> None:
    swarm = swarm_of("jurors", 2000)
    *_, one, two = sorted(swarm.state.validators().powers)

    def condemn(_: RealSwarm, __: Audit, round_: int) -> str:
        return "sign flip" if round_ else "same kernels"

    swarm.characters |= {one: Character(judges=condemn), two: Character(judges=condemn)}
    accuser = outsiders(swarm)[0]
    swarm.characters[accuser] = says("sign flip")
    for _ in range(40):
        swarm.work(1)
    assert swarm.ledger.happened("disputed")
    assert swarm.ledger.happened("charged")
    assert not swarm.ledger.happened("evicted")


def test_a_contradiction_that_nobody_else_finds_costs_the_accuser_its_draws_and_the_worker_nothing() -> None:
    swarm = swarm_of("flags", 2000)
    *_, liar = outsiders(swarm)
    swarm.characters[liar] = Character(accuses=True)
    while not swarm.ledger.happened("acquitted"):
        swarm.work(1)
    assert swarm.state.account(liar).absent_until > swarm.state.height
    for _ in range(40):
        swarm.work(1)
    assert not {"evicted", "charged", "undecided"} & set(swarm.ledger.kinds())
    worker = swarm.ledger.happened("acquitted")[0]["worker"]
    (record,) = [w for w in swarm.state.workers(swarm.task) if peer_id(w.account) == worker]
    assert record.settled_cells == 8 * swarm.settled
