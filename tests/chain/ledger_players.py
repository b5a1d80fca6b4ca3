"""Everybody who uses a ledger at once: tasks with their workers, auditors and voters, honest or not.

Blocks are executed through `chain.ledger.execute` and judged by the oracle. Signatures of transactions
are the caller's to check, so that here they are blank.
"""

import random
from dataclasses import dataclass, field

from msgspec import structs

from chain.blocks import Vote, VoteKind, vote_bytes
from chain.codec import encode
from chain.genesis import Genesis
from chain.hashing import digest
from chain.keys import PrivateKey
from chain.ledger import execute
from chain.state import State, Table, genesis_state
from chain.transactions import (
    Commit,
    Commitment,
    Evidence,
    Open,
    Payload,
    RenewLease,
    Reveal,
    RevealAll,
    RotateKey,
    SubmitClaims,
    TakeSeat,
    Transaction,
    Transfer,
    Unsigned,
)
from tests.chain import ledger_oracle as oracle
from tests.chain.ledger_kit import KEYS, Ledger, Sent, Swarm, context_on, genesis_of, post_task
from tests.chain.ledger_view import KEPT, Block, owner

FRAUD, SMALL = -2.0, 1e-4
QUICK = {
    "epoch_blocks": 4,
    "unbonding_blocks": 6,
    "jail_window": 8,
    "jail_missed": 4,
    "jail_blocks": 4,
    "faucet_grant": 500,
    "formation_blocks": 1,
    "claim_window": 5,
    "commit_window": 3,
    "open_window": 2,
    "reveal_window": 2,
    "vote_window": 3,
    "lease_blocks": 9,
    "absence_blocks": 5,
    "redraws": 1,
    "reaudit_rate": 3000,
    "newcomer_cells": 3,
    "history_blocks": 5,
    "max_drawn_cells": 5,
}
"""A network whose every period is short, so that a few dozen blocks see everything end."""
ROOM = 64
"""Bytes that a transaction may grow by while its fee stays enough."""
LIMIT = 8
"""Tasks that one run posts."""


def quick_genesis(fee: int = 0) -> Genesis:
    """Return a network of 5 validators and 3 other accounts with quick periods."""
    return genesis_of(validators=5, others=3, faucet=2000, min_fee_per_byte=fee, **QUICK)


@dataclass
class Players:
    """A network, its tasks and what everybody sends next."""

    genesis: Genesis
    ledger: Ledger = field(init=False)
    swarms: dict[bytes, Swarm] = field(default_factory=dict)
    waiting: list[Sent] = field(default_factory=list)
    lies: dict[bytes, float] = field(default_factory=dict)
    deviation: dict[bytes, float] = field(default_factory=dict)
    contradicts: set[bytes] = field(default_factory=set)
    misses: set[bytes] = field(default_factory=set)
    shows: set[bytes] = field(default_factory=set)
    believes: set[bytes] = field(default_factory=set)
    tolerates: set[bytes] = field(default_factory=set)
    silent: set[bytes] = field(default_factory=set)
    seen: set[str] = field(default_factory=set)
    """Kinds of events and reasons of refusals so far."""

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.genesis)
        self.ledger.state = genesis_state(self.genesis)

    @property
    def state(self) -> State:
        """The newest state."""
        return self.ledger.state

    def tasks(self) -> list[bytes]:
        """Return all tasks ever posted, oldest first."""
        return list(self.swarms)

    def send(self, key: PrivateKey, payload: Payload) -> None:
        """Let a payload be in the next block."""
        self.waiting.append((key, payload))

    def post(self, client: PrivateKey, spare: int = 0, **changes: object) -> None:
        """Post a small task with escrow for what it may cost, some of it done again, and some to spare."""
        if len(self.swarms) < LIMIT:
            plain: dict[str, object] = {"steps": 4, "microbatches": 2, "depth": 3, "lifetime": 40, "worker_bond": 200}
            task = post_task(**{**plain, **changes})
            self.send(client, structs.replace(task, escrow=3 * task.escrow + spare))

    def apply_all(self, keys: list[PrivateKey]) -> None:
        """Let these apply in every open task."""
        for task in self.state.open_tasks():
            for key in keys:
                if (worker := self.state.worker(task.id, key.account)) is None or not worker.is_present:
                    self.send(key, TakeSeat(task.id, bytes(32)))

    def renew_all(self) -> None:
        """Let everybody keep seats and applications whose lease is half over."""
        half = self.state.params.lease_blocks // 2
        for task in self.state.open_tasks():
            for worker in self.state.workers(task.id):
                if worker.is_present and worker.lease_until - self.state.height <= half:
                    self.waiting += [(key, RenewLease(task.id)) for key in KEYS if key.account == worker.account]

    def claim_all(self, steps: int) -> None:
        """Let everybody with a seat claim its cells of the next steps."""
        for task in self.state.open_tasks():
            swarm = self.swarms.get(task.id)
            if swarm is None or str(task.state) != "running":
                continue
            for step in range(task.settled + 1, min(task.settled + min(steps, task.depth), task.steps) + 1):
                if (task.generation, step) not in swarm.claimed:
                    self.waiting += [(key, sent) for key, sent in swarm.claims(step) if key.account not in self.silent]

    def claim_one(self, task: bytes, key: PrivateKey, step: int, cells: tuple[int, ...]) -> None:
        """Let one worker claim these cells of a step, whether it may or not."""
        worker = self.state.worker(task, key.account)
        stage = worker.stage if worker is not None and worker.stage >= 0 else 0
        own = self.swarms[task]
        probe = Swarm(self.ledger, own.client, task)
        claim = probe.claim(step, stage, cells)
        if all(name not in own._material for name in probe._material):
            own._material.update(probe._material)
        self.send(key, SubmitClaims((claim,)))

    def answer_all(self, dice: random.Random, share: float = 1.0) -> None:
        """Let a share of those who owe something answer, each by its character."""
        for key in KEYS:
            if key.account in self.silent:
                continue
            for duty in self.state.duties(key.account):
                audit = self.state.audit(duty.audit)
                assert audit is not None
                swarm = self.swarms[audit.task]
                swarm.deviation, swarm.lies, swarm.contradicts = self.deviation, self.lies, self.contradicts
                swarm.step_deviation = self.deviation
                swarm.misses, swarm.shows, swarm.believes = self.misses, self.shows, self.believes
                swarm.tolerates = self.tolerates
                name = (key.account, duty.audit, duty.round, audit.key)
                if dice.random() < share and (duty.kind != "reveal" or name in swarm._pending):
                    self.send(key, swarm.answer(key, duty))

    def answer_falsely(self, dice: random.Random) -> None:
        """Let some who owe something send what their claim or commitment does not bear out."""
        for key in KEYS:
            for duty in self.state.duties(key.account)[:2]:
                audit = self.state.audit(duty.audit)
                assert audit is not None
                noise = dice.randbytes(32)
                blank = Reveal(duty.audit, duty.round, noise, bytes(384), bytes(384), False, False)
                match duty.kind:
                    case "commit":
                        self.send(key, Commit((Commitment(duty.audit, duty.round, noise),)))
                    case "open":
                        opening = self.swarms[audit.task].opening(audit)
                        self.send(key, Open((structs.replace(opening, salt=noise),)))
                    case _:
                        self.send(key, RevealAll((blank,)))

    def evidence(self, key: PrivateKey, view: int, is_real: bool) -> Evidence:
        """Return two votes of a validator that conflict, or the same vote twice."""
        votes = []
        for side in (b"a", b"b" if is_real else b"a"):
            height = max(1, self.state.height - view)
            named = (VoteKind.NOTARIZE, self.genesis.chain_id, height, view, digest("block", side))
            votes.append(encode(Vote(*named, key.account, key.sign(vote_bytes(*named)))))
        return Evidence(*votes)

    def block(self, absent: frozenset[bytes] = frozenset(), limit: int = 200) -> Block:
        """Execute a block of what waits, check it, and check that it comes out the same again."""
        sent, self.waiting = self.waiting[:limit], self.waiting[limit:]
        transactions = self._signed(sent)
        state = self.state
        members = state.validators().powers
        context = context_on(state, [account for account in members if account not in absent])
        executed = execute(state, context, transactions)
        block = Block(state, context, transactions, executed)
        oracle.check(block)
        again = execute(state, context, transactions)
        assert (again.state.root, again.receipts, again.events) == (
            executed.state.root, executed.receipts, executed.events,
        )  # fmt: skip
        self._check_refusals(block)
        self._adopt(block)
        return block

    def _signed(self, sent: list[Sent]) -> tuple[Transaction, ...]:
        nonces: dict[bytes, int] = {}
        left: dict[bytes, int] = {}
        found = []
        fee_per_byte = self.state.params.min_fee_per_byte
        for key, payload in sent:
            record = self.state.account(key.account)
            nonce = nonces.get(key.account, record.nonce)
            window = (self.state.height, self.state.height + 9)
            body = Unsigned(1, self.genesis.chain_id, key.account, nonce, *window, 0, b"", payload)
            size = len(encode(Transaction(body, bytes(64)))) + ROOM
            fee = fee_per_byte * size
            if fee > left.get(key.account, record.balance) or owner(self.state, key.account) != key.account:
                continue
            spent = getattr(payload, "amount", getattr(payload, "escrow", isinstance(payload, RotateKey)))
            left[key.account] = 0 if fee_per_byte and spent else left.get(key.account, record.balance) - fee
            found.append(Transaction(structs.replace(body, fee=fee), bytes(64)))
            nonces[key.account] = nonce + 1
        return tuple(found)

    def _check_refusals(self, block: Block) -> None:
        """A refused payload has the effect of any other refused payload: none."""
        receipts = block.executed.receipts
        if all(not receipt.reason for receipt in receipts):
            return
        nothing = Transfer(bytes(32), 0)
        replaced = [
            structs.replace(t, body=structs.replace(t.body, payload=nothing, fee=t.body.fee)) if receipt.reason else t
            for t, receipt in zip(block.transactions, receipts, strict=True)
        ]
        other = execute(block.before, block.context, replaced)
        assert other.state.root == block.after.root, [r.reason for r in receipts if r.reason]

    def _adopt(self, block: Block) -> None:
        self.ledger.state = block.after
        self.seen.update(event.kind for event in block.executed.events)
        self.seen.update(receipt.reason for receipt in block.executed.receipts if receipt.reason)
        for task in self.state.tables[Table.TASKS].values():
            if task.id not in self.swarms:
                client = next(key for key in KEYS if key.account == task.client)
                self.swarms[task.id] = Swarm(self.ledger, client, task.id)

    def wind_down(self, blocks: int = 60) -> None:
        """Let time pass until nothing is due; then check that the state is small."""
        self.waiting.clear()
        for _ in range(blocks):
            self.block()
        tables = self.state.tables
        left = {table.name: len(tables[table]) for table in _PASSING if tables[table]}
        assert left == {}, f"left in the state for good: {left}"
        kept = {str(audit.state) for audit in tables[Table.AUDITS].values()}
        assert kept <= KEPT, f"ended audits that nobody needs stay: {kept}"


_PASSING = (Table.STEPS, Table.CLAIMS, Table.QUEUE, Table.ACTIVE, Table.OPEN, Table.ENDED)
