"""What every block does besides its transactions, in a fixed order."""

from msgspec.structs import replace

from chain.ledger import audits, claims, settlement, tasks
from chain.ledger.book import Book, name
from chain.records import TaskStatus, Validator
from chain.state import Table


def before_transactions(book: Book, parent_signers: tuple[bytes, ...] | None) -> None:
    """Count who signed the parent; jail validators that have vanished."""
    if parent_signers is not None:
        _count_liveness(book, frozenset(parent_signers))


def after_transactions(book: Book) -> None:
    """Draw audits, end what is overdue, settle steps, fill seats."""
    claims.draw_due(book)
    audits.expire(book)
    for identity, task in book.draft.items(Table.TASKS):
        if task.state is TaskStatus.CLOSED:
            settlement.release_bonds(book, task)
            _forget_steps(book, identity)
            continue
        settlement.settle_due(book, task)
        task = book.task(identity)
        if task.deadline < book.height:
            tasks.close(book, task)
            continue
        tasks.expire_leases(book, task)
        tasks.fill_seats(book, book.task(identity))
        settlement.release_bonds(book, book.task(identity))


def _forget_steps(book: Book, task: bytes) -> None:
    """Drop the progress of a closed task once no audit of it is active."""
    is_active = any(
        book.draft.get(Table.AUDITS, identity).task == task for identity, _ in book.draft.items(Table.ACTIVE)
    )
    if not is_active:
        for key, _ in book.draft.items(Table.STEPS, task):
            book.draft.delete(Table.STEPS, key)


def _count_liveness(book: Book, signers: frozenset[bytes]) -> None:
    horizon = book.height - book.params.jail_window
    for account in book.validators.powers:
        validator: Validator = book.draft.get(Table.VALIDATORS, account)
        missed = tuple(height for height in validator.missed if height > horizon)
        if account not in signers:
            missed = (*missed, book.height)
        if len(missed) >= book.params.jail_missed and _may_jail(book, account):
            book.draft.put(
                Table.VALIDATORS,
                account,
                replace(validator, missed=(), is_jailed=True, jailed_until=book.height + book.params.jail_blocks),
            )
            book.note("jailed", validator=name(account))
        elif missed != validator.missed:
            book.draft.put(Table.VALIDATORS, account, replace(validator, missed=missed))


def _may_jail(book: Book, account: bytes) -> bool:
    """Whether somebody is left to validate."""
    others = (other for other in book.validators.powers if other != account)
    return any(not book.draft.get(Table.VALIDATORS, other).is_jailed for other in others)
