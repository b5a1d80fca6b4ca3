"""Fresh workers without stake that come back under new keys: what each of them can spoil, and what that costs whom."""

from dataclasses import dataclass, field

import pytest

from chain.keys import PrivateKey, peer_id
from chain.ledger.execution import check_envelope
from chain.reasons import Reason
from chain.records import Task
from chain.transactions import TakeSeat
from tests.chain import ledger_kit
from tests.chain.ledger_kit import KEYS, Ledger, Swarm, genesis_of, key_of, start_swarm

FRAUD = -2.0
PRICE = 10
BOND = 2000
STAGES, REPLICAS, MICROBATCHES, DEPTH = 2, 2, 8, 4
VALIDATORS = 8


@dataclass
class Losses:
    """What came of one identity after the other."""

    cells: list[int] = field(default_factory=list)
    """Cheated cells claimed by each until its eviction."""
    steps: list[int] = field(default_factory=list)
    """Claimed steps that each conviction rolled back."""
    voided: list[int] = field(default_factory=list)
    """Cells of honest workers voided by each conviction: work that nobody pays."""
    blocks: list[int] = field(default_factory=list)
    """Blocks from one conviction to the next."""


def task_of(swarm: Swarm) -> Task:
    task = swarm.state.task(swarm.task)
    assert task is not None
    return task


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> list[PrivateKey]:
    """Keys of accounts that nobody has ever paid anything."""
    keys = [key_of(1000 + number) for number in range(40)]
    monkeypatch.setattr(ledger_kit, "KEYS", [*KEYS, *keys])
    return keys


def besieged(first: PrivateKey, **params: object) -> Swarm:
    """Return a swarm of three honest workers and one without a unit of stake, at a tenth of the cells audited."""
    terms = {"stages": STAGES, "replicas": REPLICAS, "microbatches": MICROBATCHES, "depth": DEPTH, "steps": 100}
    ledger = Ledger(genesis_of(VALIDATORS, 2, lease_blocks=100_000, **params))
    return start_swarm(ledger, [*KEYS[:3], first], price=PRICE, worker_bond=BOND, audit_rate=1000, **terms)


def run_until_out(swarm: Swarm, cheat: PrivateKey, losses: Losses) -> None:
    """Let an identity cheat in every cell until it is out; note what that spoilt."""
    swarm.deviation[cheat.account] = FRAUD
    begun, claimed = swarm.state.height, len(swarm.ledger.happened("claimed"))
    while not swarm.state.account(cheat.account).barred:
        swarm.work(1)
        assert swarm.state.height - begun < 100, "not convicted"
    events = swarm.ledger.happened("claimed")[claimed:]
    losses.cells.append(sum(len(e["cells"]) for e in events if e["worker"] == peer_id(cheat.account)))  # type: ignore[arg-type,misc]
    settled = task_of(swarm).settled
    lost = [e for e in events if e["step"] > settled]  # type: ignore[operator]
    losses.steps.append(len({e["step"] for e in lost}))
    losses.voided.append(sum(len(e["cells"]) for e in lost if e["worker"] != peer_id(cheat.account)))  # type: ignore[arg-type,misc]
    losses.blocks.append(swarm.state.height - begun)


def siege(identities: list[PrivateKey]) -> tuple[Swarm, Losses]:
    """Return what comes of identities of which each has applied before the one before is out: no seat stays free."""
    swarm, losses = besieged(identities[0]), Losses()
    for cheat, following in zip(identities, [*identities[1:], None], strict=True):
        while cheat.account not in (*swarm.seated(0), *swarm.seated(1)):
            swarm.work(1)
        if following is not None:
            assert swarm.ledger.one(following, TakeSeat(swarm.task, bytes(32))) == ""
        run_until_out(swarm, cheat, losses)
    return swarm, losses


def test_each_identity_spoils_no_more_than_the_ring_holds_and_honest_workers_lose_unpaid_work_only(
    fresh: list[PrivateKey],
) -> None:
    cheats = fresh[:20]
    swarm, losses = siege(cheats)
    share = MICROBATCHES // REPLICAS
    assert len(losses.cells) == len(cheats)
    assert max(losses.steps) <= DEPTH
    assert max(losses.cells) <= 2 * DEPTH * MICROBATCHES
    assert max(losses.voided) <= DEPTH * (STAGES * MICROBATCHES - share)
    assert max(losses.blocks) <= 25
    names = {peer_id(key.account) for key in cheats}
    assert {event["worker"] for event in swarm.ledger.happened("slashed")} == names
    assert {event["worker"] for event in swarm.ledger.happened("evicted")} == names
    assert not {"charged", "withheld", "faulted"} & set(swarm.ledger.kinds())
    for key in KEYS[:3]:
        worker = swarm.state.worker(swarm.task, key.account)
        assert worker is not None
        assert (worker.is_seated, worker.bond, worker.withholdings) == (True, BOND, 0)


def test_an_identity_earns_nothing_and_the_client_pays_the_audits_of_voided_work(fresh: list[PrivateKey]) -> None:
    swarm, _ = siege(fresh[:20])
    assert all(swarm.state.account(key.account).balance == 0 for key in fresh[:20])
    assert {event["amount"] for event in swarm.ledger.happened("slashed")} <= {
        str(PRICE * count) for count in range(BOND // PRICE)
    }
    task = task_of(swarm)
    paid = task.settled * STAGES * MICROBATCHES * PRICE
    audits = len([e for kind in ("passed", "convicted") for e in swarm.ledger.happened(kind)])
    escrow = ledger_kit.post_task(
        stages=STAGES, replicas=REPLICAS, microbatches=MICROBATCHES, depth=DEPTH, steps=100, price=PRICE
    ).escrow
    assert escrow - task.escrow <= paid + audits * PRICE


def test_once_they_stop_coming_the_work_goes_on_as_before(fresh: list[PrivateKey]) -> None:
    swarm, _ = siege(fresh[:5])
    settled, height = task_of(swarm).settled, swarm.state.height
    swarm.work(40)
    quiet = besieged(KEYS[3])
    quiet.work(40)
    assert task_of(swarm).settled - settled >= 0.8 * task_of(quiet).settled
    assert swarm.state.height == height + 40


def test_where_transactions_cost_a_fee_an_identity_without_money_gets_no_seat(fresh: list[PrivateKey]) -> None:
    ledger = Ledger(genesis_of(VALIDATORS, 2, min_fee_per_byte=1))
    transaction = ledger.sign(fresh[0], TakeSeat(bytes(32), bytes(32)), fee=500)
    assert check_envelope(ledger.state, transaction, ledger.state.height + 1) == Reason.NO_FUNDS
    assert 100 < len(transaction.encoded) < 500
