"""A ledger without consensus for tests: blocks of transactions by known keys, and a swarm on top of it.

The true sketch of a cell under a key is a pseudo-random vector; a peer that computes something else
returns it scaled by 1 + deviation, so its relative L2 deviation is exactly that.
"""

import random
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field

from msgspec import structs

from chain.blocks import BlockContext
from chain.commitment import claim_root, leaf, prove
from chain.genesis import Allocation, Genesis, GenesisValidator
from chain.hashing import digest
from chain.keys import PrivateKey
from chain.ledger import Event, Executed, execute
from chain.ledger.tasks import least_escrow
from chain.params import Params
from chain.randomness import Onion, next_seed
from chain.records import Audit
from chain.state import Duty, State, genesis_state, holdings
from chain.transactions import (
    Claim,
    Commit,
    Commitment,
    Open,
    Opening,
    Payload,
    PostTask,
    Reveal,
    RevealAll,
    SubmitClaims,
    TakeSeat,
    Trace,
    Transaction,
    Unsigned,
    reveal_commitment,
    sign,
)

START_MS = 1_700_000_000_000
STAKE = 1_000_000
BALANCE = 10_000_000
ONION_LAYERS = 2000
WORDS = 96
TOLERATED = 60
Sent = tuple[PrivateKey, Payload]


def key_of(index: int) -> PrivateKey:
    """Return the same key in every run."""
    return PrivateKey(digest("test key", index.to_bytes(4, "big")))


KEYS = [key_of(i) for i in range(14)]
ONIONS = {key.account: Onion(key.seed, ONION_LAYERS) for key in KEYS}


def genesis_of(validators: int = 6, others: int = 3, faucet: int = 0, **params: object) -> Genesis:
    """Return a network of equal stakes in which everybody has the same balance; no cell is audited twice by default."""
    return Genesis(
        b"test",
        START_MS,
        structs.replace(Params(), **{"reaudit_rate": 0, **params}),
        tuple(Allocation(key.account, BALANCE) for key in KEYS[: validators + others]),
        tuple(GenesisValidator(key.account, STAKE, ONIONS[key.account].tip) for key in KEYS[:validators]),
        faucet,
    )


def context_on(state: State, signers: Iterable[bytes] | None = None, seconds: int = 1) -> BlockContext:
    """Return the context of the next block, proposed by the validators in turn and signed by all of them."""
    members = [account for account, _ in state.validators().members]
    proposer, reveal = _proposal_of(state, members)
    signed = members if signers is None or not state.height else list(signers)
    return BlockContext(
        chain_id=state.chain.chain_id,
        height=state.height + 1,
        timestamp=state.chain.timestamp + 1000 * seconds,
        proposer=proposer,
        reveal=reveal,
        seed=next_seed(state.seed, reveal),
        parent_absent=tuple(account for account in members if account not in signed),
    )


def _proposal_of(state: State, members: list[bytes]) -> tuple[bytes, bytes]:
    """Return the next validator whose tip is of its own onion, with what it reveals."""
    for place in range(len(members)):
        proposer = members[(state.height + place) % len(members)]
        validator = state.validator(proposer)
        assert validator is not None
        try:
            return proposer, ONIONS[proposer].below(validator.onion_tip)
        except LookupError:
            continue
    raise LookupError("nobody can propose")


class Ledger:
    """A chain of states; every block is checked for conservation by counting everything."""

    def __init__(self, genesis: Genesis | None = None) -> None:
        self.genesis = genesis or genesis_of()
        self.state = genesis_state(self.genesis)
        self.events: list[Event] = []
        self.blocks: list[tuple[BlockContext, tuple[Transaction, ...], State, Executed]] = []

    def sign(self, key: PrivateKey, payload: Payload, ahead: int = 0, fee: int = 0) -> Transaction:
        """Return a transaction with the sender's next nonce, or one `ahead` of it."""
        nonce = self.state.account(key.account).nonce + ahead
        window = (self.state.height, self.state.height + 100)
        chain_id = self.genesis.chain_id
        return sign(key, Unsigned(1, chain_id, key.account, nonce, *window, fee, b"", payload))

    def block(self, *sent: Sent, signers: Iterable[bytes] | None = None) -> tuple[str, ...]:
        """Execute a block of these payloads; return the reasons of the receipts, empty where applied."""
        counts: dict[bytes, int] = {}
        transactions = []
        for key, payload in sent:
            ahead = counts.get(key.account, 0)
            counts[key.account] = ahead + 1
            transactions.append(self.sign(key, payload, ahead))
        return tuple(r.reason for r in self.execute(tuple(transactions), signers).receipts)

    def execute(self, transactions: tuple[Transaction, ...], signers: Iterable[bytes] | None = None) -> Executed:
        """Execute a block of signed transactions."""
        context = context_on(self.state, signers)
        executed = execute(self.state, context, transactions)
        self.blocks.append((context, transactions, self.state, executed))
        self.state = executed.state
        self.events.extend(executed.events)
        assert sum(holdings(self.state).values()) == self.genesis.issued
        return executed

    def one(self, key: PrivateKey, payload: Payload) -> str:
        """Execute a block of one payload; return its reason."""
        return self.block((key, payload))[0]

    def skip(self, blocks: int) -> None:
        """Execute empty blocks."""
        for _ in range(blocks):
            self.block()

    def kinds(self) -> list[str]:
        """Return the kinds of all events so far."""
        return [event.kind for event in self.events]

    def happened(self, kind: str) -> list[dict[str, object]]:
        """Return the data of all events of a kind."""
        return [event.data for event in self.events if event.kind == kind]


def sketch(key: bytes, deviation: float = 0.0) -> bytes:
    """Return the sketch under `key` of a result that deviates by `deviation` from the true one."""
    dice = random.Random(key)
    return struct.pack(f"<{WORDS}f", *(dice.choice((-1.0, 1.0)) * (1 + deviation) for _ in range(WORDS)))


def post_task(**changes: object) -> PostTask:
    """Return a task of 2 stages × 2 replicas, 4 cells a step, 8 steps, that every network accepts."""
    plain = PostTask(
        manifest=bytes(32),
        stages=2,
        replicas=2,
        steps=8,
        microbatches=4,
        price=10,
        escrow=0,
        worker_bond=1000,
        audit_rate=10_000,
        depth=4,
        lifetime=10_000,
        patience=0,
    )
    task = structs.replace(plain, **changes)
    return task if "escrow" in changes else structs.replace(task, escrow=least_escrow(task))


@dataclass
class Material:
    """What a worker keeps of a claimed cell to open it."""

    salt: bytes
    trace: Trace
    proof: tuple[bytes, ...]


@dataclass
class Swarm:
    """Workers and auditors that answer whatever they owe, honestly unless told otherwise.

    `deviation` is what an account's claimed results are off by, `lies` its re-executions; `silent` are
    the (account, kind of duty) that are never answered, `contradicts` who reports a contradiction,
    `misses` who reports data that is not given; `shows` are auditors that say to have been given other inputs than
    were opened, `believes` the voters who find so.
    """

    ledger: Ledger
    client: PrivateKey
    task: bytes
    deviation: dict[bytes, float] = field(default_factory=dict)
    step_deviation: dict[bytes, float] = field(default_factory=dict)
    """The same of openings of optimiser's steps."""
    lies: dict[bytes, float] = field(default_factory=dict)
    lies_in_steps: bool = True
    silent: set[tuple[bytes, str]] = field(default_factory=set)
    contradicts: set[bytes] = field(default_factory=set)
    misses: set[bytes] = field(default_factory=set)
    shows: set[bytes] = field(default_factory=set)
    believes: set[bytes] = field(default_factory=set)
    tolerates: set[bytes] = field(default_factory=set)
    """Who says that its own results are so unsteady that results of cells may be off by TOLERATED τ."""
    unlike: set[bytes] = field(default_factory=set)
    """Whose machines say that they are of another kernel class than the task."""
    claimed: set[tuple[int, int]] = field(default_factory=set)
    _material: dict[tuple[bytes, int, tuple[int, ...]], Material] = field(default_factory=dict)
    _pending: dict[tuple[bytes, bytes, int, bytes], Reveal] = field(default_factory=dict)

    @property
    def state(self) -> State:
        """The newest state."""
        return self.ledger.state

    @property
    def settled(self) -> int:
        """The newest settled step."""
        task = self.state.task(self.task)
        assert task is not None
        return task.settled

    def seated(self, stage: int) -> list[bytes]:
        """Return the workers of a stage."""
        return [w.account for w in self.state.workers(self.task) if w.is_seated and w.stage == stage]

    def claims(self, step: int) -> list[Sent]:
        """Return everybody's claims of one step: the cells dealt out among the stage's workers."""
        task = self.state.task(self.task)
        assert task is not None
        sent = []
        for stage in range(task.stages):
            workers = self.seated(stage)
            teams = max(1, len(workers) // task.redundancy)
            for place, account in enumerate(workers[: teams * task.redundancy]):
                cells = tuple(range(place % teams, task.microbatches, teams))
                if cells:
                    sent.append((by_account(account), SubmitClaims((self.claim(step, stage, cells),))))
        self.claimed.add((task.generation, step))
        return sent

    def claim(self, step: int, stage: int, cells: tuple[int, ...]) -> Claim:
        """Return a claim of these cells and keep what opens it."""
        task = self.state.task(self.task)
        assert task is not None
        leaves, kept = [], []
        for cell in (*cells, task.transition):
            place = bytes([task.generation, step, stage, cell])
            names = [digest("test content", place, name.encode()) for name in Trace.__struct_fields__]
            trace = structs.replace(Trace(*names), state=state_root(step - 1, stage))
            salt = digest("test salt", place)
            leaves.append(leaf(salt, trace))
            kept.append((cell, salt, trace))
        for index, (cell, salt, trace) in enumerate(kept):
            name = bytes([task.generation, step, stage]) + b"cell"
            whose = cells if cell == task.transition else ()
            self._material[name, cell, whose] = Material(salt, trace, prove(leaves, index))
        return Claim(
            self.task,
            task.generation,
            step,
            stage,
            cells,
            claim_root(leaves),
            state_root(step - 1, stage),
            state_root(step, stage),
        )

    def opening(self, audit: Audit, deviation: float = 0.0) -> Opening:
        """Return the opening of an audited cell."""
        name = bytes([audit.generation, audit.step, audit.stage]) + b"cell"
        task, record = self.state.task(self.task), self.state.claim(audit.claim)
        assert task is not None
        assert record is not None
        whose = record.claim.cells if audit.cell == task.transition else ()
        kept = self._material[name, audit.cell, whose]
        return Opening(audit.id, kept.salt, kept.trace, kept.proof, sketch(audit.key, deviation))

    def answers(self) -> list[Sent]:
        """Return the transactions of everybody who owes something and is not silent."""
        sent: list[Sent] = []
        for key in KEYS:
            for duty in self.state.duties(key.account):
                if (key.account, duty.kind) not in self.silent:
                    sent += [(key, self.answer(key, duty))]
        return sent

    def answer(self, key: PrivateKey, duty: Duty) -> Payload:
        """Return what a peer answers to one duty."""
        audit, task = self.state.audit(duty.audit), self.state.task(self.task)
        assert audit is not None
        assert task is not None
        is_step = audit.cell == task.transition
        if duty.kind == "open":
            apart = self.step_deviation if is_step else self.deviation
            return Open((self.opening(audit, apart.get(key.account, 0.0)),))
        off = 0.0 if is_step and not self.lies_in_steps else self.lies.get(key.account, 0.0)
        name = (key.account, duty.audit, duty.round, audit.key)
        if duty.kind == "commit":
            is_unlike = key.account in self.unlike and not is_step
            flags = key.account in self.contradicts, key.account in self.misses, is_unlike
            sketches = sketch(audit.key, off), sketch(duty.key, off)
            reveal = Reveal(duty.audit, duty.round, digest("salt", key.seed), *sketches, *flags)
            self._pending[name] = reveal
            return Commit((Commitment(duty.audit, duty.round, reveal_commitment(key.account, reveal)),))
        told = self._pending[name]
        return RevealAll((told if is_step else self._with_findings(told, key.account, audit),))

    def _with_findings(self, told: Reveal, account: bytes, audit: Audit) -> Reveal:
        """Return a reveal with what was found after the opening: a tolerance, inputs shown, or a word on them."""
        if account in self.tolerates:
            told = structs.replace(told, tolerance=(TOLERATED,) * 3)
        if not told.round and account in self.shows:
            return structs.replace(told, contradiction=True, shown=b"signed inputs")
        are_shown = audit.reveal is not None and bool(audit.reveal.shown)
        return structs.replace(told, misled=told.round == 2 and are_shown and account in self.believes)

    def work(self, blocks: int, last_step: int | None = None) -> None:
        """Train for some blocks: claim every step as early as the ring allows, answer every duty."""
        for _ in range(blocks):
            task = self.state.task(self.task)
            assert task is not None
            sent = self.answers()
            limit = task.steps if last_step is None else last_step
            newest = min(task.settled + task.depth, limit)
            if task.is_open:
                for step in range(task.settled + 1, newest + 1):
                    if (task.generation, step) not in self.claimed:
                        sent.extend(self.claims(step))
            self.ledger.block(*sent, signers=self.signers())

    def signers(self) -> Iterable[bytes] | None:
        """Return the validators that sign the next block; None for all."""
        return None

    def audits(self) -> list[Audit]:
        """Return all audits of the task."""
        return [audit for audit in self.state.active_audits() if audit.task == self.task]


def state_root(step: int, stage: int) -> bytes:
    """Return the agreed state root of a stage after a step."""
    return digest("test state", bytes([step, stage]))


def by_account(account: bytes) -> PrivateKey:
    """Return the key of an account."""
    return next(key for key in KEYS if key.account == account)


def start_swarm(
    ledger: Ledger | None = None, workers: Iterable[PrivateKey] = tuple(KEYS[:4]), **changes: object
) -> Swarm:
    """Return a running task, posted by the first key that is no validator."""
    ledger = ledger or Ledger()
    client = KEYS[len(ledger.genesis.validators)]
    before = {task.id for task in ledger.state.open_tasks()}
    assert ledger.one(client, post_task(**changes)) == ""
    (task,) = {task.id for task in ledger.state.open_tasks()} - before
    assert set(ledger.block(*((key, TakeSeat(task, bytes(32))) for key in workers))) == {""}
    ledger.skip(ledger.state.params.formation_blocks)
    assert ledger.state.task(task).state == "running"  # type: ignore[union-attr]
    return Swarm(ledger, client, task)
