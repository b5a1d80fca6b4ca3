"""What every block does besides its transactions, in a fixed order."""

from chain.hashing import digest
from chain.ledger import audits, claims, governance, seats, settlement, silence, tasks, validators
from chain.ledger.book import Book, place_at
from chain.ledger.convictions import void_unsettled
from chain.state import PREFIX, Table

MAX_EXPIRED = 1536
"""Audits that a block ends or draws anew because their deadline has passed."""
ROWS_A_TASK = 4
"""What a task without workers counts for."""
MAX_ROWS = 4096
"""Rows of workers and claims that a block looks through for its tasks; tasks beyond wait for the next block."""


def before_transactions(book: Book, parent_absent: tuple[bytes, ...]) -> None:
    """Count who of the parent's validators did not sign it; jail those that have vanished."""
    validators.count_presence(book, frozenset(parent_absent))


def after_transactions(book: Book) -> None:
    """Draw audits, end what is overdue, settle steps, fill seats, forget; turn the epoch."""
    claims.draw_due(book)
    woken = _woken(book)
    handled = [row for row in woken if row[PREFIX] == Table.AUDITS][:MAX_EXPIRED]
    audits.expire(book, [row[PREFIX + 1 :] for row in handled])
    handled += _look_after(book, [row for row in woken if row[PREFIX] == Table.TASKS])
    for row in woken:
        if row[PREFIX] == Table.VALIDATORS:
            validators.lapse(book, row[PREFIX + 1 :])
            handled.append(row)
    for row in handled:
        book.draft.delete(Table.WAKE, row)
    for since in {row[:PREFIX] for row in set(woken).difference(handled)}:
        book.wake(book.height + 1, Table.WAKE, since)
    _forget(book)
    if book.height % book.params.epoch_blocks == 0:
        governance.enact(book)
        validators.begin_epoch(book)


def _woken(book: Book) -> list[bytes]:
    """Return the rows of what was to be looked at by now, in an order of chance.

    Rows beyond the bounds of a block stay where they are; a row of this table names the height where some are left.
    """
    heights, rows = [book.height.to_bytes(PREFIX, "big")], []
    for height in heights:
        for row, _ in book.draft.items(Table.WAKE, height):
            if row[PREFIX] == Table.WAKE:
                heights.append(row[PREFIX + 1 :])
                book.draft.delete(Table.WAKE, row)
            else:
                rows.append(row)
    return sorted(rows, key=lambda row: digest("turn", book.seed, row))


def _look_after(book: Book, woken: list[bytes]) -> list[bytes]:
    """Look after the tasks in which something happened in this block or is due; return the rows that are done."""
    left, done = MAX_ROWS, []
    seen: set[bytes] = set()
    for row in [*woken, *(place_at(0, Table.TASKS, task) for task in sorted(book.touched))]:
        identity = row[PREFIX + 1 :]
        if left > 0 and identity not in seen:
            left -= _keep_up(book, identity, left)
            seen.add(identity)
        if identity in seen:
            done.append(row)
        elif not int.from_bytes(row[:PREFIX], "big"):
            book.wake(book.height + 1, Table.TASKS, identity)
    return done


def _forget(book: Book) -> None:
    """Drop what was to leave the state at this height; what an open audit rests on stays."""
    for waiting, _ in book.draft.items(Table.ENDED, book.height.to_bytes(32, "big")):
        book.draft.delete(Table.ENDED, waiting)
        table, key = Table(waiting[32]), waiting[33:]
        if table is Table.CLAIMS and book.claim(key).open_audits:
            book.retire(table, key)
        elif table is not Table.AUDITS or book.draft.get(Table.ACTIVE, key) is None:
            book.draft.delete(table, key)


def _keep_up(book: Book, identity: bytes, limit: int) -> int:
    """Void, settle, end leases, fill seats and close as is due in a task; return how many rows that took."""
    if book.draft.get(Table.OPEN, identity) is None:
        return 1
    fixed = len(book.workers(identity)) + ROWS_A_TASK
    rows = void_unsettled(book, book.task(identity), limit)
    if rows < limit:
        rows += silence.question_due(book, book.task(identity), limit - rows)
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
