"""The records of the ledger's state, table by table."""

from collections.abc import Callable
from enum import StrEnum
from typing import Annotated

from msgspec import Meta

from chain.codec import AccountId, Hash, Record, Uint
from chain.params import Params
from chain.transactions import BasisPoints, Claim, Index, Opening, Reveal


class Account(Record, frozen=True):
    """One account. `absent_until` keeps it out of draws; `barred` out of seats and audits for good."""

    balance: Uint = 0
    nonce: Uint = 0
    bonded: Uint = 0
    granted: bool = False
    barred: bool = False
    absent_until: Uint = 0
    committed_at: Uint = 0
    """The height at which it last committed to a re-execution that it was drawn for."""
    committed_draw: Uint = 0
    """The height of the newest draw among those that it has committed to."""


class Validator(Record, frozen=True):
    """A registered validator; it votes while it has stake and is neither jailed nor tombstoned."""

    onion_tip: Hash
    registered_at: Uint
    power: Uint = 0
    """Its weight in the set, which follows its stake from epoch to epoch; 0 outside the set."""
    jailed_until: Uint = 0
    is_jailed: bool = False
    is_tombstoned: bool = False
    missed: tuple[Uint, ...] = ()
    """Heights, within the jail window, whose finalization it did not sign."""
    onion: Uint = 0
    """How often it has changed to another onion."""
    next_tip: Hash | None = None
    """The tip of its next onion, in force from the first epoch at or after `next_tip_at`."""
    next_tip_at: Uint = 0
    wish: Params | None = None
    """The parameters that it votes for."""

    @property
    def is_able(self) -> bool:
        """Whether it may validate, given stake."""
        return not self.is_jailed and not self.is_tombstoned


class Rotation(Record, frozen=True):
    """The place of an account in a line of successors; the row of the first says who is the last now."""

    first: AccountId
    last: AccountId
    closed_at: Uint = 0
    """Height of its own rotation, 0 for the last of the line."""


class Unbonding(Record, frozen=True):
    """Stake on its way back to the balance."""

    amount: Uint
    release_at: Uint


class TaskStatus(StrEnum):
    """Life of a task: posted → running → closed."""

    POSTED = "posted"
    RUNNING = "running"
    CLOSED = "closed"


_TASK_STATES = tuple(TaskStatus)


class Task(Record, frozen=True):
    """A training task. `settled` is the last step all of whose audits have ended, in order."""

    id: Hash
    client: AccountId
    manifest: Hash
    stages: Index
    replicas: Index
    steps: Uint
    microbatches: Uint
    price: Uint
    escrow: Uint
    worker_bond: Uint
    audit_rate: BasisPoints
    depth: Uint
    posted_at: Uint
    deadline: Uint
    status: Uint = 0
    generation: Index = 0
    settled: Uint = 0
    reserved: Uint = 0
    """The part of the escrow that claimed cells will cost."""
    audit_pay: Uint = 0
    """What the audits of unsettled claims have cost."""
    applicants: Uint = 0
    """How many have, or had, a seat or an application."""
    patience: Uint = 0
    """Blocks that one re-execution may take beyond what the network's windows allow."""
    redundancy: Uint = 1
    """How many workers compute, claim and are paid for every cell."""
    kernel: bytes = b""
    """The kernel class of the workers, where results are exact inside one only."""
    roots: tuple[bytes, ...] = ()
    """By stage the state after the last settled step, as in `StepProgress.after`."""

    @property
    def transition(self) -> int:
        """The number, after those of the cells, under which the optimiser's step is audited."""
        return self.microbatches

    @property
    def state(self) -> TaskStatus:
        """The place in its life."""
        return _TASK_STATES[self.status]

    @property
    def is_open(self) -> bool:
        """Whether the task still takes workers and claims."""
        return self.state is not TaskStatus.CLOSED


class WorkerStatus(StrEnum):
    """Life of a worker: spare → seated → left | evicted."""

    SPARE = "spare"
    SEATED = "seated"
    LEFT = "left"
    EVICTED = "evicted"


_WORKER_STATES = tuple(WorkerStatus)


class Worker(Record, frozen=True):
    """An applicant or holder of a seat. `stage` is −1 for a spare and stays after the seat is gone."""

    task: Hash
    account: AccountId
    kernel: Hash
    applied_at: Uint
    lease_until: Uint
    stage: Annotated[int, Meta(ge=-1, le=255)] = -1
    status: Uint = 0
    bond: Uint = 0
    withheld: Uint = 0
    earned: Uint = 0
    settled_cells: Uint = 0
    flagged_until: Uint = 0
    withholdings: Uint = 0
    """Occasions on which it withheld data or erred, less what was forgotten; see `tasks.occasions_left`."""
    engaged: Uint = 0
    """How many of its claims are unsettled, and audits of them open."""
    watched_until: Uint = 0
    """Until then the task's client has every cell of it audited."""
    seated_at: Uint = 0
    """The height at which it got its seat."""
    silences: Uint = 0
    """How often it has claimed nothing where cells were missing, since it claimed regularly."""
    silent_at: Uint = 0
    """The height at which that was noted last."""

    @property
    def state(self) -> WorkerStatus:
        """The place in its life."""
        return _WORKER_STATES[self.status]

    @property
    def is_present(self) -> bool:
        """Whether the worker holds a seat or an application now."""
        return self.state in (WorkerStatus.SPARE, WorkerStatus.SEATED)

    @property
    def is_seated(self) -> bool:
        """Whether the worker holds its seat now."""
        return self.state is WorkerStatus.SEATED


class ClaimRecord(Record, frozen=True):
    """A claim on chain; `drawn` once its audits are drawn; `unpaid` are cells that lost their pay."""

    id: Hash
    claim: Claim
    worker: AccountId
    height: Uint
    drawn: bool = False
    open_audits: Uint = 0
    unpaid: tuple[Index, ...] = ()
    is_void: bool = False
    is_settled: bool = False
    audit_pay: Uint = 0
    """What its audits have cost the escrow."""
    is_questioned: bool = False
    """Whether its step was drawn after its cells: for another state claimed after it, or for missing cells."""


class StepProgress(Record, frozen=True):
    """Claims of one step of one generation: which cells of each stage are claimed, and how often.

    `covered` has as many bitmaps for each stage, one stage after the other, as the task has redundancy: the first
    one shows the cells that are claimed at all, the next one those that are claimed twice, and so on.
    """

    first_height: Uint
    covered: tuple[bytes, ...]
    claims: tuple[Hash, ...] = ()
    after: tuple[bytes, ...] = ()
    """By stage the root of the state after the step, as claimed; see `chain.ledger.transitions`."""
    is_questioned: bool = False
    """Whether cells were missing for half of the claims' time; see `chain.ledger.silence`."""


class AuditStatus(StrEnum):
    """Life of an audit; see docs/design/contract.md."""

    DRAWN = "drawn"
    COMMITTED = "committed"
    OPENED = "opened"
    OPINION = "opinion"
    VOTING = "voting"
    PASSED = "passed"
    CONVICTED = "convicted"
    ACQUITTED = "acquitted"
    FAULTED = "faulted"
    UNDECIDED = "undecided"
    WITHHELD = "withheld"
    ABSENT = "absent"
    VOID = "void"
    REFUTED = "refuted"


_AUDIT_STATES = tuple(AuditStatus)


ACTIVE = (
    AuditStatus.DRAWN,
    AuditStatus.COMMITTED,
    AuditStatus.OPENED,
    AuditStatus.OPINION,
    AuditStatus.VOTING,
)


class Voter(Record, frozen=True):
    """A third opinion, with its reveal, or a voter, of whose reveal only the ballot stays in the state."""

    account: AccountId
    power: Uint
    commitment: Hash | None = None
    reveal: Reveal | None = None
    said: Annotated[int, Meta(ge=0, le=6)] | None = None
    """The place of the voter's ballot in `verdicts.Ballot`."""

    @property
    def has_revealed(self) -> bool:
        """Whether it has revealed what it committed to."""
        return self.reveal is not None or self.said is not None


class Audit(Record, frozen=True):
    """The audit of one cell, with everything that its verdict rests on."""

    id: Hash
    claim: Hash
    task: Hash
    generation: Index
    step: Uint
    stage: Index
    cell: Index
    worker: AccountId
    auditor: AccountId
    key: Hash
    """Sketch key shared by auditor, worker and voters."""
    drawn_at: Uint
    deadline: Uint
    redraws: Uint = 0
    status: Uint = 0
    commitment: Hash | None = None
    opening: Opening | None = None
    reveal: Reveal | None = None
    dispute_seed: Hash | None = None
    third: Voter | None = None
    voters: tuple[Voter, ...] = ()
    is_revealing: bool = False
    """Whether the voters' commit window is over."""
    first: Hash | None = None
    """The passed audit of the same cell that this one repeats."""
    is_reopened: bool = False
    """Whether the cell was found false after this audit had passed."""
    seed: Hash = bytes(32)
    """That of the block which drew it first: of it come the keys of all auditors that it is drawn for."""

    @property
    def state(self) -> AuditStatus:
        """The place in its life."""
        return _AUDIT_STATES[self.status]

    @property
    def is_active(self) -> bool:
        """Whether somebody still owes something."""
        return self.state in ACTIVE


class Conviction(Record, frozen=True):
    """Evidence of an eviction or of an equivocation, kept for good."""

    id: Hash
    kind: Uint
    """0: a verdict on an audit; 1: two conflicting consensus votes; 2: repeated withholding, or faults, of which the
    subject, an audit, says which; 3: silence."""
    account: AccountId
    task: Hash | None
    height: Uint
    slashed: Uint
    subject: Hash
    first: bytes = b""
    second: bytes = b""


class Chain(Record, frozen=True):
    """What the ledger knows of the chain itself."""

    chain_id: Hash
    height: Uint
    timestamp: Uint
    seed: Hash
    epoch_seed: Hash
    leader_seed: Hash
    issued: Uint
    burned: Uint
    faucet: Uint


def heir(rotation: Callable[[bytes], Rotation | None], account: bytes) -> bytes:
    """Return the last successor of an account, itself if its key was never rotated."""
    row = rotation(account)
    first = None if row is None else rotation(row.first)
    return account if first is None else first.last


def is_closed(row: Rotation | None) -> bool:
    """Whether a row of the rotations is that of an account which has a successor."""
    return row is not None and row.closed_at > 0


def status_of(kind: type[StrEnum], value: StrEnum) -> int:
    """Return the number that stands for an enum's member in a record."""
    return list(kind).index(value)
