"""What follows from finished work: audits ended, steps settled and paid, bonds returned."""

from chain.ledger.book import Book, name, step_key
from chain.ledger.silence import count_silent, speaks, uncovered
from chain.ledger.tasks import occasions_left
from chain.records import (
    Audit,
    AuditStatus,
    ClaimRecord,
    StepProgress,
    Task,
    WorkerStatus,
)
from chain.state import Table

_UNPAID = (AuditStatus.FAULTED, AuditStatus.UNDECIDED, AuditStatus.WITHHELD, AuditStatus.CONVICTED)
_PAID_AUDIT = (AuditStatus.PASSED, AuditStatus.CONVICTED, AuditStatus.FAULTED, AuditStatus.WITHHELD)


def end_audit(book: Book, audit: Audit, state: AuditStatus) -> None:
    """End an audit, pay its auditor where the audit was done, and note what the cell is worth."""
    ended = book.set_audit(audit, state)
    record: ClaimRecord = book.claim(audit.claim)
    cost = _pay_auditor(book, audit) if state in _PAID_AUDIT and not audit.is_reopened else 0
    unpaid = (*record.unpaid, audit.cell) if state in _UNPAID else record.unpaid
    book.set_claim(record, open_audits=max(0, record.open_audits - 1), unpaid=unpaid, audit_pay=record.audit_pay + cost)
    task = book.task(audit.task)
    if cost and audit.generation == task.generation and not record.is_void:
        book.set_task(task, audit_pay=task.audit_pay + cost)
    book.engage(audit.task, audit.worker, -1)
    book.note(
        str(ended.state),
        audit=audit.id.hex(),
        task=audit.task.hex(),
        step=audit.step,
        stage=audit.stage,
        cell=audit.cell,
        worker=name(audit.worker),
        auditor=name(audit.auditor),
    )


def flag(book: Book, audit: Audit) -> None:
    """Audit every cell of a worker for a while: its result was off by more than honest noise, or not given."""
    worker = book.worker(audit.task, audit.worker)
    if worker is not None:
        book.set_worker(worker, flagged_until=book.height + book.params.absence_blocks)


def _pay_auditor(book: Book, audit: Audit) -> int:
    """Pay for an audit from what claimed cells leave of the escrow; return how much."""
    task = book.task(audit.task)
    amount = min(task.price, task.escrow - task.reserved)
    _pay(book, task, audit.auditor, amount)
    return amount


def _pay(book: Book, task: Task, account: bytes, amount: int) -> None:
    """Pay from the escrow; a seated worker's pay fills its bond first."""
    if amount == 0:
        return
    book.set_task(task, escrow=task.escrow - amount)
    worker = book.worker(task.id, account)
    withheld = 0
    if worker is not None and worker.is_seated:
        withheld = min(amount, max(0, task.worker_bond - worker.bond - worker.withheld))
        book.set_worker(worker, withheld=worker.withheld + withheld, earned=worker.earned + amount)
    book.credit(account, amount - withheld)


def settle_due(book: Book, task: Task, limit: int) -> int:
    """Settle the task's steps in order, as far as they are resolved; return how many claims were looked at.

    What is beyond about `limit` waits for a later block.
    """
    count = 0
    while count < limit:
        task = book.task(task.id)
        key = step_key(task.id, task.generation, task.settled + 1)
        progress: StepProgress | None = book.draft.get(Table.STEPS, key)
        if progress is None:
            later = [found for _, found in book.draft.items(Table.STEPS, task.id)]
            count += len(later) + 1
            if not later or not _is_late(book, task.id, min(found.first_height for found in later)):
                return count
            progress = StepProgress(book.height, ())  # nobody claims this step, although a later one is late
        else:
            count += len(progress.claims) + 1
            if not _is_resolved(book, task, progress):
                return count
        count += count_silent(book, task, progress)
        _settle(book, task, progress, key)
    return count


def _is_late(book: Book, task: bytes, first_height: int) -> bool:
    """Whether the claim window that began at a height is over; if not, the task is looked at when it is."""
    end = first_height + book.params.claim_window + 1
    if end > book.height:
        book.wake(end, Table.TASKS, task)
    return end <= book.height


def _is_resolved(book: Book, task: Task, progress: StepProgress) -> bool:
    is_covered = not uncovered(book, task, progress.covered)
    claims = [book.claim(identity) for identity in progress.claims]
    return (is_covered or _is_late(book, task.id, progress.first_height)) and all(
        c.drawn and c.open_audits == 0 for c in claims
    )


def _settle(book: Book, task: Task, progress: StepProgress, key: bytes) -> None:
    for identity in progress.claims:
        record: ClaimRecord = book.claim(identity)
        book.set_claim(record, is_settled=True)
        book.retire(Table.CLAIMS, identity)
        book.reserve(task.id, -len(record.claim.cells))
        book.engage(task.id, record.worker, -1)
        task = book.task(task.id)
        book.set_task(task, audit_pay=task.audit_pay - record.audit_pay)
        paid = len(set(record.claim.cells) - set(record.unpaid))
        worker = book.worker(task.id, record.worker)
        if worker is None or worker.state is WorkerStatus.EVICTED:
            continue
        worker = speaks(book, worker, record.height)
        left = occasions_left(book.params, task, worker, paid)
        book.set_worker(worker, settled_cells=worker.settled_cells + paid, withholdings=left)
        _pay(book, book.task(task.id), record.worker, paid * task.price)
    settled = book.set_task(book.task(task.id), settled=task.settled + 1, roots=progress.after)
    book.draft.delete(Table.STEPS, key)
    book.note("settled", task=task.id.hex(), step=settled.settled, generation=settled.generation)


def release_bonds(book: Book, task: Task) -> None:
    """Return the bonds of workers that left, once nothing of theirs can be disputed any more."""
    for worker in book.workers(task.id):
        if worker.state is WorkerStatus.LEFT and worker.bond + worker.withheld and not worker.engaged:
            book.set_worker(worker, bond=0, withheld=0)
            book.credit(worker.account, worker.bond + worker.withheld)
