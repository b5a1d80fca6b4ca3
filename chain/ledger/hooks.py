"""What every block does besides its transactions, in a fixed order."""

from chain.hashing import digest
from chain.ledger import audits, claims, governance, seats, settlement, tasks, validators
from chain.ledger.book import Book
from chain.ledger.convictions import void_unsettled
from chain.state import PREFIX, Table

ROWS_A_TASK = 4
"""What a task without workers counts for."""
MAX_ROWS = 8192
"""Rows of workers and claims that a block looks through for its tasks; tasks beyond wait for the next block."""


def before_transactions(book: Book, parent_absent: tuple[bytes, ...]) -> None:
    """Count who of the parent's validators did not sign it; jail those that have vanished."""
    validators.count_presence(book, frozenset(parent_absent))


def after_transactions(book: Book) -> None:
    """Draw audits, end what is overdue, settle steps, fill seats, forget; turn the epoch."""
    claims.draw_due(book)
    woken = _woken(book)
    audits.expire(book, [key for table, key in woken if table is Table.AUDITS])
    _look_after(book, {key for table, key in woken if table is Table.TASKS} | book.touched)
    _forget(book)
    if book.height % book.params.epoch_blocks == 0:
        governance.enact(book)
        validators.begin_epoch(book)


def _woken(book: Book) -> list[tuple[Table, bytes]]:
    """Return what was to be looked at in this block."""
    rows = book.draft.items(Table.WAKE, book.height.to_bytes(PREFIX, "big"))
    for key, _ in rows:
        book.draft.delete(Table.WAKE, key)
    return [(Table(key[PREFIX]), key[PREFIX + 1 :]) for key, _ in rows]


def _look_after(book: Book, due: set[bytes]) -> None:
    """Look after the tasks in which something may be due, in an order of chance; those beyond the bound wait."""
    left = MAX_ROWS
    for identity in sorted(due, key=lambda task: digest("turn", book.seed, task)):
        if left > 0:
            left -= _keep_up(book, identity, left)
        else:
            book.wake(book.height + 1, Table.TASKS, identity)


def _forget(book: Book) -> None:
    """Drop what was to leave the state at this height; a claim stays while a dispute rests on it."""
    for waiting, _ in book.draft.items(Table.ENDED, book.height.to_bytes(32, "big")):
        book.draft.delete(Table.ENDED, waiting)
        table, key = Table(waiting[32]), waiting[33:]
        if table is Table.CLAIMS and book.claim(key).open_audits:
            book.retire(table, key)
        else:
            book.draft.delete(table, key)


def _keep_up(book: Book, identity: bytes, limit: int) -> int:
    """Void, settle, end leases, fill seats and close as is due in a task; return how many rows that took."""
    if book.draft.get(Table.OPEN, identity) is None:
        return 1
    fixed = len(book.workers(identity)) + ROWS_A_TASK
    rows = void_unsettled(book, book.task(identity), limit)
    if rows < limit:
        rows += settlement.settle_due(book, book.task(identity), limit - rows)
    if rows >= limit:
        book.wake(book.height + 1, Table.TASKS, identity)
    task = book.task(identity)
    if task.is_open:
        seats.expire_leases(book, task)
        if task.deadline >= book.height:
            seats.fill(book, task)
        elif not book.draft.items(Table.STEPS, identity):
            tasks.close(book, task)
    settlement.release_bonds(book, book.task(identity))
    workers = book.workers(identity)
    if not book.task(identity).is_open and not any(worker.engaged for worker in workers):
        tasks.forget(book, book.task(identity))
    return rows + fixed
