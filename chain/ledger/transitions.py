"""The optimiser's step as one more leaf of a claim: which states claims may name, and when a step must be audited.

After the leaves of its cells a claim has one for the step itself: the contributions that were added and the weights
and moments that followed. It is audited like a cell, by the number that follows the task's last cell. A worker starts
from a state that somebody of its stage claimed after the step before; where two claim different states after the
same step both are audited, for one of them is false.
"""

from msgspec.structs import replace

from chain.ledger.book import Book, audit_id, step_key
from chain.reasons import Reason, Refused
from chain.records import ClaimRecord, StepProgress, Task
from chain.state import Marker, Table
from chain.transactions import Claim

UNKNOWN = b""
"""In place of a root: nobody has claimed one."""
SPLIT = b"?"
"""In place of a root: not all have claimed the same."""


def leaves_of(task: Task, claim: Claim) -> tuple[int, ...]:
    """Return the numbers of a claim's leaves in their order: its cells, then the optimiser's step."""
    return (*claim.cells, task.transition)


def audited_leaves(task: Task, record: ClaimRecord) -> tuple[int, ...]:
    """Return the numbers of the leaves among which audits are drawn.

    Where teams compute every cell their majority has agreed on the sums; a step that was drawn before and is in
    question since is drawn for its transition alone.
    """
    if record.is_questioned:
        return (task.transition,)
    return record.claim.cells if task.redundancy > 1 else leaves_of(task, record.claim)


def check_state(book: Book, task: Task, claim: Claim) -> None:
    """Refuse a claim that starts from a state which nobody of its stage has claimed."""
    if claim.step == task.settled + 1:
        known = task.roots
    else:
        before: StepProgress | None = book.draft.get(Table.STEPS, step_key(task.id, claim.generation, claim.step - 1))
        known = before.after if before is not None else ()
    expected = known[claim.stage] if claim.stage < len(known) else UNKNOWN
    if expected not in (UNKNOWN, SPLIT, claim.state_before):
        raise Refused(Reason.WRONG_STATE)


def with_claim(book: Book, task: Task, progress: StepProgress, claim: Claim, identity: bytes) -> StepProgress:
    """Return a step's progress with one more claim; claims of other states after it come into question."""
    after = list(progress.after or (UNKNOWN,) * task.stages)
    if after[claim.stage] == UNKNOWN:
        after[claim.stage] = claim.state_after
    elif after[claim.stage] not in (SPLIT, claim.state_after):
        after[claim.stage] = SPLIT
        for other in progress.claims:
            record = book.claim(other)
            if record.claim.stage == claim.stage:
                question(book, task, record)
    return replace(progress, claims=(*progress.claims, identity), after=tuple(after))


def is_in_question(book: Book, record: ClaimRecord) -> bool:
    """Whether somebody of the stage claims another state after the same step, or cells were missing for long."""
    if record.is_questioned:
        return True
    claim = record.claim
    progress: StepProgress | None = book.draft.get(Table.STEPS, step_key(claim.task, claim.generation, claim.step))
    is_split = progress is not None and progress.after[claim.stage : claim.stage + 1] == (SPLIT,)
    return is_split or (progress is not None and progress.is_questioned)


def question(book: Book, task: Task, record: ClaimRecord) -> None:
    """Have the step of a claim drawn whose cells have been drawn already; others will be with their cells."""
    if not record.drawn or task.redundancy > 1:
        return
    if book.draft.get(Table.AUDITS, audit_id(record, task.transition)) is not None:
        return
    book.set_claim(record, drawn=False, is_questioned=True)
    book.draft.put(Table.QUEUE, book.height.to_bytes(8, "big") + record.id, Marker())
