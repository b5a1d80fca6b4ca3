"""The most expensive blocks: their work grows no faster than what a block carries, and not at all with the state.

Work is the number of calls of functions, which is the same on every machine.
"""

import cProfile

import pytest

from bench.support.shape import Shape
from bench.support.shapes import SHAPES
from chain.ledger import execute
from chain.ledger.book import Book
from chain.ledger.hooks import MAX_EXPIRED, MAX_ROWS, ROWS_A_TASK
from chain.reasons import Reason
from chain.records import Audit, Worker
from chain.state import State, Table

BY_BLOCK = {
    "transfers": 64,
    "evidence": 16,
    "posts": 64,
    "votes": 32,
    "claims": 256,
    "unbondings": 400,
}
"""Shapes whose work may grow with the transactions of the block, and from how many on."""
BOUNDED = {
    "idle tasks": 2 * MAX_ROWS // ROWS_A_TASK,
    "crowds": 2 * MAX_ROWS,
    "silent": 2 * MAX_ROWS,
    "draws": 4096,
    "overdue audits": 2 * MAX_EXPIRED,
    "waiting audits": 128,
    "registered": 256,
    "duties": 1024,
}
"""Shapes whose work may not grow with the state, and the number from which on it does not."""

MOST_CALLS = 4_500_000
"""What the worst block of all may cost: 3,845,000 when it was measured (0.7 s of execution without a profiler)."""


def made(name: str, number: int) -> tuple[Shape, State]:
    shape = SHAPES[name][0](number)
    return shape, shape.state()


def work(name: str, number: int) -> int:
    """Return the calls that the block of a shape takes on a state that was executed on before."""
    shape, state = made(name, number)
    transactions, context = shape.transactions(state), shape.context(state)
    execute(state, context, transactions)
    profile = cProfile.Profile()
    profile.enable()
    execute(State(state.tables, state.tree), context, transactions)
    profile.disable()
    return sum(entry.callcount for entry in profile.getstats())


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_BLOCK)
def test_work_grows_with_the_block_at_most(name: str) -> None:
    number = BY_BLOCK[name]
    assert work(name, 2 * number) < 2.3 * work(name, number)


@pytest.mark.slow
@pytest.mark.parametrize("name", BOUNDED)
def test_work_does_not_grow_with_what_waits(name: str) -> None:
    number = BOUNDED[name]
    # reading a longer list of what waits is cheap, and the tree is one level deeper
    assert work(name, 2 * number) < 1.4 * work(name, number)


@pytest.mark.slow
def test_everything_at_once_stays_within_its_budget() -> None:
    assert work("everything", SHAPES["everything"][1]) < MOST_CALLS


@pytest.mark.slow
def test_growth_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Book.workers

    def everybody(book: Book, task: bytes) -> list[Worker]:
        for _, worker in book.draft.items(Table.WORKERS):
            assert worker.task
        return real(book, task)

    monkeypatch.setattr(Book, "workers", everybody)
    number = 64
    assert work("posts", 2 * number) < 2.3 * work("posts", number)
    assert work("single draws", 2 * number) > 2.3 * work("single draws", number)


@pytest.mark.slow
def test_what_waits_is_handled_in_later_blocks_and_none_is_lost() -> None:
    shape, state = made("overdue audits", 3 * MAX_EXPIRED)
    shape.account(shape.keys[0])
    left, first = [], state
    for _ in range(3):
        executed = execute(state, shape.context(state), ())
        state = executed.state
        left.append(sum(_is_overdue(state, audit) for audit in state.tables[Table.AUDITS].values()))
    assert left == [2 * MAX_EXPIRED, MAX_EXPIRED, 0]
    assert first.height + 3 == state.height


def _is_overdue(state: State, audit: Audit) -> bool:
    return audit.is_active and audit.deadline < state.height


def test_silent_workers_lose_their_seats_in_as_many_blocks_as_that_takes() -> None:
    shape, state = made("silent", 3 * MAX_ROWS // 2)
    counts = []
    for _ in range(4):
        executed = execute(state, shape.context(state), ())
        state = executed.state
        counts.append(sum(event.kind == "evicted" for event in executed.events))
    assert sum(counts) == 3 * MAX_ROWS // 128 * 63
    assert max(counts) <= MAX_ROWS


def test_a_task_has_bounds() -> None:
    shape, state = made("crowds", 4096)
    receipts = execute(state, shape.context(state), shape.transactions(state)).receipts
    assert [receipt.reason for receipt in receipts] == [Reason.TASK_FULL]


def test_registrations_without_stake_lapse_with_the_epoch() -> None:
    shape, state = made("registered", 300)
    after = execute(state, shape.context(state), ()).state
    assert len(state.tables[Table.VALIDATORS]) == 200 + 300
    assert set(after.tables[Table.VALIDATORS]) == {key.account for key in shape.keys}
