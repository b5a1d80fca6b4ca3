"""Faults that are no fraud, counted by occasion: data not given, results off by a little; too many cost the seat."""

from chain.ledger.book import Book
from chain.ledger.evictions import WITHHELD, evict_without_slash
from chain.ledger.settlement import end_audit, flag
from chain.ledger.tasks import least_bond
from chain.records import Audit, AuditStatus


def is_new_occasion(book: Book, audit: Audit) -> bool:
    """Whether a worker's fault is none of those that it was flagged for already.

    One occasion, such as a crash or a broken machine, is all which was claimed before the worker was last flagged.
    """
    worker = book.worker(audit.task, audit.worker)
    assert worker is not None  # audits are of workers' claims only
    flagged_at = worker.flagged_until - book.params.absence_blocks
    return worker.withholdings == 0 or book.claim(audit.claim).height > flagged_at


def withhold(book: Book, audit: Audit) -> None:
    """A worker that does not give what it claimed loses the cell's pay and is charged; see `end_with_strike`.

    The first occasion costs a cell's price for each audit, which pays the auditor. Who withholds what it claimed
    since, and might do so whenever it has cheated, is charged what makes that a loss once the flag is over.
    """
    task, worker = book.task(audit.task), book.worker(audit.task, audit.worker)
    assert worker is not None  # audits are of workers' claims only
    is_again = is_new_occasion(book, audit) and worker.withholdings > 0 and worker.flagged_until <= book.height
    fine = least_bond(book.params, task.price, task.audit_rate, 0) if is_again else 0
    charge = min(max(fine, task.price), worker.bond + worker.withheld)
    bond, kept = min(worker.bond, charge), min(task.price, charge)
    book.set_worker(worker, bond=worker.bond - bond, withheld=worker.withheld - charge + bond)
    book.set_task(task, escrow=task.escrow + kept)
    book.burn(charge - kept)
    end_with_strike(book, audit, AuditStatus.WITHHELD)


def end_with_strike(book: Book, audit: Audit, state: AuditStatus) -> None:
    """End an audit, and flag the worker on a new occasion; on the last of them it loses its seat, never its bond."""
    is_new = is_new_occasion(book, audit)
    end_audit(book, audit, state)
    if not is_new:
        return
    flag(book, audit)
    worker = book.worker(audit.task, audit.worker)
    assert worker is not None
    changed = book.set_worker(worker, withholdings=worker.withholdings + 1)
    if changed.is_seated and changed.withholdings >= book.params.withheld_limit:
        evict_without_slash(book, changed, WITHHELD, audit.id, audit.step, str(state))
