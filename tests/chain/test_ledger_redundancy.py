"""Tasks whose cells are computed by several workers each: claims, escrow, seats, and who is audited in full."""

import pytest
from msgspec import structs

from chain.ledger.book import Book
from chain.ledger.claims import audit_rate
from chain.reasons import Reason
from chain.records import AuditStatus
from chain.state import Draft, Table
from chain.transactions import LeaveSeat, SubmitClaims, TakeSeat, WatchWorker
from tests.chain.ledger_kit import KEYS, Ledger, Swarm, by_account, genesis_of, post_task, start_swarm

SHAPE: dict[str, int] = {"redundancy": 3, "replicas": 3, "escrow": 3 * 2 * 8 * 2 * 4 * 10}
FRAUD = 1.0


def swarm_of(**changes: object) -> Swarm:
    """Return a task of two stages with three workers each."""
    ledger = Ledger(genesis_of(validators=4, others=7))
    return start_swarm(ledger, KEYS[5:11], **{**SHAPE, **changes})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"redundancy": 2}, Reason.BAD_REDUNDANCY),
        ({"redundancy": 5}, Reason.BAD_REDUNDANCY),
        ({"escrow": 3 * 2 * 8 * 2 * 4 * 10 - 1}, Reason.ESCROW_TOO_SMALL),
        ({"stages": 64, "microbatches": 86, "escrow": 10**9}, Reason.TASK_TOO_LARGE),
    ],
)
def test_impossible_redundancy_is_refused(changes: dict[str, int], reason: Reason) -> None:
    ledger = Ledger(genesis_of(validators=4))
    assert ledger.one(KEYS[0], post_task(**{**SHAPE, **changes})) == reason


def test_every_cell_is_claimed_and_paid_three_times() -> None:
    swarm = swarm_of(audit_rate=1000, price=7, escrow=3 * 2 * 8 * 2 * 4 * 7)
    swarm.work(40, last_step=1)
    assert swarm.settled == 1
    earned = [worker.earned for worker in swarm.state.workers(swarm.task) if worker.is_seated]
    assert earned == [4 * 7] * 6


def claim_of(swarm: Swarm, account: bytes, step: int = 1, cells: tuple[int, ...] = (0, 1, 2, 3)) -> SubmitClaims:
    worker = swarm.state.worker(swarm.task, account)
    assert worker is not None
    return SubmitClaims((swarm.claim(step, worker.stage, cells),))


def test_a_cell_is_claimed_no_more_often_than_it_is_computed() -> None:
    swarm = swarm_of(stages=1, replicas=4)
    *first, fourth = swarm.seated(0)
    assert len(first) == 3
    for account in first:
        assert not swarm.ledger.one(by_account(account), claim_of(swarm, account))
    assert swarm.ledger.one(by_account(fourth), claim_of(swarm, fourth)) == Reason.CELL_CLAIMED


def test_a_worker_claims_a_step_once() -> None:
    swarm = swarm_of()
    account = swarm.seated(0)[0]
    assert not swarm.ledger.one(by_account(account), claim_of(swarm, account, cells=(0,)))
    assert swarm.ledger.one(by_account(account), claim_of(swarm, account, cells=(1,))) == Reason.CELL_CLAIMED


def settled_after(swarm: Swarm, claims: list[tuple[int, int]]) -> int:
    """Return after how many blocks step 1 settles when these (stage, place) claim it."""
    sent = []
    for stage, place in claims:
        account = swarm.seated(stage)[place]
        sent.append((by_account(account), claim_of(swarm, account)))
    swarm.claimed.add((0, 1))
    swarm.ledger.block(*sent)
    for blocks in range(60):
        if swarm.settled:
            return blocks
        swarm.work(1, last_step=1)
    raise AssertionError("never settled")


ALL = [(stage, place) for stage in (0, 1) for place in (0, 1, 2)]


def test_a_step_waits_for_the_third_copy_until_the_claims_time_is_over() -> None:
    window = Ledger(genesis_of()).state.params.claim_window
    assert settled_after(swarm_of(), ALL) < window
    assert settled_after(swarm_of(), ALL[:-1]) >= window


def test_where_a_stage_has_two_workers_left_two_copies_are_enough() -> None:
    swarm = swarm_of()
    swarm.ledger.one(by_account(swarm.seated(1)[2]), LeaveSeat(swarm.task))
    window = swarm.state.params.claim_window
    assert settled_after(swarm, ALL[:-1]) < window


def test_a_stage_with_one_worker_left_is_not_enough() -> None:
    swarm = swarm_of()
    for account in swarm.seated(1)[1:]:
        swarm.ledger.one(by_account(account), LeaveSeat(swarm.task))
    assert settled_after(swarm, ALL[:-2]) >= swarm.state.params.claim_window


def test_seats_go_to_applicants_of_one_kernel_class() -> None:
    ledger = Ledger(genesis_of(validators=4, others=7))
    other = bytes([9]) * 32
    ledger.block((KEYS[4], post_task(**SHAPE)))
    (task,) = (found.id for found in ledger.state.open_tasks())
    kernels = [bytes(32), bytes(32), other, bytes(32), other, bytes(32)]
    ledger.block(*((key, TakeSeat(task, kernel)) for key, kernel in zip(KEYS[5:11], kernels, strict=True)))
    ledger.skip(6)
    seated = [worker for worker in ledger.state.workers(task) if worker.is_seated]
    assert len(seated) == 4
    assert {worker.kernel for worker in seated} == {bytes(32)}
    plain = Ledger(genesis_of(validators=4, others=7))
    plain.block((KEYS[4], post_task(replicas=3)))
    (task,) = (found.id for found in plain.state.open_tasks())
    plain.block(*((key, TakeSeat(task, kernel)) for key, kernel in zip(KEYS[5:11], kernels, strict=True)))
    plain.skip(6)
    assert sum(worker.is_seated for worker in plain.state.workers(task)) == 6


def test_only_the_client_has_a_worker_watched() -> None:
    swarm = swarm_of(audit_rate=1000)
    account = swarm.seated(0)[0]
    wish = WatchWorker(swarm.task, account)
    assert swarm.ledger.one(by_account(account), wish) == Reason.NOT_THE_CLIENT
    assert swarm.ledger.one(swarm.client, WatchWorker(swarm.task, KEYS[0].account)) == Reason.NO_SEAT
    assert not swarm.ledger.one(swarm.client, wish)
    book = Book(Draft(swarm.state), swarm.state.height, swarm.state.seed, swarm.state.validators())
    task, worker = book.task(swarm.task), swarm.state.worker(swarm.task, account)
    assert worker is not None
    old = structs.replace(worker, settled_cells=1000, bond=10**6)
    assert audit_rate(book, task, old) == 10_000
    assert audit_rate(book, task, structs.replace(old, watched_until=book.height)) == 1000
    assert worker.flagged_until == 0  # what it is charged for withholding does not depend on the client


def test_the_outvoted_cheat_that_is_watched_is_convicted_at_its_first_claim() -> None:
    swarm = swarm_of(audit_rate=500)
    cheat = swarm.seated(1)[0]
    swarm.deviation[cheat] = FRAUD
    swarm.ledger.one(swarm.client, WatchWorker(swarm.task, cheat))
    swarm.work(40, last_step=1)
    ended = [a for a in swarm.state.tables[Table.AUDITS].values() if a.state is AuditStatus.CONVICTED]
    assert {audit.worker for audit in ended} == {cheat}
    assert len(swarm.seated(1)) == 2


def test_a_worker_that_is_watched_before_the_draw_has_all_of_its_last_claim_audited() -> None:
    swarm = swarm_of(audit_rate=500)
    account = swarm.seated(0)[0]
    swarm.ledger.one(by_account(account), claim_of(swarm, account))
    assert not swarm.ledger.one(swarm.client, WatchWorker(swarm.task, account))
    swarm.ledger.skip(swarm.state.params.draw_delay + 1)
    audited = [audit.cell for audit in swarm.state.tables[Table.AUDITS].values() if audit.worker == account]
    assert sorted(audited) == [0, 1, 2, 3]
