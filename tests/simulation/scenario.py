"""What one seeded run meets: stakes, Twins, and the faults of its network and machines."""

import random
from dataclasses import dataclass

HEAL_SECONDS = 25.0
PATIENCE_SECONDS = 300.0


@dataclass(frozen=True)
class Partition:
    """From `start` to `end` seconds only nodes of equal group reach each other."""

    start: float
    end: float
    groups: tuple[int, ...]


@dataclass(frozen=True)
class Scenario:
    """One run. Index i < len(stakes) is a validator; the Twins' second instances come after them."""

    seed: int
    stakes: tuple[int, ...]
    twins: tuple[int, ...]
    heights: int
    loss: float
    """Chance that a message is lost before the network heals; afterwards at most 10 %."""
    duplication: float
    delay: float
    crash_chance: float
    invalid_chance: float
    partitions: tuple[Partition, ...]
    heal: float = HEAL_SECONDS
    """When partitions, crashes and heavy loss end."""
    patience: float = PATIENCE_SECONDS
    """Seconds after the healing by which every honest node must be done."""

    @property
    def owners(self) -> tuple[int, ...]:
        """The validator that each node acts for."""
        return (*range(len(self.stakes)), *self.twins)


def below_third(stakes: tuple[int, ...], rng: random.Random) -> tuple[int, ...]:
    """Return one validator with less than a third of the stake, or none where every one has more."""
    light = [i for i, stake in enumerate(stakes) if 3 * stake < sum(stakes)]
    return (rng.choice(light),) if light else ()


def scenario(seed: int, *, loss: float | None = None) -> Scenario:
    """Return the scenario of `seed`: 1 to 7 validators, equal or random stakes, at most one Twin."""
    rng = random.Random(f"scenario {seed}")
    count = rng.randint(1, 7)
    stakes = (1,) * count if rng.random() < 0.5 else tuple(rng.randint(1, 9) for _ in range(count))
    twins = below_third(stakes, rng) if rng.random() < 0.7 else ()
    nodes = count + len(twins)
    partitions: list[Partition] = []
    for _ in range(rng.randint(0, 4)):
        start = rng.uniform(0, HEAL_SECONDS - 5)
        groups = [rng.randint(0, 1) for _ in range(nodes)]
        if twins and rng.random() < 0.7:
            groups[-1] = 1 - groups[twins[0]]
        partitions.append(Partition(start, min(start + rng.uniform(1, 10), HEAL_SECONDS), tuple(groups)))
    return Scenario(
        seed=seed,
        stakes=stakes,
        twins=twins,
        heights=rng.randint(2, 4),
        loss=rng.choice((0.0, 0.02, 0.1, 0.3)) if loss is None else loss,
        duplication=rng.choice((0.0, 0.1)),
        delay=rng.choice((0.02, 0.1, 0.4, 1.0)),
        crash_chance=rng.choice((0.0, 0.02, 0.1)),
        invalid_chance=rng.choice((0.0, 0.1)),
        partitions=tuple(partitions),
    )


def crowded(seed: int) -> Scenario:
    """Return a scenario with so many Twins (f + 1 to 2f of 3f + 1) that the chain may fork."""
    rng = random.Random(f"crowded {seed}")
    third = rng.randint(1, 2)
    count = 3 * third + 1
    twins = tuple(rng.sample(range(count), rng.randint(third + 1, 2 * third)))
    groups = [rng.randint(0, 1) for _ in range(count)]
    split = (*groups, *(1 - groups[twin] for twin in twins))
    return Scenario(
        seed=seed,
        stakes=(1,) * count,
        twins=twins,
        heights=2,
        loss=rng.choice((0.0, 0.05)),
        duplication=0.0,
        delay=rng.choice((0.02, 0.1)),
        crash_chance=0.0,
        invalid_chance=0.0,
        partitions=(Partition(rng.uniform(0, 1), 12.0, split),),
        heal=12.0,
        patience=2.0,
    )
