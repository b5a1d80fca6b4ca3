"""A saboteur that wants no pay: it sends false results, adds false gradients, and claims none of it, or not all."""

from dataclasses import dataclass

from chain.keys import PrivateKey, peer_id
from chain.transactions import Payload, SubmitClaims
from tests.attacks.kit import REPLICAS, Character, RealSwarm, swarm_of
from tests.chain.ledger_kit import Sent


@dataclass
class Unclaimed(RealSwarm):
    """A swarm in which some claim nothing of what they do, or the first of their cells only."""

    silent_workers: frozenset[bytes] = frozenset()
    stingy_workers: frozenset[bytes] = frozenset()

    def claims(self, step: int) -> list[Sent]:
        """Return the claims of one step, without those that are not sent."""
        return [self._said(key, sent) for key, sent in super().claims(step) if key.account not in self.silent_workers]

    def _said(self, key: PrivateKey, payload: Payload) -> Sent:
        if key.account not in self.stingy_workers or not isinstance(payload, SubmitClaims):
            return key, payload
        (claim,) = payload.claims
        return key, SubmitClaims((self._claim_of(key.account, claim.step, claim.stage, claim.cells[:1]),))


def sabotaged(rate: int) -> tuple[Unclaimed, bytes]:
    plain = swarm_of("unclaimed", rate, step_share=0)
    swarm = Unclaimed(plain.ledger, plain.client, plain.task)
    saboteur = swarm.seated(1)[0]
    swarm.characters[saboteur] = Character(attack="sign flip")
    return swarm, saboteur


def test_it_loses_its_seat_and_until_then_each_of_its_steps_waits_for_the_whole_claim_window() -> None:
    swarm, saboteur = sabotaged(10_000)
    swarm.silent_workers = frozenset([saboteur])
    window, limit = swarm.state.params.claim_window, swarm.state.params.withheld_limit
    task, begun = swarm.state.task(swarm.task), swarm.state.height
    assert task is not None
    while saboteur in swarm.seated(1):
        swarm.work(1)
        assert swarm.state.height - begun <= limit * (window + 2)
    assert swarm.settled <= limit * task.depth  # as many steps keep what it added
    worker = swarm.state.worker(swarm.task, saboteur)
    assert worker is not None
    assert (worker.settled_cells, worker.bond, worker.withheld) == (0, 0, 0)  # what it earns is for audits that it does
    evicted = swarm.ledger.happened("evicted")
    assert [(event["worker"], event["reason"]) for event in evicted] == [(peer_id(saboteur), "silent")]
    settled = swarm.settled
    swarm.work(window)
    assert swarm.settled >= settled + 2 * task.depth  # nobody waits any more
    assert not {"slashed", "charged", "withheld"} & set(swarm.ledger.kinds())


def test_who_claims_a_few_of_its_cells_has_every_step_audited_in_which_others_are_missing() -> None:
    swarm, saboteur = sabotaged(500)
    swarm.stingy_workers = frozenset([saboteur])
    swarm.characters[saboteur] = Character()  # what it claims is true
    task = swarm.state.task(swarm.task)
    assert task is not None
    swarm.work(swarm.state.params.claim_window)
    name = peer_id(saboteur)
    drawn = [e for e in swarm.ledger.happened("drawn") if e["worker"] == name and e["cell"] == task.transition]
    assert {event["step"] for event in drawn} == set(range(1, task.depth + 1))
    assert len(swarm.seated(1)) == REPLICAS  # what its record then lacks: tests/tdml_p2p/swarm/test_step_audits.py
