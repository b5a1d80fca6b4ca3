"""What one seeded run meets: stakes, enemies, and the faults of its network and machines. Plain data.

`next_stakes` is the ledger of the simulated world: the set that decides the next height follows from
the block just decided. Nothing here knows `chain`, so that the oracle may use all of it.
"""

import random
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, replace

HEAL_SECONDS = 25.0
PATIENCE_SECONDS = 300.0
DELAYS = ((0.001, 0.02), (0.001, 0.1), (0.001, 0.4), (0.001, 1.0), (0.5, 2.0))
BEHAVIOURS = ("silent", "withholds", "selective", "equivocates", "invalid", "stale", "replays", "signs-everything")
"""What a byzantine validator does; `byzantine.py` says how."""


@dataclass(frozen=True)
class Partition:
    """From `start` to `end` seconds only nodes of equal group reach each other."""

    start: float
    end: float
    groups: tuple[int, ...]


@dataclass(frozen=True)
class Scenario:
    """One run. Index i < len(stakes) is a validator; the Twins' further instances come after them."""

    seed: int
    mode: str
    stakes: tuple[int, ...]
    """Of every validator when it joins; those in `members` decide the first height."""
    members: tuple[int, ...]
    twins: tuple[int, ...] = ()
    """The validator of each further instance: one that is named twice runs three times."""
    byzantine: tuple[tuple[int, str], ...] = ()
    heights: int = 2
    churn: bool = False
    """Whether decided blocks change the validator set."""
    loss: float = 0.0
    """Chance that a message is lost before the network heals; afterwards at most 10 %."""
    duplication: float = 0.0
    delay: tuple[float, float] = DELAYS[0]
    crash_chance: float = 0.0
    """Chance to die before, and again after, each durable write, until the network heals."""
    crash_at: int | None = None
    """The one write (2k before, 2k + 1 after the k-th of all) at which its node dies."""
    partitions: tuple[Partition, ...] = ()
    heal: float = HEAL_SECONDS
    """When partitions, crashes and heavy loss end."""
    patience: float = PATIENCE_SECONDS
    """Seconds after the healing by which every honest node must be done."""
    quiet: tuple[float, float] | None = None
    """From when to when nothing may be decided, because a third of the stake is silent."""

    @property
    def owners(self) -> tuple[int, ...]:
        """The validator that each node acts for."""
        return (*range(len(self.stakes)), *self.twins)

    @property
    def faulty(self) -> frozenset[int]:
        """The validators that are not honest."""
        return frozenset(self.twins) | {index for index, _ in self.byzantine}


def next_stakes(
    current: Mapping[bytes, int], joining: Mapping[bytes, int], faulty: Set[bytes], number: int
) -> dict[bytes, int]:
    """Return the set after a block with this `number`: one validator joins, leaves or changes its stake.

    A change that would leave nobody, or the faulty with a third of the stake, does not happen.
    """
    action, number = number % 4, number // 4
    account = sorted(joining)[number % len(joining)]
    number //= len(joining)
    changed = dict(current)
    if action == 1 and account in changed:
        del changed[account]
    elif action == 1:
        changed[account] = joining[account]
    elif action > 1 and account in changed:
        changed[account] = 1 + number % (9 if action == 2 else 1000)
    wicked = sum(stake for account, stake in changed.items() if account in faulty)
    return changed if changed and 3 * wicked < sum(changed.values()) else dict(current)


def _stakes(count: int, rng: random.Random) -> tuple[int, ...]:
    kind = rng.randrange(3)
    if kind == 0:
        return (1,) * count
    return tuple(rng.randint(1, 9) if kind == 1 else rng.choice((1, 10, 100, 1000)) for _ in range(count))


def below_third(stakes: tuple[int, ...], members: tuple[int, ...], most: int, rng: random.Random) -> tuple[int, ...]:
    """Return up to `most` members with less than a third of the members' stake together."""
    total = sum(stakes[i] for i in members)
    chosen: list[int] = []
    for index in rng.sample(members, len(members)):
        if len(chosen) < most and 3 * sum(stakes[i] for i in (*chosen, index)) < total:
            chosen.append(index)
    return tuple(chosen)


def _splits(nodes: int, twins: tuple[int, ...], rng: random.Random) -> tuple[Partition, ...]:
    """Up to four partitions into two or three groups, which mostly tear a Twin's instances apart."""
    partitions = []
    for _ in range(rng.randint(0, 4)):
        start, kinds = rng.uniform(0, HEAL_SECONDS - 5), rng.choice((2, 2, 3))
        groups = [rng.randrange(kinds) for _ in range(nodes)]
        for place, twin in enumerate(twins, nodes - len(twins)):
            if rng.random() < 0.7:
                groups[place] = (groups[twin] + 1) % kinds
        partitions.append(Partition(start, min(start + rng.uniform(1, 10), HEAL_SECONDS), tuple(groups)))
    return tuple(partitions)


def mixed(seed: int) -> Scenario:
    """1 to 10 validators that come and go, Twins below a third, every fault of network and machines."""
    rng = random.Random(f"mixed {seed}")
    count = rng.randint(1, 10)
    stakes, churn = _stakes(count, rng), rng.random() < 0.5
    members = tuple(range(count))
    if churn:
        members = tuple(sorted(rng.sample(members, rng.randint((count + 1) // 2, count))))
    twins = below_third(stakes, members, rng.choice((0, 1, 1, 2, 3)), rng)
    if twins and rng.random() < 0.1:
        twins = (*twins, twins[0])
    return Scenario(
        seed=seed,
        mode="mixed",
        stakes=stakes,
        members=members,
        twins=twins,
        heights=rng.randint(2, 4 if count < 7 else 3),
        churn=churn,
        loss=rng.choice((0.0, 0.02, 0.1, 0.3)),
        duplication=rng.choice((0.0, 0.1)),
        delay=rng.choice(DELAYS),
        crash_chance=rng.choice((0.0, 0.02, 0.1)),
        partitions=_splits(count + len(twins), twins, rng),
    )


def byzantine(seed: int) -> Scenario:
    """Members below a third that withhold, equivocate, lie, replay or fall silent, some beside Twins."""
    rng = random.Random(f"byzantine {seed}")
    base = mixed(rng.getrandbits(40))
    stakes = _stakes(rng.randint(4, 7), rng)
    members = tuple(range(len(stakes)))
    enemies = below_third(stakes, members, rng.choice((1, 1, 2, 3)), rng)
    twins = enemies[1:] if rng.random() < 0.3 else ()
    return replace(
        base,
        seed=seed,
        mode="byzantine",
        stakes=stakes,
        members=members,
        twins=twins,
        byzantine=tuple((index, rng.choice(BEHAVIOURS)) for index in enemies if index not in twins),
        heights=rng.randint(2, 4),
        crash_chance=rng.choice((0.0, 0.05)),
        partitions=_splits(len(stakes) + len(twins), twins, rng),
    )


def crowded(seed: int) -> Scenario:
    """More than a third of the stake are Twins, at most 2f of 3f + 1: the chain may fork, not lie about whom."""
    rng = random.Random(f"crowded {seed}")
    third = rng.choice((1, 1, 2, 3))
    count = 3 * third + 1
    twins = tuple(rng.sample(range(count), rng.randint(third + 1, 2 * third)))
    stakes = (1,) * count if rng.random() < 0.7 else tuple(rng.randint(2, 3) for _ in range(count))
    groups = [rng.randint(0, 1) for _ in range(count)]
    split = (*groups, *(1 - groups[twin] for twin in twins))
    return Scenario(
        seed=seed,
        mode="crowded",
        stakes=stakes,
        members=tuple(range(count)),
        twins=twins,
        loss=rng.choice((0.0, 0.05)),
        delay=rng.choice(DELAYS[:3]),
        partitions=(Partition(rng.uniform(0, 0.2), 12.0, split),),
        heal=12.0,
        patience=2.0,
    )


def crash(seed: int) -> Scenario:
    """A short run in which one node dies at the write that `crash_at` names; see `runs.crash_points`."""
    rng = random.Random(f"crash {seed}")
    count = rng.randint(1, 5)
    stakes = _stakes(count, rng)
    twins = below_third(stakes, tuple(range(count)), seed % 2, rng)
    return Scenario(
        seed=seed,
        mode="crash",
        stakes=stakes,
        members=tuple(range(count)),
        twins=twins,
        churn=bool(seed % 3),
        loss=rng.choice((0.0, 0.1)),
        delay=rng.choice(DELAYS[:3]),
        heal=10.0,
    )


def _isolated(count: int, silent: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(index + 1 if index in silent else 0 for index in range(count))


def _outage(seed: int, mode: str) -> Scenario:
    rng = random.Random(f"{mode} {seed}")
    stakes = _stakes(rng.randint(4, 10), rng)
    return Scenario(
        seed=seed,
        mode=mode,
        stakes=stakes,
        members=tuple(range(len(stakes))),
        loss=rng.choice((0.0, 0.1)),
        duplication=rng.choice((0.0, 0.1)),
        delay=rng.choice(DELAYS[1:4]),
    )


def silent(seed: int) -> Scenario:
    """As much stake as stays below a third is silent for ever: the others go on."""
    rng, base = random.Random(f"silence {seed}"), _outage(seed, "silent")
    quiet = below_third(base.stakes, base.members, len(base.stakes), rng)
    return replace(base, byzantine=tuple((index, "silent") for index in quiet), heal=0.0, heights=4)


def halt(seed: int) -> Scenario:
    """A third of the stake or more is away from second 2 to 60: nothing is decided, then all recover."""
    rng, base = random.Random(f"away {seed}"), _outage(seed, "halt")
    stakes = base.stakes if 3 * max(base.stakes) <= 2 * sum(base.stakes) else (1,) * len(base.stakes)
    away: tuple[int, ...] = ()
    while not sum(stakes) <= 3 * sum(stakes[i] for i in away) <= 2 * sum(stakes):
        away = tuple(rng.sample(base.members, rng.randint(1, len(stakes) - 1)))
    split = Partition(2.0, 60.0, _isolated(len(base.stakes), away))
    return replace(base, stakes=stakes, delay=(0.1, 0.4), heights=8, partitions=(split,), heal=60.0, quiet=(5.0, 60.0))


def split(seed: int) -> Scenario:
    """Two halves without a quorum do not reach each other for 30 seconds."""
    base = _outage(seed, "split")
    groups, order = [0] * len(base.stakes), sorted(base.members, key=lambda i: -base.stakes[i])
    for index in order:
        sides = [sum(base.stakes[i] for i in order if groups[i] == side) for side in (1, 2)]
        groups[index] = 1 if sides[0] <= sides[1] else 2
    return replace(base, heights=4, partitions=(Partition(1.0, 31.0, tuple(groups)),), heal=31.0)


def lossy(seed: int) -> Scenario:
    """One message of ten is lost, from the first to the last."""
    return replace(_outage(seed, "lossy"), loss=0.1, heal=0.0, heights=4)


def slow(seed: int) -> Scenario:
    """Every message takes longer than the first view's timer."""
    return replace(_outage(seed, "slow"), delay=(1.2, 2.0), heal=0.0)


MODES: dict[str, Callable[[int], Scenario]] = {
    mode.__name__: mode for mode in (mixed, byzantine, crowded, crash, silent, halt, split, lossy, slow)
}
