"""Tasks, seats and claims: who may, when, and how it ends."""

import pytest
from msgspec import structs

from chain.keys import peer_id
from chain.ledger.claims import submit
from chain.ledger.tasks import bond_for
from chain.reasons import Reason, Refused
from chain.records import TaskStatus, WorkerStatus
from chain.state import Table
from chain.transactions import (
    Claim,
    CloseTask,
    LeaveSeat,
    RenewLease,
    SubmitClaims,
    TakeSeat,
    TopUp,
)
from tests.chain.ledger_kit import (
    BALANCE,
    KEYS,
    Ledger,
    Swarm,
    by_account,
    genesis_of,
    post_task,
    start_swarm,
)

CLIENT = KEYS[6]
UNKNOWN = bytes(32)


@pytest.mark.parametrize(
    ("rate", "expected"),
    [
        (10_000, 10 * (1 + 16)),
        (1000, 10 * (13 + 16)),
        (500, 10 * (26 + 16)),
        (1, 10 * (13333 + 16)),
        (0, 10 * (13333 + 16)),
    ],
)
def test_the_least_bond_outweighs_cheating(rate: int, expected: int) -> None:
    assert bond_for(10, rate, 2500, 16) == expected


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"escrow": 1599}, Reason.ESCROW_TOO_SMALL),
        ({"audit_rate": 499}, Reason.RATE_TOO_SMALL),
        ({"audit_rate": 1000, "worker_bond": 289}, Reason.BOND_TOO_SMALL),
        ({"price": 0, "escrow": 0, "worker_bond": 0}, Reason.PRICE_TOO_SMALL),
        ({"escrow": BALANCE + 1}, Reason.NO_FUNDS),
    ],
)
def test_parameters_that_break_the_economy_are_refused(changes: dict[str, int], reason: Reason) -> None:
    ledger = Ledger()
    assert ledger.one(CLIENT, post_task(**changes)) == reason
    assert ledger.state.open_tasks() == ()


def test_the_least_bond_itself_is_accepted() -> None:
    ledger = Ledger()
    assert ledger.one(CLIENT, post_task(audit_rate=1000, worker_bond=290)) == ""
    (task,) = ledger.state.open_tasks()
    assert (task.state, task.escrow, task.client) == (TaskStatus.POSTED, 1600, CLIENT.account)
    assert ledger.state.account(CLIENT.account).balance == BALANCE - 1600


def test_private_networks_may_have_free_tasks() -> None:
    swarm = start_swarm(Ledger(genesis_of(free_tasks=True)), price=0, escrow=0, worker_bond=0)
    swarm.work(40)
    assert swarm.settled == 8


def test_anybody_may_top_up_and_only_the_client_close() -> None:
    ledger = Ledger()
    ledger.one(CLIENT, post_task())
    (task,) = ledger.state.open_tasks()
    assert ledger.one(KEYS[0], TopUp(task.id, 0)) == Reason.ZERO_AMOUNT
    assert ledger.one(KEYS[0], TopUp(task.id, 20)) == ""
    assert ledger.one(KEYS[0], CloseTask(task.id)) == Reason.NOT_THE_CLIENT
    assert ledger.one(CLIENT, CloseTask(task.id)) == ""
    assert ledger.state.account(CLIENT.account).balance == BALANCE + 20
    for payload in (CloseTask(task.id), TopUp(task.id, 1), TakeSeat(task.id, bytes(32))):
        assert ledger.one(CLIENT, payload) == Reason.TASK_CLOSED
    assert ledger.state.open_tasks() == ()
    assert len(ledger.state.tables[Table.OPEN]) == 0


def test_seats_are_drawn_after_the_formation_emptiest_stage_first() -> None:
    ledger = Ledger()
    ledger.one(CLIENT, post_task())
    posted_at = ledger.state.height
    (task,) = ledger.state.open_tasks()
    ledger.block(*((key, TakeSeat(task.id, bytes(32))) for key in KEYS[:6]))
    while ledger.state.height < posted_at + 2:
        ledger.skip(1)
    assert ledger.happened("seated") == []
    ledger.skip(1)
    assert [entry["stage"] for entry in ledger.happened("seated")] == [0, 1, 0, 1]
    workers = ledger.state.workers(task.id)
    assert sorted(worker.stage for worker in workers) == [-1, -1, 0, 0, 1, 1]
    assert {worker.state for worker in workers} == {WorkerStatus.SPARE, WorkerStatus.SEATED}
    assert ledger.state.task(task.id).state is TaskStatus.RUNNING  # type: ignore[union-attr]
    assert [ledger.state.account(w.account).balance for w in workers if w.is_seated] == [BALANCE - 1000] * 4


def test_a_task_waits_until_every_stage_has_somebody() -> None:
    ledger = Ledger()
    ledger.one(CLIENT, post_task(stages=3))
    (task,) = ledger.state.open_tasks()
    assert not ledger.state.is_busy()
    ledger.block(*((key, TakeSeat(task.id, bytes(32))) for key in KEYS[:2]))
    assert ledger.state.is_busy()
    ledger.skip(5)
    assert ledger.state.task(task.id).state is TaskStatus.POSTED  # type: ignore[union-attr]
    ledger.one(KEYS[2], TakeSeat(task.id, bytes(32)))
    ledger.skip(1)
    assert ledger.state.task(task.id).state is TaskStatus.RUNNING  # type: ignore[union-attr]


def test_a_spare_fills_a_vacated_seat_in_the_next_block() -> None:
    swarm = start_swarm(workers=KEYS[:5])
    leaver = swarm.seated(1)[0]
    spare = next(w.account for w in swarm.state.workers(swarm.task) if w.state is WorkerStatus.SPARE)
    assert swarm.ledger.one(by_account(leaver), LeaveSeat(swarm.task)) == ""
    swarm.ledger.skip(1)
    assert spare in swarm.seated(1)
    assert swarm.state.account(leaver).balance == BALANCE
    assert swarm.ledger.one(by_account(leaver), LeaveSeat(swarm.task)) == Reason.NO_SEAT


def test_who_left_may_apply_again_and_bonds_again() -> None:
    swarm = start_swarm()
    leaver = by_account(swarm.seated(0)[0])
    assert swarm.ledger.one(leaver, TakeSeat(swarm.task, bytes(32))) == Reason.ALREADY_APPLIED
    swarm.ledger.one(leaver, LeaveSeat(swarm.task))
    swarm.ledger.one(leaver, TakeSeat(swarm.task, bytes(32)))
    swarm.ledger.skip(1)
    assert leaver.account in swarm.seated(0)
    assert swarm.state.account(leaver.account).balance == BALANCE - 1000


def test_the_bond_stays_while_a_claim_is_not_settled() -> None:
    swarm = start_swarm()
    leaver = swarm.seated(0)[0]
    swarm.ledger.block(*swarm.claims(1))
    swarm.ledger.one(by_account(leaver), LeaveSeat(swarm.task))
    assert swarm.state.worker(swarm.task, leaver).bond == 1000  # type: ignore[union-attr]
    while swarm.settled < 1:
        swarm.ledger.block(*swarm.answers())
    swarm.ledger.skip(1)
    assert swarm.state.worker(swarm.task, leaver).bond == 0  # type: ignore[union-attr]


def test_a_lease_ends_unless_it_is_renewed() -> None:
    swarm = start_swarm(Ledger(genesis_of(lease_blocks=6)))
    lazy, busy = (by_account(account) for account in swarm.seated(0))
    swarm.ledger.skip(3)
    assert swarm.ledger.one(busy, RenewLease(swarm.task)) == ""
    swarm.ledger.skip(3)
    assert swarm.seated(0) == [busy.account]
    left = {"task": swarm.task.hex(), "worker": peer_id(lazy.account), "stage": 0}
    assert left in swarm.ledger.happened("left")
    assert swarm.ledger.one(lazy, RenewLease(swarm.task)) == Reason.NO_SEAT


def test_a_task_closes_after_its_deadline_when_what_was_claimed_has_settled() -> None:
    swarm = start_swarm(lifetime=8)
    swarm.ledger.block(*swarm.claims(1))
    late = swarm.claim(2, 0, (0,))
    swarm.ledger.skip(8)
    assert refusal(swarm, swarm.seated(0)[0], late) == Reason.TASK_CLOSED
    for _ in range(6):
        swarm.ledger.block(*swarm.answers())
    task = swarm.state.task(swarm.task)
    assert task is not None
    assert (task.state, task.escrow, task.settled) == (TaskStatus.CLOSED, 0, 1)
    assert all(worker.settled_cells == 2 for worker in swarm.state.workers(swarm.task))
    assert all(worker.bond == 0 for worker in swarm.state.workers(swarm.task))
    assert not swarm.state.is_busy()


def test_a_client_that_closes_pays_for_what_was_claimed() -> None:
    swarm = start_swarm()
    swarm.ledger.block(*swarm.claims(1), *swarm.claims(2))
    late = swarm.claim(3, 0, (0,))
    assert swarm.ledger.one(swarm.client, CloseTask(swarm.task)) == ""
    assert refusal(swarm, swarm.seated(0)[0], late) == Reason.TASK_CLOSED
    assert swarm.ledger.one(swarm.client, CloseTask(swarm.task)) == Reason.TASK_CLOSED
    for _ in range(8):
        swarm.ledger.block(*swarm.answers())
    workers = swarm.state.workers(swarm.task)
    assert [worker.settled_cells for worker in workers] == [4] * 4
    assert swarm.state.account(swarm.client.account).balance == BALANCE - 2 * 2 * (4 + 4 + 2) * 10
    assert not swarm.state.open_tasks()


def test_work_is_claimed_only_while_the_escrow_covers_it() -> None:
    swarm = start_swarm(stages=1, replicas=1, steps=2, escrow=180)
    for step in (1, 2):
        assert refusal(swarm, swarm.seated(0)[0], swarm.claim(step, 0, (0, 1, 2, 3))) == ""
    task = swarm.state.task(swarm.task)
    assert task is not None
    assert (task.escrow, task.reserved) == (180, 80)
    from chain.hashing import ZERO
    from chain.ledger.book import Book
    from chain.state import Draft

    book = Book(Draft(swarm.state), swarm.state.height, ZERO, swarm.state.validators())
    short = structs.replace(task, escrow=89, settled=0)
    book.draft.put(Table.TASKS, task.id, structs.replace(short, steps=3))
    with pytest.raises(Refused, match=Reason.ESCROW_TOO_SMALL):
        submit(book, swarm.seated(0)[0], SubmitClaims((swarm.claim(3, 0, (0,)),)))


def test_a_dispute_goes_on_in_a_closed_task() -> None:
    swarm = start_swarm()
    cheat = swarm.seated(0)[0]
    swarm.deviation[cheat] = -2.0
    while not swarm.ledger.happened("disputed"):
        swarm.work(1, last_step=2)
    assert swarm.ledger.one(swarm.client, CloseTask(swarm.task)) == ""
    assert swarm.state.is_busy()
    assert {worker.bond for worker in swarm.state.workers(swarm.task) if worker.account == cheat} == {1000}
    while swarm.state.is_busy():
        swarm.ledger.block(*swarm.answers())
    assert [entry["amount"] for entry in swarm.ledger.happened("slashed")] == ["1000"]
    swarm.ledger.skip(1)
    assert len(swarm.state.tables[Table.OPEN]) == 0


def refusal(swarm: Swarm, key_account: bytes, claim: Claim) -> str:
    return swarm.ledger.one(by_account(key_account), SubmitClaims((claim,)))


def test_claims_that_break_a_rule_are_refused() -> None:
    swarm = start_swarm(steps=3)
    worker, other = swarm.seated(0)
    claim = swarm.claim(1, 0, (0, 1))
    cases = [
        (worker, structs.replace(claim, task=UNKNOWN), Reason.UNKNOWN_TASK),
        (worker, structs.replace(claim, stage=1), Reason.NO_SEAT),
        (CLIENT.account, claim, Reason.NO_SEAT),
        (worker, structs.replace(claim, generation=1), Reason.WRONG_GENERATION),
        (worker, structs.replace(claim, step=0), Reason.WRONG_STEP),
        (worker, structs.replace(claim, step=4), Reason.WRONG_STEP),
        (worker, structs.replace(claim, cells=(1, 0)), Reason.BAD_CELLS),
        (worker, structs.replace(claim, cells=(1, 1)), Reason.BAD_CELLS),
        (worker, structs.replace(claim, cells=(0, 4)), Reason.BAD_CELLS),
    ]
    for account, wrong, reason in cases:
        assert refusal(swarm, account, wrong) == reason
    assert refusal(swarm, worker, claim) == ""
    assert refusal(swarm, worker, swarm.claim(1, 0, (2,))) == Reason.CELL_CLAIMED
    assert refusal(swarm, other, swarm.claim(1, 0, (1, 2))) == Reason.CELL_CLAIMED
    assert refusal(swarm, other, swarm.claim(1, 0, (2, 3))) == ""


def test_claims_reach_no_further_than_the_ring() -> None:
    swarm = start_swarm(depth=2)
    worker = swarm.seated(0)[0]
    assert refusal(swarm, worker, swarm.claim(3, 0, (0,))) == Reason.WRONG_STEP
    assert refusal(swarm, worker, swarm.claim(2, 0, (0,))) == ""


def test_claims_of_one_transaction_are_taken_all_or_none() -> None:
    swarm = start_swarm()
    worker = swarm.seated(0)[0]
    good, bad = swarm.claim(1, 0, (0,)), swarm.claim(1, 0, (0,))
    assert swarm.ledger.one(by_account(worker), SubmitClaims((good, bad))) == Reason.CELL_CLAIMED
    assert len(swarm.state.tables[Table.CLAIMS]) == 0


def test_a_task_that_does_not_run_takes_no_claims() -> None:
    swarm = start_swarm()
    worker = swarm.seated(0)[0]
    claim = swarm.claim(1, 0, (0,))
    swarm.ledger.one(CLIENT, CloseTask(swarm.task))
    assert refusal(swarm, worker, claim) == Reason.TASK_CLOSED
    swarm.ledger.one(CLIENT, post_task(steps=4))
    (task,) = swarm.state.open_tasks()
    assert refusal(swarm, worker, structs.replace(claim, task=task.id)) == Reason.NOT_RUNNING


def test_a_step_with_missing_claims_settles_after_the_claim_window() -> None:
    swarm = start_swarm()
    first, second = swarm.claims(1), swarm.claims(2)
    swarm.ledger.block(*first[1:], *second)
    started = swarm.state.height
    while swarm.settled < 2:
        swarm.ledger.block(*swarm.answers())
        assert swarm.state.height < started + 40
    assert swarm.state.height == started + swarm.state.params.claim_window + 1
    unpaid = swarm.seated(0)[0]
    assert swarm.state.worker(swarm.task, unpaid).settled_cells == 2  # type: ignore[union-attr]


def test_a_step_that_nobody_claims_does_not_stop_the_next() -> None:
    swarm = start_swarm()
    swarm.ledger.block(*swarm.claims(2))
    for _ in range(swarm.state.params.claim_window + 2):
        swarm.ledger.block(*swarm.answers())
    assert swarm.settled == 2


def test_newcomers_and_the_flagged_are_audited_more_often() -> None:
    from chain.hashing import ZERO
    from chain.ledger.book import Book
    from chain.ledger.claims import audit_rate
    from chain.state import Draft

    swarm = start_swarm(audit_rate=1000, worker_bond=10_000)
    book = Book(Draft(swarm.state), swarm.state.height, ZERO, swarm.state.validators())
    task, worker = swarm.state.task(swarm.task), swarm.state.workers(swarm.task)[0]
    assert task is not None
    assert audit_rate(book, task, worker) == 5000
    known = structs.replace(worker, settled_cells=50)
    assert audit_rate(book, task, known) == 1000
    assert audit_rate(book, task, structs.replace(known, flagged_until=book.height + 1)) == 10_000
    assert audit_rate(book, structs.replace(task, audit_rate=1), known) == 500
