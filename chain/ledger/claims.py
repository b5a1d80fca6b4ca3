"""Claims of work, and the draw of what is audited by whom."""

from msgspec.structs import replace

from chain.hashing import digest
from chain.ledger.book import Book, audit_id, name, step_key
from chain.ledger.pools import Pools
from chain.randomness import chance
from chain.reasons import Reason, Refused
from chain.records import Audit, ClaimRecord, StepProgress, Task, TaskStatus, Worker
from chain.state import Marker, Table
from chain.transactions import Claim, SubmitClaims


def submit(book: Book, sender: bytes, payload: SubmitClaims) -> None:
    """Take a worker's claims; all of them or none."""
    for claim in payload.claims:
        _take(book, sender, claim)


def claim_id(claim: Claim, worker: bytes) -> bytes:
    """Return the 32-byte id of a claim."""
    place = b"".join(n.to_bytes(8, "big") for n in (claim.generation, claim.step, claim.stage))
    return digest("claim", claim.task, place, worker)


def _take(book: Book, sender: bytes, claim: Claim) -> None:
    task = book.task(claim.task)
    worker = book.worker(claim.task, sender)
    _check(book, task, worker, claim)
    if task.reserved + len(claim.cells) * task.price > task.escrow:
        raise Refused(Reason.ESCROW_TOO_SMALL)
    key = step_key(task.id, claim.generation, claim.step)
    progress: StepProgress | None = book.draft.get(Table.STEPS, key)
    if progress is None:
        progress = StepProgress(book.height, (bytes((task.microbatches + 7) // 8),) * task.stages)
        book.wake(book.height + book.params.claim_window + 1, Table.TASKS, task.id)
    identity = claim_id(claim, sender)
    if book.draft.get(Table.CLAIMS, identity) is not None:
        raise Refused(Reason.CELL_CLAIMED)
    covered = list(progress.covered)
    covered[claim.stage] = _cover(covered[claim.stage], claim.cells)
    changed = replace(progress, covered=tuple(covered), claims=(*progress.claims, identity))
    book.draft.put(Table.STEPS, key, changed)
    book.reserve(task.id, len(claim.cells))
    book.engage(task.id, sender, 1)
    book.draft.put(Table.CLAIMS, identity, ClaimRecord(identity, claim, sender, book.height))
    book.draft.put(Table.QUEUE, book.height.to_bytes(8, "big") + identity, Marker())
    book.note(
        "claimed",
        task=task.id.hex(),
        worker=name(sender),
        step=claim.step,
        stage=claim.stage,
        cells=list(claim.cells),
        claim=identity.hex(),
    )


def _check(book: Book, task: Task, worker: Worker | None, claim: Claim) -> None:
    if task.state is not TaskStatus.RUNNING or task.deadline < book.height:
        raise Refused(Reason.NOT_RUNNING if task.is_open and task.deadline >= book.height else Reason.TASK_CLOSED)
    if worker is None or not worker.is_seated or worker.stage != claim.stage:
        raise Refused(Reason.NO_SEAT)
    if claim.generation != task.generation:
        raise Refused(Reason.WRONG_GENERATION)
    if not task.settled < claim.step <= min(task.settled + task.depth, task.steps):
        raise Refused(Reason.WRONG_STEP)
    if list(claim.cells) != sorted(set(claim.cells)) or claim.cells[-1] >= task.microbatches:
        raise Refused(Reason.BAD_CELLS)


def _cover(bitmap: bytes, cells: tuple[int, ...]) -> bytes:
    marked = bytearray(bitmap)
    for cell in cells:
        if marked[cell // 8] >> (cell % 8) & 1:
            raise Refused(Reason.CELL_CLAIMED)
        marked[cell // 8] |= 1 << (cell % 8)
    return bytes(marked)


def draw_due(book: Book) -> None:
    """Draw the audits of the claims that were final `draw_delay` blocks ago, with this block's seed.

    What is beyond the bound of a block waits for the next one: the draw is never before its time.
    """
    due = max(0, book.height - book.params.draw_delay).to_bytes(8, "big")
    left = book.params.max_drawn_cells
    pools = Pools(book)
    for key, _ in book.draft.items(Table.QUEUE):
        record: ClaimRecord | None = book.draft.get(Table.CLAIMS, key[8:])
        if key[:8] > due or left <= pools.cost // 16:
            break
        book.draft.delete(Table.QUEUE, key)
        if record is not None and not record.is_void:
            left -= len(record.claim.cells)
            _draw(book, record, pools)


def _draw(book: Book, record: ClaimRecord, pools: Pools) -> None:
    claim = record.claim
    task = book.task(claim.task)
    book.touched.add(task.id)
    if claim.generation != task.generation:
        return
    worker = book.worker(claim.task, record.worker)
    assert worker is not None  # a claim is only taken from a worker
    rate = audit_rate(book, task, worker)
    count = 0
    for cell in claim.cells:
        identity = audit_id(record, cell)
        if chance(book.seed, identity, rate):
            count += start_audit(pools, record, cell, identity)
    book.set_claim(record, drawn=True, open_audits=count)
    book.engage(claim.task, record.worker, count)


def audit_rate(book: Book, task: Task, worker: Worker) -> int:
    """Return the audit rate of a worker now, in basis points."""
    if worker.flagged_until > book.height:
        return 10_000
    if worker.settled_cells < book.params.newcomer_cells or worker.bond + worker.withheld < task.worker_bond:
        return max(task.audit_rate, book.params.newcomer_rate)
    return max(task.audit_rate, book.params.floor_rate)


def start_audit(
    pools: Pools, record: ClaimRecord, cell: int, identity: bytes, excluded: tuple[bytes, ...] = (), redraws: int = 0
) -> int:
    """Draw an auditor and open the audit; return 1, or 0 with an event when nobody is eligible."""
    book, claim = pools.book, record.claim
    auditor = pools.draw(record, cell, digest("auditor", book.seed, identity), excluded)
    if auditor is None:
        book.note("unaudited", claim=record.id.hex(), cell=cell, worker=name(record.worker))
        return 0
    audit = Audit(
        id=identity,
        claim=record.id,
        task=claim.task,
        generation=claim.generation,
        step=claim.step,
        stage=claim.stage,
        cell=cell,
        worker=record.worker,
        auditor=auditor,
        key=digest("sketch key", book.seed, auditor, identity),
        drawn_at=book.height,
        deadline=book.height + book.params.commit_window,
        redraws=redraws,
    )
    book.draft.put(Table.AUDITS, identity, audit)
    book.draft.put(Table.ACTIVE, identity, Marker())
    book.wake(audit.deadline + 1, Table.AUDITS, identity)
    book.note(
        "drawn",
        audit=identity.hex(),
        task=claim.task.hex(),
        step=claim.step,
        stage=claim.stage,
        cell=cell,
        worker=name(record.worker),
        auditor=name(auditor),
    )
    return 1
