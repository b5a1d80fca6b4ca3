"""Ways to gain without working, or to make others lose: each is closed, or costs what it gains."""

from msgspec import structs

from chain.hashing import ZERO
from chain.ledger.book import Book
from chain.ledger.claims import audit_rate
from chain.ledger.tasks import forgotten_after, least_bond, occasions_left
from chain.reasons import Reason
from chain.records import AuditStatus, Worker, WorkerStatus
from chain.state import Draft, State, Table
from chain.transactions import LeaveSeat, RenewLease, TakeSeat, Unbond
from tests.chain.ledger_kit import BALANCE, KEYS, STAKE, Ledger, Swarm, by_account, genesis_of, post_task, start_swarm

FRAUD, SMALL = -2.0, 1e-4


def book_of(state: State) -> Book:
    return Book(Draft(state), state.height, ZERO, state.validators())


def test_a_false_accuser_that_unbonds_in_time_is_charged_all_the_same() -> None:
    swarm = start_swarm()
    liar = KEYS[4]
    swarm.lies[liar.account] = FRAUD
    while not swarm.ledger.happened("disputed"):
        swarm.work(1)
    assert swarm.ledger.one(liar, Unbond(STAKE)) == ""
    while not swarm.ledger.happened("acquitted"):
        swarm.work(1)
    charged = [int(str(entry["amount"])) for entry in swarm.ledger.happened("charged")]
    assert set(charged) == {1000}
    left = sum(row.amount for row in swarm.state.tables[Table.UNBONDINGS].values())
    assert left + swarm.state.account(liar.account).bonded == STAKE - sum(charged)


def test_who_leaves_with_its_bond_and_returns_without_one_is_audited_as_a_newcomer() -> None:
    swarm = start_swarm(audit_rate=1000, worker_bond=10_000)
    book, task = book_of(swarm.state), swarm.state.task(swarm.task)
    assert task is not None
    known = structs.replace(swarm.state.workers(swarm.task)[0], settled_cells=1000)
    assert audit_rate(book, task, known) == 1000
    assert audit_rate(book, task, structs.replace(known, bond=0)) == 5000
    assert audit_rate(book, task, structs.replace(known, bond=0, withheld=10_000)) == 1000


def test_a_third_peer_alone_makes_no_fault_of_a_fraud() -> None:
    swarm = start_swarm()
    cheat = swarm.seated(0)[0]
    swarm.deviation[cheat] = FRAUD
    while not (opinions := [a for a in swarm.audits() if a.state is AuditStatus.OPINION]):
        swarm.work(1, last_step=1)
    thirds = {audit.third.account for audit in opinions if audit.third}
    off = (1 + FRAUD) / (1 + SMALL) - 1
    swarm.lies.update(dict.fromkeys(thirds, off))
    while any(a.state is AuditStatus.OPINION for a in swarm.audits()):
        swarm.work(1, last_step=1)
    assert "faulted" not in swarm.ledger.kinds()
    swarm.lies.clear()
    swarm.work(30, last_step=1)
    assert cheat in {a.worker for a in swarm.state.tables[Table.AUDITS].values() if a.state is AuditStatus.CONVICTED}


def silent_swarm(rate: int) -> tuple[Swarm, bytes]:
    swarm = start_swarm(Ledger(genesis_of(withheld_limit=100)), audit_rate=rate, worker_bond=10_000, depth=1, steps=8)
    worker = swarm.seated(0)[0]
    swarm.silent.add((worker, "open"))
    return swarm, worker


def bond_of(swarm: Swarm, account: bytes) -> int:
    worker = swarm.state.worker(swarm.task, account)
    assert worker is not None
    return worker.bond + worker.withheld


def test_an_auditor_is_paid_by_who_does_not_open() -> None:
    swarm, worker = silent_swarm(10_000)
    while not swarm.ledger.happened("withheld"):
        swarm.work(1, last_step=1)
    assert len(swarm.ledger.happened("withheld")) == 2 + 1  # its cells and its step
    assert bond_of(swarm, worker) == 10_000 - 3 * 10
    assert swarm.state.chain.burned == 0
    record = swarm.state.worker(swarm.task, worker)
    assert record is not None
    assert record.flagged_until > swarm.state.height


def test_withholding_again_and_again_costs_what_cheating_gains() -> None:
    swarm, worker = silent_swarm(1000)
    while not swarm.ledger.happened("withheld"):
        swarm.work(1, last_step=1)
    assert swarm.state.chain.burned == 0
    swarm.ledger.skip(swarm.state.params.absence_blocks)
    before, first = bond_of(swarm, worker), len(swarm.ledger.happened("withheld"))
    while len(swarm.ledger.happened("withheld")) == first:
        swarm.work(1)
    assert swarm.state.chain.burned == least_bond(swarm.state.params, 10, 1000, 0) - 10 == 250
    assert bond_of(swarm, worker) < before


def test_a_lease_is_renewed_in_its_second_half_only() -> None:
    swarm = start_swarm(Ledger(genesis_of(lease_blocks=20)))
    worker = by_account(swarm.seated(0)[0])
    assert swarm.ledger.one(worker, RenewLease(swarm.task)) == Reason.NOT_OWED
    swarm.ledger.skip(10)
    assert swarm.ledger.one(worker, RenewLease(swarm.task)) == ""
    assert swarm.ledger.one(worker, RenewLease(swarm.task)) == Reason.NOT_OWED


def test_an_applicant_that_leaves_without_a_seat_leaves_nothing() -> None:
    swarm = start_swarm(workers=KEYS[:5])
    spare = next(w for w in swarm.state.workers(swarm.task) if w.state is WorkerStatus.SPARE)
    key = by_account(spare.account)
    assert swarm.state.is_participant(key.account)
    assert swarm.ledger.one(key, LeaveSeat(swarm.task)) == ""
    assert swarm.state.worker(swarm.task, key.account) is None
    task = swarm.state.task(swarm.task)
    assert task is not None
    assert task.applicants == 4
    assert swarm.ledger.one(key, TakeSeat(swarm.task, bytes(32))) == ""


def test_a_task_beyond_what_a_block_can_look_after_is_refused() -> None:
    ledger = Ledger()
    client = KEYS[6]
    wide = post_task(stages=256, replicas=8, escrow=BALANCE)
    assert ledger.one(client, wide) == Reason.TASK_TOO_LARGE
    assert ledger.one(client, post_task(stages=64, microbatches=512, escrow=BALANCE)) == Reason.TASK_TOO_LARGE


def test_rollbacks_cost_the_cheat_and_not_the_client() -> None:
    swarm = start_swarm()
    swarm.deviation[swarm.seated(0)[0]] = FRAUD
    swarm.work(60)
    task = swarm.state.task(swarm.task)
    assert task is not None
    assert (task.settled, task.generation) == (8, 1)
    paid = sum(worker.settled_cells for worker in swarm.state.workers(swarm.task))
    assert paid == 2 * 8 * 4
    assert task.reserved == task.audit_pay == 0
    audited = sum(record.is_settled for record in swarm.state.tables[Table.CLAIMS].values())
    assert task.escrow == 10 * (8 * 2 * 2 - audited)  # a stage that has lost a worker has fewer steps to audit


def fragile_swarm() -> tuple[Swarm, bytes, int]:
    """Return a swarm with a worker, and after how many of its settled cells an occasion is forgotten."""
    quiet = genesis_of(newcomer_cells=0, absence_blocks=5, lease_blocks=100_000)
    terms: dict[str, object] = {"audit_rate": 5000, "worker_bond": 10_000, "microbatches": 16, "steps": 400}
    swarm = start_swarm(Ledger(quiet), **terms, lifetime=100_000)
    return swarm, swarm.seated(0)[0], forgotten_after(swarm.state.params, 5000)


def crash(swarm: Swarm, worker: bytes) -> None:
    """Have a worker give nothing until an audit of it has ended for that, and be back once it is no more flagged."""
    before = len(swarm.ledger.happened("withheld"))
    swarm.silent.add((worker, "open"))
    while len(swarm.ledger.happened("withheld")) == before:
        swarm.work(1)
    swarm.silent.discard((worker, "open"))
    swarm.work(swarm.state.params.absence_blocks + 1)


def record_of(swarm: Swarm, worker: bytes) -> Worker:
    found = swarm.state.worker(swarm.task, worker)
    assert found is not None
    return found


def test_a_worker_that_crashes_now_and_then_keeps_its_seat_and_is_charged_each_time_but_the_first() -> None:
    swarm, worker, span = fragile_swarm()
    limit = swarm.state.params.withheld_limit
    for _ in range(limit + 1):
        burned = swarm.state.chain.burned
        is_first = record_of(swarm, worker).withholdings == 0
        crash(swarm, worker)
        assert (swarm.state.chain.burned == burned) == is_first
        until = record_of(swarm, worker).settled_cells + span
        while record_of(swarm, worker).settled_cells < until:
            swarm.work(1)
        assert record_of(swarm, worker).is_seated
        assert record_of(swarm, worker).withholdings == 1
    assert not swarm.ledger.happened("evicted")


def test_a_worker_that_crashes_again_before_that_is_forgotten_loses_its_seat() -> None:
    swarm, worker, _ = fragile_swarm()
    for count in range(swarm.state.params.withheld_limit):
        assert record_of(swarm, worker).withholdings == count
        crash(swarm, worker)
    assert not record_of(swarm, worker).is_seated


def test_what_is_forgotten_and_when() -> None:
    swarm, worker, span = fragile_swarm()
    task = swarm.state.task(swarm.task)
    assert task is not None
    known = structs.replace(record_of(swarm, worker), withholdings=3, settled_cells=span - 1)
    left = [occasions_left(swarm.state.params, task, known, cells) for cells in (0, 1, span, span + 1, 9 * span)]
    assert left == [3, 2, 2, 1, 1]
    clean = structs.replace(known, withholdings=0)
    assert occasions_left(swarm.state.params, task, clean, 5 * span) == 0
