"""Second audits of cells whose first audit has passed: what finds auditors that let a partner's false cells pass.

When an audit passes, the seed of that block draws with a small chance another auditor for the same cell, whose audit
is like any other. If the cell is then found false, the first audit is opened again and the voters say, by the sketches
under its own key, whether its auditor had computed that cell; a worker that opens the second audit falsely to blame
the first auditor convicts itself only.
"""

from chain.hashing import digest
from chain.ledger.book import Book, name, second_id
from chain.ledger.claims import start_audit
from chain.ledger.pools import Pools
from chain.ledger.settlement import end_audit
from chain.randomness import chance
from chain.records import Audit, AuditStatus, ClaimRecord
from chain.state import Marker, Table


def draw_second(book: Book, audit: Audit, *, is_certain: bool) -> None:
    """Draw whether a cell whose audit has just passed is audited once more, and by whom.

    It is certain where the audit passed by its auditor's tolerance only, in a network with second audits.
    """
    record: ClaimRecord = book.claim(audit.claim)
    is_current = audit.generation == book.task(audit.task).generation and not record.is_void
    if audit.first is not None or not is_current or audit.is_reopened:
        return
    rate = book.params.reaudit_rate
    if (is_certain and rate) or chance(book.seed, digest("re-audit", audit.id), rate):
        count = start_audit(Pools(book), record, audit.cell, second_id(audit.id), audit)
        _count(book, audit, count)


def reopen(book: Book, audit: Audit) -> Audit | None:
    """Return the first audit of a cell that the second found false, active again; None if there is none any more."""
    first: Audit | None = book.draft.get(Table.AUDITS, audit.first) if audit.first else None
    if first is None or first.state is not AuditStatus.PASSED:
        return None
    _count(book, first, 1)
    book.note("reopened", audit=first.id.hex(), second=audit.id.hex(), auditor=name(first.auditor))
    changed = book.set_audit(first, is_reopened=True, dispute_seed=book.seed)
    book.draft.put(Table.ACTIVE, first.id, Marker())
    return changed


def _count(book: Book, audit: Audit, count: int) -> None:
    """Count audits of a claim that are open again."""
    record: ClaimRecord = book.claim(audit.claim)
    book.set_claim(record, open_audits=record.open_audits + count)
    book.engage(audit.task, audit.worker, count)


def judge_auditor(book: Book, audit: Audit, is_false: bool) -> None:
    """End a reopened audit: an auditor that let a cell pass which it had not computed pays one worker bond."""
    if is_false:
        charge = book.seize(audit.auditor, max(book.task(audit.task).worker_bond, 1))
        book.burn(charge)
        book.set_account(audit.auditor, absent_until=book.height + book.params.absence_blocks)
        book.note("charged", audit=audit.id.hex(), auditor=name(audit.auditor), amount=str(charge))
    end_audit(book, audit, AuditStatus.REFUTED if is_false else AuditStatus.PASSED)
