"""What follows from a verdict: slash, eviction, and the task rolled back to its newest settled step."""

from chain.ledger import seats
from chain.ledger.book import Book, audit_id, name, second_id, step_key
from chain.ledger.evictions import remember
from chain.ledger.settlement import end_audit
from chain.ledger.transitions import leaves_of
from chain.records import Audit, AuditStatus, ClaimRecord, Task, WorkerStatus, status_of
from chain.state import Table

_UNDISPUTED = (AuditStatus.DRAWN, AuditStatus.COMMITTED, AuditStatus.OPENED)


def convict(book: Book, audit: Audit) -> None:
    """Evict and slash the worker, and roll the task back; its bond makes good what audits of voided work cost."""
    worker = book.worker(audit.task, audit.worker)
    assert worker is not None  # audits are of workers' claims only
    if worker.state is WorkerStatus.EVICTED:
        end_audit(book, audit, AuditStatus.VOID)
        return
    end_audit(book, audit, AuditStatus.CONVICTED)
    worker = book.worker(audit.task, audit.worker)
    assert worker is not None
    slashed = worker.bond + worker.withheld
    reward = slashed * book.params.reporter_share // 10_000
    book.credit(audit.auditor, reward)
    remember(book, worker, 0, slashed, audit.id)
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
    _vacate_other_seats(book, audit)
    if was_seated:
        book.note("evicted", **place, stage=audit.stage, reason="convicted")
    book.note("slashed", **place, amount=str(slashed), reward=str(reward))
    task = book.task(audit.task)
    made_good = 0
    if task.is_open:
        made_good = min(task.audit_pay, slashed - reward)
        escrow = task.escrow + made_good
        book.set_task(task, generation=task.generation + 1, escrow=escrow, reserved=0, audit_pay=0)
        book.touched.add(task.id)
    book.burn(slashed - reward - made_good)


def _vacate_other_seats(book: Book, audit: Audit) -> None:
    for key, _ in book.draft.items(Table.JOBS, audit.worker):
        task = key[32:]
        worker = book.worker(task, audit.worker)
        if task != audit.task and worker is not None and worker.is_present:
            seats.leave(book, worker)


def void_unsettled(book: Book, task: Task, limit: int) -> int:
    """Void claims of generations that a rollback has ended, with the audits that nobody disputes yet.

    Return how many; what is beyond about `limit` waits for a later block.
    """
    count = 0
    now = step_key(task.id, task.generation, 0)
    for key, progress in book.draft.items(Table.STEPS, task.id):
        if key >= now or count >= limit:
            break
        for identity in progress.claims:
            _void(book, book.claim(identity))
        book.draft.delete(Table.STEPS, key)
        count += len(progress.claims)
    return count


def _void(book: Book, record: ClaimRecord) -> None:
    book.set_claim(record, is_void=True)
    book.retire(Table.CLAIMS, record.id)
    book.engage(record.claim.task, record.worker, -1)
    worker = book.worker(record.claim.task, record.worker)
    is_out = worker is not None and worker.state is WorkerStatus.EVICTED
    leaves = leaves_of(book.task(record.claim.task), record.claim) if record.open_audits else ()
    firsts = [audit_id(record, cell) for cell in leaves]
    for identity in (*firsts, *map(second_id, firsts)):
        audit: Audit | None = book.draft.get(Table.AUDITS, identity)
        is_of_auditor = audit is not None and (audit.first is not None or audit.is_reopened)
        if audit is None or not audit.is_active:
            continue
        if (is_out and not is_of_auditor) or audit.state in _UNDISPUTED:
            end_audit(book, audit, AuditStatus.VOID)
