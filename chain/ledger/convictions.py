"""What follows from a verdict: slash, eviction, and the task rolled back to its newest settled step."""

from chain.hashing import digest
from chain.ledger import seats
from chain.ledger.book import Book, name
from chain.ledger.settlement import end_audit
from chain.records import Audit, AuditStatus, Conviction, Task, Worker, WorkerStatus, status_of
from chain.state import Table

_UNDISPUTED = (AuditStatus.DRAWN, AuditStatus.COMMITTED, AuditStatus.OPENED)


def convict(book: Book, audit: Audit) -> None:
    """Evict and slash the worker, and roll the task back; its bond makes good what audits of voided work cost."""
    end_audit(book, audit, AuditStatus.CONVICTED)
    worker = book.worker(audit.task, audit.worker)
    assert worker is not None  # audits are of workers' claims only
    slashed = worker.bond + worker.withheld
    reward = slashed * book.params.reporter_share // 10_000
    book.credit(audit.auditor, reward)
    _remember(book, audit, 0, slashed)
    was_seated = worker.is_seated
    evicted = status_of(WorkerStatus, WorkerStatus.EVICTED)
    book.set_worker(worker, bond=0, withheld=0, status=evicted)
    book.set_account(audit.worker, barred=True)
    place = {
        "task": audit.task.hex(),
        "worker": name(audit.worker),
        "step": audit.step,
        "evidence": audit.id.hex(),
    }
    _end_other_audits(book, audit)
    _vacate_other_seats(book, audit)
    if was_seated:
        book.note("evicted", **place, stage=audit.stage, reason="convicted")
    book.note("slashed", **place, amount=str(slashed), reward=str(reward))
    task = book.task(audit.task)
    made_good = 0
    if task.is_open:
        made_good = min(void_unsettled(book, task), slashed - reward)
        task = book.task(task.id)
        book.set_task(task, generation=task.generation + 1, escrow=task.escrow + made_good)
    book.burn(slashed - reward - made_good)


def _end_other_audits(book: Book, audit: Audit) -> None:
    """End the other audits of a convicted worker in the task: there is nothing left to decide."""
    for other in book.active_audits(audit.task):
        if other.worker == audit.worker:
            end_audit(book, other, AuditStatus.VOID)


def _vacate_other_seats(book: Book, audit: Audit) -> None:
    for task, _ in book.draft.items(Table.OPEN):
        worker = book.worker(task, audit.worker)
        if task != audit.task and worker is not None and worker.is_present:
            seats.leave(book, worker)


def evict_without_slash(book: Book, worker: Worker, audit: Audit) -> None:
    """End the seat of a worker that keeps withholding what it claimed; its bond returns."""
    _remember(book, audit, 2, 0)
    book.set_worker(worker, status=status_of(WorkerStatus, WorkerStatus.LEFT))
    book.note(
        "evicted",
        task=audit.task.hex(),
        worker=name(worker.account),
        step=audit.step,
        stage=worker.stage,
        evidence=audit.id.hex(),
        reason="withheld",
    )


def _remember(book: Book, audit: Audit, kind: int, slashed: int) -> None:
    identity = digest("conviction", audit.id, bytes([kind]))
    conviction = Conviction(identity, kind, audit.worker, audit.task, book.height, slashed, audit.id)
    book.draft.put(Table.CONVICTIONS, identity, conviction)


def void_unsettled(book: Book, task: Task) -> int:
    """Void all unsettled claims of a task and the audits that nobody disputes yet; return what audits had cost."""
    cost = 0
    for key, progress in book.draft.items(Table.STEPS, task.id):
        for identity in progress.claims:
            record = book.set_claim(book.claim(identity), is_void=True)
            book.reserve(task.id, -len(record.claim.cells))
            cost += record.audit_pay
            book.retire(Table.CLAIMS, identity)
        book.draft.delete(Table.STEPS, key)
    for audit in book.active_audits(task.id):
        if audit.state in _UNDISPUTED:
            end_audit(book, audit, AuditStatus.VOID)
    return cost
