"""Auditors that let a partner's false cells pass: found by second audits, and nobody honest with them."""

from chain.keys import peer_id
from tests.attacks.kit import USUAL, Character, Place, RealSwarm, agree, auditors_of, swarm_of

RUNS = 8
FRIENDS = 2


def ring(run: int, repeated: int) -> tuple[RealSwarm, bytes, set[bytes]]:
    """Return a swarm with a cheat of one cell in eight and auditors who find what it claims."""
    swarm = swarm_of(f"ring {run}", 4000, reaudit_rate=repeated)
    cheat = swarm.seated(1)[run % 2]
    friends = set(sorted(auditors_of(swarm, cheat))[:FRIENDS])
    swarm.characters |= {friend: Character(judges=agree) for friend in friends}

    def sometimes(_: RealSwarm, place: Place) -> bool:
        return (place.step + place.cell) % 8 == run % 8

    swarm.characters[cheat] = Character(attack="y x 1.01", is_cheating=sometimes)
    return swarm, cheat, friends


def let_pass(swarm: RealSwarm, friends: set[bytes]) -> set[str]:
    """Return the first audits of false cells that friends of the cheat have let pass."""
    false = {tuple(place[1:4]) for place in swarm.cheated}
    names = {peer_id(friend) for friend in friends}
    return {
        str(event["audit"])
        for event in swarm.ledger.happened("passed")
        if event["auditor"] in names and (event["step"], event["stage"], event["cell"]) in false
    }


def test_who_lets_a_false_cell_pass_is_charged_once_an_honest_auditor_repeats_the_audit() -> None:
    reopened = charged = 0
    for run in range(RUNS):
        swarm, cheat, friends = ring(run, 10_000)
        for _ in range(70):
            swarm.work(1)
        guilty = {peer_id(friend) for friend in friends}
        assert {event["worker"] for event in swarm.ledger.happened("slashed")} == {peer_id(cheat)}
        assert {event["auditor"] for event in swarm.ledger.happened("charged")} <= guilty
        assert {event["audit"] for event in swarm.ledger.happened("refuted")} <= let_pass(swarm, friends)
        reopened += len(swarm.ledger.happened("reopened"))
        charged += len(swarm.ledger.happened("charged"))
    assert reopened == charged >= 3


def test_second_audits_on_unlike_machines_charge_nobody() -> None:
    swarm = swarm_of("unlike", 4000, reaudit_rate=10_000)
    kernels = ["both", USUAL]
    for index, account in enumerate(sorted(swarm.state.validators().powers)):
        swarm.characters[account] = Character(kernel=kernels[index % 2])
    for _ in range(70):
        swarm.work(1)
    assert len(swarm.ledger.happened("passed")) > 200
    assert not {"disputed", "reopened", "charged", "slashed"} & set(swarm.ledger.kinds())
