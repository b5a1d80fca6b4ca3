"""Claims of work, and the draw of what is audited by whom."""

from msgspec.structs import replace

from chain.hashing import digest
from chain.ledger.book import Book, audit_id, name, step_key
from chain.ledger.pools import Pools
from chain.ledger.silence import half_time
from chain.ledger.tasks import BASIS, step_rate
from chain.ledger.transitions import audited_leaves, check_state, is_in_question, with_claim
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
        bitmaps = task.stages * task.redundancy
        progress = StepProgress(book.height, (bytes((task.microbatches + 7) // 8),) * bitmaps)
        book.wake(half_time(book, book.height) + 1, Table.TASKS, task.id)
        book.wake(book.height + book.params.claim_window + 1, Table.TASKS, task.id)
    identity = claim_id(claim, sender)
    if book.draft.get(Table.CLAIMS, identity) is not None:
        raise Refused(Reason.CELL_CLAIMED)
    covered = _cover(progress.covered, claim.stage * task.redundancy, task.redundancy, claim.cells)
    changed = with_claim(book, task, replace(progress, covered=covered), claim, identity)
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
    if list(claim.cells) != sorted(set(claim.cells)) or max(claim.cells, default=0) >= task.microbatches:
        raise Refused(Reason.BAD_CELLS)
    check_state(book, task, claim)


def _cover(covered: tuple[bytes, ...], first: int, copies: int, cells: tuple[int, ...]) -> tuple[bytes, ...]:
    """Return the bitmaps with each cell marked in the first of a stage's `copies` where it is not."""
    marked = [bytearray(bitmap) for bitmap in covered[first : first + copies]]
    for cell in cells:
        free = next((bitmap for bitmap in marked if not bitmap[cell // 8] >> (cell % 8) & 1), None)
        if free is None:
            raise Refused(Reason.CELL_CLAIMED)
        free[cell // 8] |= 1 << (cell % 8)
    return (*covered[:first], *map(bytes, marked), *covered[first + copies :])


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
            left -= len(record.claim.cells) + 1
            _draw(book, record, pools)


def _draw(book: Book, record: ClaimRecord, pools: Pools) -> None:
    claim = record.claim
    task = book.task(claim.task)
    book.touched.add(task.id)
    if claim.generation != task.generation:
        return
    worker = book.worker(claim.task, record.worker)
    assert worker is not None  # a claim is only taken from a worker
    rate, is_disputed = audit_rate(book, task, worker), is_in_question(book, record)
    count = 0
    rate_of_step = step_rate(book.params, rate)
    for cell in audited_leaves(task, record):
        identity, is_step = audit_id(record, cell), cell == task.transition
        if (is_disputed and is_step) or chance(book.seed, identity, rate_of_step if is_step else rate):
            count += start_audit(pools, record, cell, identity)
    book.set_claim(record, drawn=True, open_audits=record.open_audits + count)
    book.engage(claim.task, record.worker, count)


def audit_rate(book: Book, task: Task, worker: Worker) -> int:
    """Return the audit rate of a worker now, in basis points."""
    if max(worker.flagged_until, worker.watched_until) > book.height:
        return BASIS
    if worker.settled_cells < book.params.newcomer_cells or worker.bond + worker.withheld < task.worker_bond:
        return max(task.audit_rate, book.params.newcomer_rate)
    return max(task.audit_rate, book.params.floor_rate)


def start_audit(pools: Pools, record: ClaimRecord, cell: int, identity: bytes, former: Audit | None = None) -> int:
    """Draw an auditor and open the audit; return 1, or 0 with an event when nobody can be.

    `former` is the same audit with an auditor that did not answer, or a passed one of the same cell. Everybody has one
    key for an audit, however often it is drawn: a commitment that comes late must not be one under another key. Peers
    that missed a duty lately are drawn only when nobody else is left, for a first audit: a step that nobody audits must
    not settle sooner than one that somebody does.
    """
    book, claim = pools.book, record.claim
    task = book.task(claim.task)
    seed = digest("auditor", book.seed, identity)
    is_redrawn = former is not None and former.id == identity
    first = None if former is None else former.first if is_redrawn else former.id
    key_seed = former.seed if former is not None and is_redrawn else book.seed
    auditor = pools.draw(record, cell, seed, _auditors(book, former))
    if auditor is None and first is not None:
        return 0
    auditor = auditor or pools.draw_absent(record, cell, seed)
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
        seed=key_seed,
        key=digest("sketch key", key_seed, auditor, identity),
        drawn_at=book.height,
        deadline=book.height + book.params.commit_window + task.patience,
        redraws=former.redraws + 1 if former is not None and is_redrawn else 0,
        first=first,
    )
    _open_audit(book, audit)
    return 1


def _open_audit(book: Book, audit: Audit) -> None:
    """Write a drawn audit, wake the ledger after its deadline and tell who has to re-execute what."""
    book.draft.put(Table.AUDITS, audit.id, audit)
    book.draft.put(Table.ACTIVE, audit.id, Marker())
    book.wake(audit.deadline + 1, Table.AUDITS, audit.id)
    book.note(
        "drawn",
        audit=audit.id.hex(),
        task=audit.task.hex(),
        step=audit.step,
        stage=audit.stage,
        cell=audit.cell,
        worker=name(audit.worker),
        auditor=name(audit.auditor),
        **({} if audit.first is None else {"first": audit.first.hex()}),
    )


def _auditors(book: Book, former: Audit | None) -> tuple[bytes, ...]:
    """Return who has been the auditor of an audit, and of the one that it repeats."""
    first: Audit | None = book.draft.get(Table.AUDITS, former.first) if former and former.first else None
    return tuple(audit.auditor for audit in (former, first) if audit is not None)
