"""Tasks and their escrow."""

from chain.codec import encode
from chain.hashing import digest
from chain.ledger.book import Book, name, place_at
from chain.params import Params
from chain.reasons import Reason, Refused
from chain.records import Task, TaskStatus, Worker, WorkerStatus, status_of
from chain.state import Marker, Table
from chain.transactions import CloseTask, PostTask, TopUp

BASIS = 10_000
MAX_CELLS = 16_384
"""Cells of a task in one step: micro-batches times stages times redundancy."""
MAX_SEATS = 1024
FORGETTING = 20
"""How many times the cells that the charge for withholding is worth have to settle until an occasion is forgotten."""


def post(book: Book, sender: bytes, payload: PostTask) -> None:
    """Open a task; its escrow must cover every cell, audits of all, and its bond outweigh cheating."""
    task_id = digest("task", sender, book.account(sender).nonce.to_bytes(8, "big"), encode(payload))
    if book.draft.get(Table.TASKS, task_id) is not None:
        raise Refused(Reason.TASK_EXISTS)
    _check(book.params, payload)
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
        patience=payload.patience,
        redundancy=payload.redundancy,
        kernel=payload.kernel,
    )
    book.draft.put(Table.TASKS, task_id, task)
    book.draft.put(Table.OPEN, task_id, Marker())
    book.draft.summoned.add(sender)
    book.wake(task.deadline + 1, Table.TASKS, task_id)
    book.note("posted", task=task_id.hex(), client=name(sender), manifest=payload.manifest.hex())


def least_escrow(task: PostTask | Task) -> int:
    """Return what a task may cost: every cell, one audit of each, and one of every worker's step."""
    cells = task.stages * task.microbatches * task.redundancy
    claims = 0 if task.redundancy > 1 else task.stages * task.replicas
    return task.steps * task.price * (2 * cells + claims)


def _check(params: Params, payload: PostTask) -> None:
    if payload.price == 0 and not params.free_tasks:
        raise Refused(Reason.PRICE_TOO_SMALL)
    if payload.redundancy % 2 == 0 or payload.redundancy > payload.replicas:
        raise Refused(Reason.BAD_REDUNDANCY)
    if len(payload.kernel) not in (0, 32):
        raise Refused(Reason.BAD_KERNEL)
    per_step = payload.stages * payload.microbatches * payload.redundancy
    if per_step > MAX_CELLS or payload.stages * payload.replicas > MAX_SEATS:
        raise Refused(Reason.TASK_TOO_LARGE)
    if payload.escrow < least_escrow(payload):
        raise Refused(Reason.ESCROW_TOO_SMALL)
    if payload.audit_rate < params.floor_rate:
        raise Refused(Reason.RATE_TOO_SMALL)
    in_flight = payload.depth * payload.microbatches
    if payload.worker_bond < least_bond(params, payload.price, payload.audit_rate, in_flight):
        raise Refused(Reason.BOND_TOO_SMALL)


def bond_for(price: int, audit_rate: int, colluding_share: int, in_flight: int) -> int:
    """Return the least bond at which cheating loses: price · ((1−h)/h + cells in flight), h = p·(1−f).

    Rates and shares are basis points, amounts base units; the quotient is rounded up. A network without audits
    asks for the bond of the smallest rate.
    """
    h = max(1, audit_rate) * (BASIS - colluding_share)
    odds = -(-(BASIS * BASIS - h) // h)
    return price * (odds + in_flight)


def least_bond(params: Params, price: int, audit_rate: int, in_flight: int) -> int:
    """Return the least bond at which neither false cells nor false optimiser's steps pay; a step counts as a cell."""
    steps = bond_for(price, step_rate(params, audit_rate), params.colluding_share, 0)
    return max(bond_for(price, audit_rate, params.colluding_share, in_flight), steps)


def step_rate(params: Params, audit_rate: int) -> int:
    """Return the rate, in basis points, at which the optimiser's steps of a worker are audited whose cells are so."""
    return audit_rate if audit_rate == BASIS else max(audit_rate * params.step_share // BASIS, params.floor_rate)


def forgotten_after(params: Params, audit_rate: int) -> int:
    """Return after how many settled cells an occasion of withholding, or of small deviations, is forgotten.

    Small deviations cost no charge. Who errs on purpose until an audit finds it can do so once in so many cells: in
    a twentieth of its cells at the lowest audit rate, and in fewer at others.
    """
    return FORGETTING * least_bond(params, 1, audit_rate, 0)


def occasions_left(params: Params, task: Task, worker: Worker, cells: int) -> int:
    """Return how many of a worker's occasions are remembered once so many more of its cells have settled.

    The first is never forgotten: it was cheap, and who could have another cheap one would cheat before each.
    """
    span = forgotten_after(params, task.audit_rate)
    forgotten = (worker.settled_cells + cells) // span - worker.settled_cells // span
    return max(min(worker.withholdings, 1), worker.withholdings - forgotten)


def top_up(book: Book, sender: bytes, payload: TopUp) -> None:
    """Add to a task's escrow."""
    task = book.open_task(payload.task)
    if payload.amount == 0:
        raise Refused(Reason.ZERO_AMOUNT)
    book.debit(sender, payload.amount)
    book.set_task(task, escrow=task.escrow + payload.amount)


def close_by_client(book: Book, sender: bytes, payload: CloseTask) -> None:
    """End the sender's task: at once, or once the steps that are claimed have settled."""
    task = book.open_task(payload.task)
    if task.client != sender:
        raise Refused(Reason.NOT_THE_CLIENT)
    if book.draft.items(Table.STEPS, task.id):
        book.set_task(task, deadline=book.height)
        book.wake(book.height + 1, Table.TASKS, task.id)
    else:
        close(book, task)


def close(book: Book, task: Task) -> None:
    """End a task without unsettled claims: what no dispute may still cost returns, and so do the bonds."""
    book.credit(task.client, task.escrow - task.reserved)
    book.set_task(task, escrow=task.reserved, status=status_of(TaskStatus, TaskStatus.CLOSED))
    for worker in book.workers(task.id):
        if worker.is_present:
            book.set_worker(worker, status=status_of(WorkerStatus, WorkerStatus.LEFT))
    book.touched.add(task.id)
    book.note("closed", task=task.id.hex(), settled=task.settled)


def forget(book: Book, task: Task) -> None:
    """End the watch over a closed task in which nobody owes anything; what disputes did not cost returns."""
    book.credit(task.client, task.escrow)
    book.set_task(task, escrow=0)
    book.draft.delete(Table.OPEN, task.id)
    book.draft.delete(Table.WAKE, place_at(task.deadline + 1, Table.TASKS, task.id))
    for worker in book.workers(task.id):
        book.draft.delete(Table.JOBS, worker.account + task.id)
