"""A state under construction, record by record, and the block that is executed on it."""

from dataclasses import dataclass, field

from msgspec import structs

from chain.blocks import BlockContext
from chain.codec import Record, encode
from chain.commitment import claim_root, leaf
from chain.genesis import Allocation, Genesis, GenesisValidator
from chain.hashing import digest
from chain.keys import PrivateKey
from chain.ledger.book import place_at, step_key
from chain.ledger.claims import claim_id
from chain.params import Params
from chain.randomness import Onion, next_seed
from chain.records import (
    Account,
    Audit,
    AuditStatus,
    ClaimRecord,
    StepProgress,
    Task,
    TaskStatus,
    Worker,
    WorkerStatus,
    status_of,
)
from chain.state import Draft, Marker, State, Table, genesis_state
from chain.transactions import (
    Claim,
    Payload,
    Trace,
    Transaction,
    Unsigned,
    sign,
)

HEIGHT = 999
"""The height that a shape's state stands at: the next one begins an epoch."""
RICH = 10**12
SKETCH = bytes(384)
TRACE = Trace(*(bytes(32) for _ in Trace.__struct_fields__))
LONG = 10**6
SPAN = 10**6
"""Numbers of tasks that one shape has for itself."""


def key_of(index: int) -> PrivateKey:
    """Return the same key in every run."""
    return PrivateKey(digest("bench key", index.to_bytes(8, "big")))


def name_of(*parts: object) -> bytes:
    """Return 32 bytes that nothing else is called."""
    return digest("bench name", repr(parts).encode())


@dataclass
class Shape:
    """A state under construction and the block that is executed on it."""

    validators: int = 4
    params: Params = field(default_factory=Params)
    sent: list[tuple[PrivateKey, Payload]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.keys = [key_of(index) for index in range(self.validators)]
        self.onion = Onion(self.keys[0].seed, 4)
        members = tuple(GenesisValidator(key.account, 10**6, self.onion.tip) for key in self.keys)
        allocations = (Allocation(key_of(-1 % 2**32).account, RICH * 1000),)
        self.genesis = Genesis(b"worst", 1_700_000_000_000, self.params, allocations, members)
        self._base = genesis_state(self.genesis)
        self._draft = Draft(self._base)
        self.put(Table.CHAIN, b"", structs.replace(self._base.chain, height=HEIGHT))

    def put(self, table: Table, key: bytes, record: Record) -> None:
        """Write a record into the state."""
        self._draft.put(table, key, record)

    def account(self, key: PrivateKey | bytes, **changes: int) -> None:
        """Give an account money."""
        account = key if isinstance(key, bytes) else key.account
        self.put(Table.ACCOUNTS, account, Account(**{"balance": RICH, **changes}))

    def state(self) -> State:
        """Return the state."""
        return self._draft.freeze(self._base)

    def context(self, state: State) -> BlockContext:
        """Return the context of the block, proposed by the first validator."""
        proposer = self.keys[0].account
        validator = state.validator(proposer)
        assert validator is not None
        reveal = self.onion.below(validator.onion_tip)
        seed = next_seed(state.seed, reveal)
        time = state.chain.timestamp + 1000
        return BlockContext(self.genesis.chain_id, state.height + 1, time, proposer, reveal, seed, ())

    def transactions(self, state: State) -> tuple[Transaction, ...]:
        """Return the signed transactions of the block, as many as fit."""
        nonces: dict[bytes, int] = {}
        found: list[Transaction] = []
        left = self.params.max_block_bytes
        for key, payload in self.sent[: self.params.max_block_transactions]:
            nonce = nonces.get(key.account, state.account(key.account).nonce)
            nonces[key.account] = nonce + 1
            body = Unsigned(1, self.genesis.chain_id, key.account, nonce, 0, 2 * HEIGHT, 0, b"", payload)
            signed = sign(key, body)
            left -= len(encode(signed))
            if left < 0:
                break
            found.append(signed)
        return tuple(found)

    def task(self, index: int, **changes: object) -> Task:
        """Open a task that runs."""
        plain = Task(
            id=name_of("task", index), client=key_of(10**6).account, manifest=bytes(32), stages=1, replicas=1,
            steps=1000, microbatches=4, price=1, escrow=10**7, worker_bond=100, audit_rate=10_000, depth=4,
            posted_at=1, deadline=LONG, status=status_of(TaskStatus, TaskStatus.RUNNING),
        )  # fmt: skip
        task = structs.replace(plain, **changes)
        self.put(Table.TASKS, task.id, task)
        self.put(Table.OPEN, task.id, Marker())
        return task

    def wake(self, height: int, table: Table, key: bytes) -> None:
        """Let something be due at a height."""
        self.put(Table.WAKE, place_at(height, table, key), Marker())

    def worker(self, task: Task, account: bytes, stage: int = -1, **changes: object) -> Worker:
        """Let an account wait in a task, or sit in a stage of it."""
        status = status_of(WorkerStatus, WorkerStatus.SPARE if stage < 0 else WorkerStatus.SEATED)
        plain = Worker(task.id, account, bytes(32), 1, LONG, stage=stage, status=status)
        worker = structs.replace(plain, **changes)
        self.put(Table.WORKERS, task.id + account, worker)
        self.put(Table.JOBS, account + task.id, Marker())
        return worker

    def _engage(self, task: bytes, account: bytes) -> None:
        worker: Worker = self._draft.get(Table.WORKERS, task + account)
        self.put(Table.WORKERS, task + account, structs.replace(worker, engaged=worker.engaged + 1))

    def claim(self, task: Task, worker: Worker, step: int, cells: tuple[int, ...], drawn: bool = False) -> ClaimRecord:
        """Record a claim, waiting for its draw or drawn."""
        root = claim_root([leaf(bytes(32), TRACE) for _ in cells])
        claim = Claim(task.id, task.generation, step, worker.stage, cells, root, bytes(32), bytes(32))
        identity = claim_id(claim, worker.account)
        height = HEIGHT - 1 - 2 * drawn
        record = ClaimRecord(identity, claim, worker.account, height, drawn=drawn, open_audits=len(cells) * drawn)
        self.put(Table.CLAIMS, identity, record)
        self._engage(task.id, worker.account)
        if not drawn:
            self.put(Table.QUEUE, height.to_bytes(8, "big") + identity, Marker())
        key = step_key(task.id, task.generation, step)
        progress = self._draft.get(Table.STEPS, key) or StepProgress(height, (bytes(128),) * task.stages)
        self.put(Table.STEPS, key, structs.replace(progress, claims=(*progress.claims, identity)))
        return record

    def audit(self, record: ClaimRecord, cell: int, auditor: bytes, state: AuditStatus, **changes: object) -> Audit:
        """Record an audit in a state of its life."""
        claim = record.claim
        plain = Audit(
            name_of("audit", record.id, cell), record.id, claim.task, claim.generation, claim.step, claim.stage, cell,
            record.worker, auditor, bytes(32), HEIGHT, HEIGHT + 100, status=status_of(AuditStatus, state),
        )  # fmt: skip
        audit = structs.replace(plain, **changes)
        self.put(Table.AUDITS, audit.id, audit)
        self.put(Table.ACTIVE, audit.id, Marker())
        self.wake(audit.deadline + 1, Table.AUDITS, audit.id)
        self._engage(record.claim.task, record.worker)
        return audit
