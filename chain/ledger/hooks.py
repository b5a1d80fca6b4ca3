"""What every block does besides its transactions, in a fixed order."""

from msgspec.structs import replace

from chain.ledger import audits, claims, seats, settlement, tasks
from chain.ledger.book import Book, name
from chain.records import Validator
from chain.state import Table


def before_transactions(book: Book, parent_absent: tuple[bytes, ...]) -> None:
    """Count who of the parent's validators did not sign it; jail those that have vanished."""
    _count_liveness(book, frozenset(parent_absent))


def after_transactions(book: Book) -> None:
    """Draw audits, end what is overdue, settle steps, fill seats, forget what ended long ago."""
    claims.draw_due(book)
    audits.expire(book)
    for identity, _ in book.draft.items(Table.OPEN):
        if book.task(identity).is_open:
            _keep_up(book, identity)
        settlement.release_bonds(book, book.task(identity))
        if not book.task(identity).is_open and not book.active_audits(identity):
            tasks.forget(book, book.task(identity))
    _forget(book)


def _forget(book: Book) -> None:
    """Drop what was to leave the state at this height; a claim stays while a dispute rests on it."""
    for waiting, _ in book.draft.items(Table.ENDED, book.height.to_bytes(32, "big")):
        book.draft.delete(Table.ENDED, waiting)
        table, key = Table(waiting[32]), waiting[33:]
        if table is Table.CLAIMS and book.claim(key).open_audits:
            book.retire(table, key)
        else:
            book.draft.delete(table, key)


def _keep_up(book: Book, identity: bytes) -> None:
    """Settle an open task's steps, end its leases and fill its seats, or close it after its deadline."""
    settlement.settle_due(book, book.task(identity))
    task = book.task(identity)
    seats.expire_leases(book, task)
    if task.deadline >= book.height:
        seats.fill(book, task)
    elif not book.draft.items(Table.STEPS, identity):
        tasks.close(book, task)


def _count_liveness(book: Book, absent: frozenset[bytes]) -> None:
    horizon = book.height - book.params.jail_window
    for account in book.validators.powers:
        validator: Validator = book.draft.get(Table.VALIDATORS, account)
        missed = tuple(height for height in validator.missed if height > horizon)
        if account in absent:
            missed = (*missed, book.height)
        if len(missed) >= book.params.jail_missed and book.has_other_validator(account):
            book.draft.put(
                Table.VALIDATORS,
                account,
                replace(validator, missed=(), is_jailed=True, jailed_until=book.height + book.params.jail_blocks),
            )
            book.note("jailed", validator=name(account))
        elif missed != validator.missed:
            book.draft.put(Table.VALIDATORS, account, replace(validator, missed=missed))
