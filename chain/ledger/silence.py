"""Work that nobody claims: whose step is looked at for it, and who loses a seat.

Only claims are drawn, so whoever claims nothing is never found by audits. Where cells of a stage are missing in the
middle of the claims' time the optimiser's step of everybody who has claimed there is audited: it shows who claims less
than the client ordered it to add. Where they are still missing at the end, who has claimed nothing at all and had a
seat that long was silent once; several such occasions cost the seat, never the bond: a crash looks the same.
"""

from collections import Counter

from msgspec.structs import replace

from chain.hashing import digest
from chain.ledger.book import Book, name, step_key
from chain.ledger.evictions import SILENT, evict_without_slash
from chain.ledger.transitions import question
from chain.records import ClaimRecord, StepProgress, Task, Worker
from chain.state import Table

STAGES_A_ROW = 16
"""Stages whose cells are looked at for what one row costs."""


def uncovered(book: Book, task: Task, covered: tuple[bytes, ...]) -> set[int]:
    """Return the stages that do not have every cell claimed as often as it is computed.

    A stage with fewer workers than that has it claimed by all of them, if these are most of a team.
    """
    full = ((1 << task.microbatches) - 1).to_bytes((task.microbatches + 7) // 8, "little")
    held: Counter[int] = Counter()
    if task.redundancy > 1:
        held.update(worker.stage for worker in book.workers(task.id) if worker.is_seated)
    found = set()
    for stage in range(task.stages):
        copies = min(task.redundancy, max(task.redundancy // 2 + 1, held[stage]))
        first = stage * task.redundancy
        if any(bitmap != full for bitmap in covered[first : first + copies]):
            found.add(stage)
    return found


def question_due(book: Book, task: Task, limit: int) -> int:
    """Have the steps of those audited who claimed in stages where cells are missing for half of the claims' time.

    Not at the end of that time: the audits shall be over by then. Return how many rows were looked at; what is beyond
    about `limit` waits for a later block.
    """
    if task.redundancy > 1:
        return 0
    count = 0
    now = step_key(task.id, task.generation, 0)
    for key, progress in book.draft.items(Table.STEPS, task.id):
        if count >= limit:
            break
        count += 1
        if key < now or progress.is_questioned or book.height <= half_time(book, progress.first_height):
            continue
        count += task.stages // STAGES_A_ROW
        missing = uncovered(book, task, progress.covered)
        if not missing:
            continue
        book.draft.put(Table.STEPS, key, replace(progress, is_questioned=True))
        count += len(progress.claims)
        for identity in progress.claims:
            record: ClaimRecord = book.claim(identity)
            if record.claim.stage in missing:
                question(book, task, record)
    return count


def half_time(book: Book, first_height: int) -> int:
    """Return the height in the middle of the time for the claims of a step."""
    return first_height + book.params.claim_window // 2


def count_silent(book: Book, task: Task, progress: StepProgress) -> int:
    """Count who has claimed nothing of a step that settles without some cells; return how many rows that took."""
    missing = uncovered(book, task, progress.covered) if progress.claims and _could_claim(book, task) else set()
    if not missing:
        return 0
    workers, spoke = book.workers(task.id), {book.claim(identity).worker for identity in progress.claims}
    for worker in workers:
        if not worker.is_seated or worker.stage not in missing or worker.account in spoke:
            continue
        # who got its seat lately may still fetch the weights; what began before it was noted is the same occasion
        is_ready = worker.seated_at + task.patience < progress.first_height
        if is_ready and worker.silent_at < progress.first_height:
            _note(book, task, worker)
    return len(workers)


def _could_claim(book: Book, task: Task) -> bool:
    """Whether a claim of a stage's cells would not have been refused: the task is not over, and can pay for them."""
    return task.deadline >= book.height and task.reserved + task.microbatches * task.price <= task.escrow


def _note(book: Book, task: Task, worker: Worker) -> None:
    silent = book.set_worker(worker, silences=worker.silences + 1, silent_at=book.height)
    step = task.settled + 1
    book.note(
        "silent",
        task=task.id.hex(),
        worker=name(worker.account),
        step=step,
        stage=worker.stage,
        occasion=silent.silences,
    )
    if silent.silences >= book.params.withheld_limit:
        subject = digest("silence", step_key(task.id, task.generation, step), worker.account)
        evict_without_slash(book, silent, SILENT, subject, step, "silent")


def speaks(book: Book, worker: Worker, claimed_at: int) -> Worker:
    """Forget that a worker was silent, for a settled claim of later; not at once, or silence by turns would do."""
    if worker.silences and claimed_at > worker.silent_at + book.params.absence_blocks:
        return book.set_worker(worker, silences=0)
    return worker
