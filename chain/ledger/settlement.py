"""What follows from finished work: audits ended, steps settled and paid, bonds returned."""

from chain.ledger.book import Book, name
from chain.ledger.claims import step_key
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
    cost = _pay_auditor(book, audit) if state in _PAID_AUDIT else 0
    unpaid = (*record.unpaid, audit.cell) if state in _UNPAID else record.unpaid
    book.set_claim(record, open_audits=max(0, record.open_audits - 1), unpaid=unpaid, audit_pay=record.audit_pay + cost)
    if state is AuditStatus.FAULTED:
        _flag(book, audit)
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


def _flag(book: Book, audit: Audit) -> None:
    """Audit every cell of a worker whose result was off by more than honest noise, for a while."""
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


def settle_due(book: Book, task: Task) -> None:
    """Settle the task's steps in order, as far as they are resolved."""
    while True:
        task = book.task(task.id)
        key = step_key(task.id, task.generation, task.settled + 1)
        progress: StepProgress | None = book.draft.get(Table.STEPS, key)
        if progress is None and _is_skipped(book, task):
            progress = StepProgress(book.height, ())
        elif progress is None or not _is_resolved(book, task, progress):
            return
        _settle(book, task, progress, key)


def _is_skipped(book: Book, task: Task) -> bool:
    """Whether nobody claimed the next step although a later one was first claimed a claim window ago."""
    later = (progress for _, progress in book.draft.items(Table.STEPS, task.id))
    return any(book.height > progress.first_height + book.params.claim_window for progress in later)


def _is_resolved(book: Book, task: Task, progress: StepProgress) -> bool:
    full = (1 << task.microbatches) - 1
    is_covered = all(int.from_bytes(bitmap, "little") == full for bitmap in progress.covered)
    is_late = book.height > progress.first_height + book.params.claim_window
    claims = [book.claim(identity) for identity in progress.claims]
    return (is_covered or is_late) and all(c.drawn and c.open_audits == 0 for c in claims)


def _settle(book: Book, task: Task, progress: StepProgress, key: bytes) -> None:
    for identity in progress.claims:
        record: ClaimRecord = book.claim(identity)
        book.set_claim(record, is_settled=True)
        book.retire(Table.CLAIMS, identity)
        book.reserve(task.id, -len(record.claim.cells))
        paid = len(set(record.claim.cells) - set(record.unpaid))
        worker = book.worker(task.id, record.worker)
        if worker is None or worker.state is WorkerStatus.EVICTED:
            continue
        book.set_worker(worker, settled_cells=worker.settled_cells + paid)
        _pay(book, book.task(task.id), record.worker, paid * task.price)
    settled = book.set_task(book.task(task.id), settled=task.settled + 1)
    book.draft.delete(Table.STEPS, key)
    book.note("settled", task=task.id.hex(), step=settled.settled, generation=settled.generation)


def release_bonds(book: Book, task: Task) -> None:
    """Return the bonds of workers that left, once nothing of theirs can be disputed any more."""
    gone = [w for w in book.workers(task.id) if w.state is WorkerStatus.LEFT and w.bond + w.withheld]
    if not gone:
        return
    accused = {audit.worker for audit in book.active_audits(task.id)}
    claimed = {
        book.claim(identity).worker
        for _, progress in book.draft.items(Table.STEPS, task.id)
        for identity in progress.claims
    }
    for worker in gone:
        if worker.account not in accused | claimed:
            book.set_worker(worker, bond=0, withheld=0)
            book.credit(worker.account, worker.bond + worker.withheld)
