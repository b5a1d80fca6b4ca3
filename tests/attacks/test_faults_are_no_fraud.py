"""Crashes, slowness, loss, partitions and full disks of honest peers: never a slash, a charge or a conviction."""

import random
from collections import Counter
from collections.abc import Callable

import pytest

from bench.support.recordings import HONEST
from chain.keys import peer_id
from chain.transactions import Commit, SubmitClaims
from tests.attacks.faults import FOREVER, FaultySwarm, Outage
from tests.attacks.kit import STAGES, Character, swarm_of
from tests.chain.ledger_kit import STAKE

SEEDS = 10
BLOCKS = 64
RATE = 2000
LEASE = 30
"""Blocks after which a worker that is gone has lost its seat."""
SILENCE = 30
SLOW = 9
"""Blocks that a peer takes ten times as long as others, whose answers come in the next one: ten in all."""
PUNISHMENTS = {"slashed", "charged", "convicted", "evicted", "equivocation", "refuted"}
Break = Callable[[FaultySwarm], None]


def swarm_with(name: str, seed: int) -> FaultySwarm:
    """Return a swarm of honest peers with unlike kernels."""
    plain = swarm_of(f"{name} {seed}", RATE, lease_blocks=LEASE)
    swarm = FaultySwarm(plain.ledger, plain.client, plain.task, dice=random.Random(f"{name} {seed}"))
    kernels = list(HONEST)
    for index, account in enumerate(sorted(swarm.state.validators().powers)):
        swarm.characters[account] = Character(kernel=kernels[(index + seed) % len(kernels)])
    return swarm


def outsiders(swarm: FaultySwarm) -> list[bytes]:
    """Return the peers that audit only."""
    workers = {worker.account for worker in swarm.state.workers(swarm.task)}
    return sorted(set(swarm.state.validators().powers) - workers)


def one_of_a_stage(swarm: FaultySwarm) -> bytes:
    """Return some worker."""
    return swarm.dice.choice(swarm.seated(swarm.dice.randrange(STAGES)))


def away(swarm: FaultySwarm, accounts: list[bytes], blocks: int) -> None:
    """Have peers send and serve nothing for so many blocks, from some moment on."""
    start = swarm.state.height + swarm.dice.randrange(5, 20)
    swarm.outages.append(Outage(frozenset(accounts), start, start + blocks))


def crash(swarm: FaultySwarm) -> None:
    away(swarm, [one_of_a_stage(swarm), swarm.dice.choice(outsiders(swarm))], FOREVER)


def ten_times_slower(swarm: FaultySwarm) -> None:
    swarm.delays = {one_of_a_stage(swarm): SLOW, swarm.dice.choice(outsiders(swarm)): SLOW}


def a_fifth_of_all_transactions_lost(swarm: FaultySwarm) -> None:
    swarm.loss = 0.2


def partition(swarm: FaultySwarm) -> None:
    """Cut off three of ten: with a whole third of the stake there would be no blocks for anybody."""
    away(swarm, swarm.dice.sample(sorted(swarm.state.validators().powers), 3), SILENCE)


def auditor_killed_between_commit_and_reveal(swarm: FaultySwarm) -> None:
    swarm.killed_after = dict.fromkeys(swarm.dice.sample(outsiders(swarm), 2), Commit)


def worker_killed_between_claim_and_opening(swarm: FaultySwarm) -> None:
    swarm.killed_after = {one_of_a_stage(swarm): SubmitClaims}


def disk_full(swarm: FaultySwarm) -> None:
    """Stop a peer that cannot write any more, until its owner has freed some space."""
    away(swarm, [one_of_a_stage(swarm)], 15)
    away(swarm, [swarm.dice.choice(outsiders(swarm))], 15)


def all_at_once(swarm: FaultySwarm) -> None:
    for fault in (crash, ten_times_slower, a_fifth_of_all_transactions_lost, disk_full):
        fault(swarm)


FAULTS: dict[Break, set[str]] = {
    crash: {"missed"},
    ten_times_slower: {"delayed"},
    a_fifth_of_all_transactions_lost: {"lost"},
    partition: {"missed"},
    auditor_killed_between_commit_and_reveal: {"killed", "missed"},
    worker_killed_between_claim_and_opening: {"killed", "missed"},
    disk_full: {"missed"},
    all_at_once: {"missed", "delayed", "lost"},
}
"""What each fault leads to, which must have been seen."""


def assert_nobody_is_punished(swarm: FaultySwarm) -> None:
    """Stakes are whole, and of a bond only a cell's price is gone for each opening that never came.

    That nothing is lost or made the ledger has checked in every block.
    """
    assert not PUNISHMENTS & set(swarm.ledger.kinds())
    task = swarm.state.task(swarm.task)
    assert task is not None
    unopened = Counter(str(event["worker"]) for event in swarm.ledger.happened("withheld"))
    for account in swarm.state.validators().powers:
        record = swarm.state.account(account)
        assert (record.barred, record.bonded) == (False, STAKE)
    for worker in swarm.state.workers(swarm.task):
        if worker.is_seated:
            lost = task.price * unopened[peer_id(worker.account)]
            assert worker.bond + worker.withheld >= task.worker_bond - lost


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_faults_of_honest_peers_cost_no_stake_no_bond_and_no_right(fault: Break) -> None:
    seen: Counter[str] = Counter()
    for seed in range(SEEDS):
        swarm = swarm_with(fault.__name__, seed)
        fault(swarm)
        for _ in range(BLOCKS):
            swarm.work(1)
        assert_nobody_is_punished(swarm)
        assert swarm.settled > 0
        seen += swarm.faults
    assert min(seen[kind] for kind in FAULTS[fault]) >= SEEDS


@pytest.mark.slow
def test_a_liar_gains_nothing_from_the_faults_of_others() -> None:
    """Third opinions and votes of whom it accuses are held while others are away, slow or unheard."""
    disputes = 0
    for seed in range(SEEDS // 2):
        swarm = swarm_with("liar", seed)
        all_at_once(swarm)
        liar = outsiders(swarm)[seed % len(outsiders(swarm))]
        swarm.characters[liar] = Character(judges=lambda _, __, ___: "sign flip")
        for _ in range(BLOCKS):
            swarm.work(1)
        assert {event["auditor"] for event in swarm.ledger.happened("charged")} <= {peer_id(liar)}
        assert not PUNISHMENTS - {"charged"} & set(swarm.ledger.kinds())
        disputes += len(swarm.ledger.happened("disputed"))
    assert disputes > SEEDS
