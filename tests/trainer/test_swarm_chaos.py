"""Random deaths, returns, delays and slowness: always the model of the undisturbed run."""

import random
from functools import lru_cache

import pytest
from swarm_kit import CLIENT, Kit, assert_same_model, manifest_of, trained

from trainer.messages import Activation, CellDone, Gradient, Partial, Passed, Ready, Reduced
from trainer.state import StageState
from trainer.transport import Faults

MANIFEST = manifest_of(stages=3, steps=4, layers=3)
REPLICAS = 3
MOMENTS = (Activation, CellDone, Gradient, Partial, Passed, Ready, Reduced)


@lru_cache
def undisturbed() -> tuple[StageState, ...]:
    return trained(Kit(MANIFEST, REPLICAS))


def disturbed(dice: random.Random) -> Kit:
    """Return a swarm where one replica a stage is safe and everything else may happen."""
    faults, slow, peers = Faults(), {}, []
    for stage in range(MANIFEST.stages):
        names = [f"s{stage}r{replica}" for replica in range(REPLICAS)]
        peers += names
        dice.shuffle(names)
        for peer in names[1:]:
            if dice.random() < 0.6:
                moment = dice.choice(MOMENTS)
                faults.crash(peer, after=dice.randint(1, 6), of=moment, before=dice.random() < 0.5)
            if dice.random() < 0.2:
                slow[peer] = dice.choice((0.1, 5.0, 30.0))
    for _ in range(dice.randint(0, 6)):
        faults.delay(dice.choice(peers), dice.choice([*peers, CLIENT]), dice.choice((0.1, 1.0, 12.0)))
    return Kit(MANIFEST, REPLICAS, faults, slow)


@pytest.mark.parametrize("seed", range(12))
def test_whatever_happens_the_model_is_the_same(seed: int) -> None:
    dice = random.Random(seed)
    kit = disturbed(dice)

    def revive() -> None:
        for stage, peers in enumerate(kit.governor.members.stages):
            for peer in peers:
                if not kit.hub.has(peer) and dice.random() < 0.5:
                    kit.start(peer, stage)

    kit.governor.hooks = dict.fromkeys(range(2, MANIFEST.steps + 1), revive)
    assert_same_model(trained(kit), undisturbed())
    assert len(kit.losses) == MANIFEST.steps
