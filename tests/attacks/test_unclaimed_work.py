"""A saboteur that wants no pay: it sends false results, adds false gradients, and claims none of it."""

from dataclasses import dataclass

import pytest

from chain.keys import peer_id
from tests.attacks.kit import Character, RealSwarm, swarm_of
from tests.chain.ledger_kit import Sent

BLOCKS = 200


@dataclass
class Unclaimed(RealSwarm):
    """A swarm in which some claim nothing of what they do."""

    silent_workers: frozenset[bytes] = frozenset()

    def claims(self, step: int) -> list[Sent]:
        """Return the claims of one step, without those that are not sent."""
        return [(key, sent) for key, sent in super().claims(step) if key.account not in self.silent_workers]


def sabotaged() -> tuple[Unclaimed, bytes]:
    plain = swarm_of("unclaimed", 10_000)
    swarm = Unclaimed(plain.ledger, plain.client, plain.task)
    saboteur = swarm.seated(1)[0]
    swarm.silent_workers = frozenset([saboteur])
    swarm.characters[saboteur] = Character(attack="sign flip")
    for _ in range(BLOCKS):
        swarm.work(1)
    return swarm, saboteur


def test_it_earns_nothing_and_each_of_its_steps_waits_for_the_whole_claim_window() -> None:
    swarm, saboteur = sabotaged()
    worker = swarm.state.worker(swarm.task, saboteur)
    assert worker is not None
    assert (worker.settled_cells, worker.withheld) == (0, 0)  # what it earns is for the audits that it does
    window, task = swarm.state.params.claim_window, swarm.state.task(swarm.task)
    assert task is not None
    assert 0 < task.settled <= task.depth * (BLOCKS // window + 1)
    assert not {"slashed", "charged", "withheld"} & set(swarm.ledger.kinds())


@pytest.mark.xfail(
    reason="only claimed work is drawn, and a step settles without what nobody claims: the client would have to see it",
    strict=True,
)
def test_it_loses_its_seat() -> None:
    swarm, saboteur = sabotaged()
    assert peer_id(saboteur) in {event["worker"] for event in swarm.ledger.happened("evicted")}
