"""Validators that lead several blocks in a row know the seeds of these beforehand, and what they will draw."""

from collections.abc import Callable

import pytest

from chain.hashing import digest
from chain.ledger.claims import claim_id
from chain.randomness import chance, leader, next_seed
from chain.state import State
from chain.transactions import Claim
from tests.attacks.kit import Character, Place, RealSwarm, swarm_of
from tests.chain import ledger_kit
from tests.chain.ledger_kit import ONIONS

RATE = 1000
BLOCKS = 150
SHARE = 0.3


def led_by_lot(state: State, _members: list[bytes]) -> tuple[bytes, bytes]:
    """Return the leader of the next block by the chain's own rule, with what it reveals."""
    first = leader(state.validators(), state.leader_seed, state.height + 1, 1)
    validator = state.validator(first)
    assert validator is not None
    return first, ONIONS[first].below(validator.onion_tip)


@pytest.fixture(autouse=True)
def _by_lot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_kit, "_proposal_of", led_by_lot)


def foreseen_seed(state: State, known: set[bytes], blocks: int) -> bytes | None:
    """Return the seed so many blocks from now, None unless validators of which all is known lead all of them."""
    seed, tips = state.seed, dict[bytes, bytes]()
    for height in range(state.height + 1, state.height + 1 + blocks):
        if height % state.params.epoch_blocks == 1 and height > state.height + 1:
            return None  # another order of leaders, which it might know as well
        first = leader(state.validators(), state.leader_seed, height, 1)
        validator = state.validator(first)
        if first not in known or validator is None:
            return None
        tips[first] = ONIONS[first].below(tips.get(first, validator.onion_tip))
        seed = next_seed(seed, tips[first])
    return seed


def seer(swarm: RealSwarm, cheat: bytes, known: set[bytes], told: list[int]) -> Callable[[RealSwarm, Place], bool]:
    """Cheat in the cells of which it knows that nobody will look at them; `told` counts the blocks of foresight."""

    def is_cheating(one: RealSwarm, place: Place) -> bool:
        seed = foreseen_seed(one.state, known, 1 + one.state.params.draw_delay)
        if seed is None:
            return False
        told.append(one.state.height)
        claim = Claim(one.task, place.generation, place.step, place.stage, (place.cell,), *[bytes(32)] * 3)
        identity = digest("audit", claim_id(claim, cheat), place.cell.to_bytes(4, "big"))
        return not chance(seed, identity, RATE)

    return is_cheating


def seen(run: int, delay: int) -> tuple[RealSwarm, int]:
    """Return a swarm whose cheat knows all of 3 of 10 validators, itself one of them, and its blocks of foresight."""
    swarm = swarm_of(f"seer {run}", RATE, draw_delay=delay)
    cheat = swarm.seated(1)[run % 2]
    others = sorted(set(swarm.state.validators().powers) - {w.account for w in swarm.state.workers(swarm.task)})
    told: list[int] = []
    swarm.characters[cheat] = Character(attack="gw x 1.01", is_cheating=seer(swarm, cheat, {cheat, *others[:2]}, told))
    for _ in range(BLOCKS):
        swarm.work(1)
    return swarm, len(set(told))


def test_what_is_foreseen_is_never_caught_and_is_the_share_to_the_third() -> None:
    """The known limit of the beacon: with 30 % of the stake 2.7 % of all blocks, in which a cheat is safe."""
    blocks = cheated = 0
    for run in range(6):
        swarm, foreseen = seen(run, delay=2)
        blocks, cheated = blocks + foreseen, cheated + len(swarm.cheated)
        assert not swarm.ledger.happened("disputed")  # what it foresees it is right about
    assert cheated > 0
    assert blocks < 3 * SHARE**3 * 6 * BLOCKS


def test_a_longer_delay_leaves_nothing_to_foresee() -> None:
    for run in range(2):
        swarm, foreseen = seen(run, delay=7)
        assert (foreseen, swarm.cheated) == (0, [])
        assert swarm.settled > 20
