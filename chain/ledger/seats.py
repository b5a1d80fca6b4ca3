"""Seats: who applies, who gets one, and how it ends without blame."""

from collections import Counter

from msgspec.structs import replace

from chain.hashing import digest
from chain.ledger.book import Book, name
from chain.reasons import Reason, Refused
from chain.records import Task, TaskStatus, Worker, WorkerStatus, status_of
from chain.state import Marker, Table
from chain.transactions import LeaveSeat, RenewLease, TakeSeat, WatchWorker

MAX_APPLICANTS = 4096
"""Accounts with a seat or an application in one task, those who have left a seat included."""


def take_seat(book: Book, sender: bytes, payload: TakeSeat) -> None:
    """Apply for a seat; the seed decides who gets one, and which."""
    task = book.open_task(payload.task)
    if book.account(sender).barred:
        raise Refused(Reason.BARRED)
    if task.kernel not in (b"", payload.kernel):
        raise Refused(Reason.OTHER_KERNEL)
    known = book.worker(task.id, sender)
    if known is not None and known.is_present:
        raise Refused(Reason.ALREADY_APPLIED)
    lease = book.height + book.params.lease_blocks
    if known is None:
        if task.applicants >= MAX_APPLICANTS:
            raise Refused(Reason.TASK_FULL)
        book.set_task(task, applicants=task.applicants + 1)
        book.draft.put(Table.JOBS, sender + task.id, Marker())
    fresh = known or Worker(task.id, sender, payload.kernel, book.height, lease)
    applied = replace(fresh, kernel=payload.kernel, applied_at=book.height, lease_until=lease, stage=-1)
    book.set_worker(applied, status=status_of(WorkerStatus, WorkerStatus.SPARE))
    book.wake(lease + 1, Table.TASKS, task.id)
    book.wake(max(book.height + 1, task.posted_at + book.params.formation_blocks), Table.TASKS, task.id)


def renew_lease(book: Book, sender: bytes, payload: RenewLease) -> None:
    """Keep a seat or an application, in the second half of its lease: renewing costs no fee."""
    worker = _present(book, payload.task, sender)
    if worker.lease_until - book.height > book.params.lease_blocks // 2:
        raise Refused(Reason.NOT_OWED)
    lease = book.height + book.params.lease_blocks
    book.set_worker(worker, lease_until=lease)
    book.wake(lease + 1, Table.TASKS, worker.task)


def leave_seat(book: Book, sender: bytes, payload: LeaveSeat) -> None:
    """Give up a seat or an application."""
    leave(book, _present(book, payload.task, sender))


def leave(book: Book, worker: Worker) -> None:
    """End a worker's seat or application without blame; its bond returns when its claims have settled."""
    left = book.set_worker(worker, status=status_of(WorkerStatus, WorkerStatus.LEFT))
    if left == Worker(left.task, left.account, left.kernel, left.applied_at, left.lease_until, status=left.status):
        _strike(book, left)
    book.note("left", task=worker.task.hex(), worker=name(worker.account), stage=worker.stage)


def _strike(book: Book, worker: Worker) -> None:
    """Forget an applicant who never had a seat."""
    task = book.task(worker.task)
    book.set_task(task, applicants=task.applicants - 1)
    book.draft.delete(Table.WORKERS, worker.task + worker.account)
    book.draft.delete(Table.JOBS, worker.account + worker.task)


def _present(book: Book, task: bytes, account: bytes) -> Worker:
    worker = book.worker(task, account)
    if worker is None or not worker.is_present:
        raise Refused(Reason.NO_SEAT)
    return worker


def fill(book: Book, task: Task) -> None:
    """Give free seats to applicants: the emptiest stage first, the applicant by the block's seed."""
    if task.state is TaskStatus.POSTED and book.height < task.posted_at + book.params.formation_blocks:
        return
    workers = book.workers(task.id)
    held = [sum(1 for w in workers if w.is_seated and w.stage == stage) for stage in range(task.stages)]
    spares = [
        w for w in workers if w.state is WorkerStatus.SPARE and w.applied_at < book.height
        and not book.account(w.account).barred
    ]  # fmt: skip
    if task.redundancy > 1:
        spares = _alike(workers, spares)
    spares.sort(key=lambda w: digest("seat", book.seed, task.id, w.account))
    for worker in spares:
        stage = min(range(task.stages), key=lambda index: (held[index], index))
        if held[stage] >= task.replicas:
            break
        _seat(book, task, worker, stage)
        held[stage] += 1
    if task.state is TaskStatus.POSTED and all(held):
        book.set_task(task, status=status_of(TaskStatus, TaskStatus.RUNNING))


def _alike(workers: list[Worker], spares: list[Worker]) -> list[Worker]:
    """Return the applicants of one kernel class, that of most who have a seat: their results can be equal bit for bit.

    Before anybody has one it is that of most applicants.
    """
    kernels = Counter(worker.kernel for worker in workers if worker.is_seated)
    kernels = kernels or Counter(worker.kernel for worker in spares)
    usual = min(kernels, key=lambda kernel: (-kernels[kernel], kernel), default=b"")
    return [worker for worker in spares if worker.kernel == usual]


def watch(book: Book, sender: bytes, payload: WatchWorker) -> None:
    """Have all cells of a worker audited for a while, at the wish of the client who pays for it."""
    if book.open_task(payload.task).client != sender:
        raise Refused(Reason.NOT_THE_CLIENT)
    worker = _present(book, payload.task, payload.worker)
    book.set_worker(worker, watched_until=book.height + book.params.absence_blocks)
    book.note("watched", task=worker.task.hex(), worker=name(worker.account), stage=worker.stage)


def _seat(book: Book, task: Task, worker: Worker, stage: int) -> None:
    """Seat a worker; it bonds what it has, the rest of the bond is withheld from its earnings."""
    lease = book.height + book.params.lease_blocks
    book.wake(lease + 1, Table.TASKS, task.id)
    missing = max(0, task.worker_bond - worker.bond - worker.withheld)
    bond = min(missing, book.account(worker.account).balance)
    book.debit(worker.account, bond)
    book.set_worker(
        worker,
        stage=stage,
        bond=worker.bond + bond,
        status=status_of(WorkerStatus, WorkerStatus.SEATED),
        lease_until=lease,
        seated_at=book.height,
    )
    book.note("seated", task=task.id.hex(), worker=name(worker.account), stage=stage)


def expire_leases(book: Book, task: Task) -> None:
    """End the seats and applications of workers that stopped renewing."""
    for worker in book.workers(task.id):
        if worker.is_present and worker.lease_until < book.height:
            leave(book, worker)
