"""Tasks, their escrow, and the seats of their workers."""

from msgspec.structs import replace

from chain.codec import encode
from chain.hashing import digest
from chain.ledger.book import Book, name
from chain.reasons import Reason, Refused
from chain.records import Task, TaskStatus, Worker, WorkerStatus, status_of
from chain.state import Table
from chain.transactions import CloseTask, LeaveSeat, PostTask, RenewLease, TakeSeat, TopUp

BASIS = 10_000


def post(book: Book, sender: bytes, payload: PostTask) -> None:
    """Open a task; its escrow must cover every cell and one audit of each, its bond outweigh cheating."""
    task_id = digest("task", sender, book.account(sender).nonce.to_bytes(8, "big"), encode(payload))
    if book.draft.get(Table.TASKS, task_id) is not None:
        raise Refused(Reason.TASK_EXISTS)
    cells = payload.steps * payload.stages * payload.microbatches
    if payload.escrow < 2 * cells * payload.price:
        raise Refused(Reason.ESCROW_TOO_SMALL)
    if payload.audit_rate < book.params.floor_rate:
        raise Refused(Reason.RATE_TOO_SMALL)
    if payload.worker_bond < least_bond(book, payload):
        raise Refused(Reason.BOND_TOO_SMALL)
    book.debit(sender, payload.escrow)
    task = Task(
        id=task_id,
        client=sender,
        manifest=payload.manifest,
        stages=payload.stages,
        replicas=payload.replicas,
        steps=payload.steps,
        microbatches=payload.microbatches,
        price=payload.price,
        escrow=payload.escrow,
        worker_bond=payload.worker_bond,
        audit_rate=payload.audit_rate,
        depth=payload.depth,
        posted_at=book.height,
        deadline=book.height + payload.lifetime,
    )
    book.draft.put(Table.TASKS, task_id, task)
    book.note("posted", task=task_id.hex(), client=name(sender), manifest=payload.manifest.hex())


def least_bond(book: Book, payload: PostTask) -> int:
    """Return the bond at which cheating loses: price · ((1−h)/h + cells in flight), h = p·(1−f)."""
    return bond_for(
        payload.price, payload.audit_rate, book.params.colluding_share, payload.depth * payload.microbatches
    )


def bond_for(price: int, audit_rate: int, colluding_share: int, in_flight: int) -> int:
    """Return the least bond in base units; rates and shares are basis points, the quotient is rounded up."""
    h = audit_rate * (BASIS - colluding_share)
    odds = -(-(BASIS * BASIS - h) // h)
    return price * (odds + in_flight)


def top_up(book: Book, sender: bytes, payload: TopUp) -> None:
    """Add to a task's escrow."""
    task = _open_task(book, payload.task)
    book.debit(sender, payload.amount)
    book.set_task(task, escrow=task.escrow + payload.amount)


def close_by_client(book: Book, sender: bytes, payload: CloseTask) -> None:
    """End the sender's task."""
    task = _open_task(book, payload.task)
    if task.client != sender:
        raise Refused(Reason.NOT_THE_CLIENT)
    close(book, task)


def close(book: Book, task: Task) -> None:
    """End a task: the escrow goes back, seats end; bonds return once no dispute can touch them."""
    book.credit(task.client, task.escrow)
    book.set_task(task, escrow=0, status=status_of(TaskStatus, TaskStatus.CLOSED))
    for worker in book.workers(task.id):
        if worker.state in (WorkerStatus.SPARE, WorkerStatus.SEATED):
            book.set_worker(worker, status=status_of(WorkerStatus, WorkerStatus.LEFT))
    book.note("closed", task=task.id.hex(), settled=task.settled)


def take_seat(book: Book, sender: bytes, payload: TakeSeat) -> None:
    """Apply for a seat; the seed decides who gets one, and which."""
    task = _open_task(book, payload.task)
    if book.account(sender).barred:
        raise Refused(Reason.BARRED)
    known = book.worker(task.id, sender)
    if known is not None and known.state in (WorkerStatus.SPARE, WorkerStatus.SEATED):
        raise Refused(Reason.ALREADY_APPLIED)
    lease = book.height + book.params.lease_blocks
    fresh = known or Worker(task.id, sender, payload.kernel, book.height, lease)
    applied = replace(fresh, kernel=payload.kernel, applied_at=book.height, lease_until=lease, stage=-1)
    spare = status_of(WorkerStatus, WorkerStatus.SPARE)
    book.draft.put(Table.WORKERS, task.id + sender, replace(applied, status=spare))


def renew_lease(book: Book, sender: bytes, payload: RenewLease) -> None:
    """Keep a seat or an application."""
    worker = _present(book, payload.task, sender)
    book.set_worker(worker, lease_until=book.height + book.params.lease_blocks)


def leave_seat(book: Book, sender: bytes, payload: LeaveSeat) -> None:
    """Give up a seat or an application."""
    leave(book, _present(book, payload.task, sender))


def leave(book: Book, worker: Worker) -> None:
    """End a worker's seat without blame."""
    book.set_worker(worker, status=status_of(WorkerStatus, WorkerStatus.LEFT))
    book.note("left", task=worker.task.hex(), worker=name(worker.account), stage=worker.stage)


def _open_task(book: Book, task_id: bytes) -> Task:
    task = book.task(task_id)
    if not task.is_open:
        raise Refused(Reason.TASK_CLOSED)
    return task


def _present(book: Book, task: bytes, account: bytes) -> Worker:
    worker = book.worker(task, account)
    if worker is None or worker.state not in (WorkerStatus.SPARE, WorkerStatus.SEATED):
        raise Refused(Reason.NO_SEAT)
    return worker


def fill_seats(book: Book, task: Task) -> None:
    """Give free seats to applicants: the emptiest stage first, the applicant by the block's seed."""
    if task.state is TaskStatus.POSTED and book.height < task.posted_at + book.params.formation_blocks:
        return
    workers = book.workers(task.id)
    held = [sum(1 for w in workers if w.is_seated and w.stage == stage) for stage in range(task.stages)]
    spares = [
        w for w in workers if w.state is WorkerStatus.SPARE and w.applied_at < book.height
        and not book.account(w.account).barred
    ]  # fmt: skip
    spares.sort(key=lambda w: digest("seat", book.seed, task.id, w.account))
    for worker in spares:
        stage = min(range(task.stages), key=lambda index: (held[index], index))
        if held[stage] >= task.replicas:
            break
        _seat(book, task, worker, stage)
        held[stage] += 1
    if task.state is TaskStatus.POSTED and all(held):
        book.set_task(book.task(task.id), status=status_of(TaskStatus, TaskStatus.RUNNING))


def _seat(book: Book, task: Task, worker: Worker, stage: int) -> None:
    """Seat a worker; it bonds what it has, the rest of the bond is withheld from its earnings."""
    bond = min(task.worker_bond - worker.bond, book.account(worker.account).balance)
    if bond > 0:
        book.debit(worker.account, bond)
    book.set_worker(
        worker,
        stage=stage,
        bond=worker.bond + max(bond, 0),
        status=status_of(WorkerStatus, WorkerStatus.SEATED),
        lease_until=book.height + book.params.lease_blocks,
    )
    book.note("seated", task=task.id.hex(), worker=name(worker.account), stage=stage)


def expire_leases(book: Book, task: Task) -> None:
    """End the seats and applications of workers that stopped renewing."""
    for worker in book.workers(task.id):
        is_present = worker.state in (WorkerStatus.SPARE, WorkerStatus.SEATED)
        if is_present and worker.lease_until < book.height:
            leave(book, worker)
