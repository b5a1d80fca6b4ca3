"""A stage whose replicas are of one owner: they cheat alike, and each finds what the other has claimed."""

import pytest

from chain.keys import peer_id
from tests.attacks.kit import Character, RealSwarm, agree, auditors_of, swarm_of

RATE = 2000
RUNS = 24


def colluding_stage(run: str, stage: int) -> tuple[RealSwarm, list[bytes]]:
    """Return a swarm in which the replicas of a stage cheat in every cell and judge each other's as right."""
    swarm = swarm_of(run, RATE)
    owned = swarm.seated(stage)
    swarm.characters |= {account: Character(attack="gw x 1.01", judges=agree) for account in owned}
    return swarm, owned


def cheated_until_dispute(swarm: RealSwarm, cheat: bytes) -> int | None:
    """Return how many cells a replica has cheated in up to the first that was disputed, itself included."""
    disputed = {
        (event["step"], event["stage"], event["cell"])
        for event in swarm.ledger.happened("disputed")
        if event["worker"] == peer_id(cheat)
    }
    own = [place[1:4] for place in swarm.cheated if swarm.owners[place] == cheat and not place.generation]
    return next((number for number, place in enumerate(own, 1) if place in disputed), None)


@pytest.mark.parametrize("stage", [0, 1])
def test_a_stage_that_agrees_is_convicted_after_as_many_cells_as_a_single_cheat(stage: int) -> None:
    counts = []
    for run in range(RUNS // 2):
        swarm, owned = colluding_stage(f"stage {stage} {run}", stage)
        guilty = {peer_id(account) for account in owned}
        for _ in range(200):
            swarm.work(1)
            if not swarm.seated(stage):
                break
        assert {event["worker"] for event in swarm.ledger.happened("slashed")} == guilty
        assert {event["worker"] for event in swarm.ledger.happened("evicted")} == guilty
        assert {event["auditor"] for event in swarm.ledger.happened("charged")} <= guilty
        counts += [count for account in owned if (count := cheated_until_dispute(swarm, account)) is not None]
    h = RATE / 10_000
    spread = 4 * ((1 - h) / h**2 / len(counts)) ** 0.5
    assert len(counts) >= RUNS // 2
    assert abs(sum(counts) / len(counts) - 1 / h) < spread, counts


def test_none_of_its_cells_is_audited_by_the_stage_itself() -> None:
    swarm, owned = colluding_stage("outside", 1)
    able = {peer_id(account) for account in auditors_of(swarm, owned[0])}
    swarm.work(12)
    drawn = [event for event in swarm.ledger.happened("drawn") if event["stage"] == 1]
    assert drawn
    assert {event["auditor"] for event in drawn} <= able
    assert not able & {peer_id(account) for account in owned}
