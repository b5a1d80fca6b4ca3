"""The working copy that the rules write on: accounts moved, events noted, value conserved."""

from dataclasses import dataclass
from typing import Any

from msgspec.structs import replace

from chain.blocks import ValidatorSet
from chain.keys import peer_id
from chain.params import Params
from chain.reasons import Reason, Refused
from chain.records import Account, Audit, AuditStatus, Chain, ClaimRecord, Task, Unbonding, Worker, status_of
from chain.state import Draft, Marker, Table

EVIDENCE = (AuditStatus.CONVICTED, AuditStatus.WITHHELD)
"""Ends of audits that a conviction may rest on: they stay."""
_ONLY = b""


@dataclass(frozen=True)
class Event:
    """Something that a block did, for people and queries; not part of the state."""

    kind: str
    data: dict[str, Any]


class Book:
    """A draft of the state at the height of the block being executed."""

    def __init__(self, draft: Draft, height: int, seed: bytes, validators: ValidatorSet) -> None:
        self.draft = draft
        self.height = height
        self.seed = seed
        self.validators = validators
        self.params: Params = draft.get(Table.PARAMS, _ONLY)

    def fork(self) -> "Book":
        """Return a book whose changes can be thrown away."""
        return Book(self.draft.fork(), self.height, self.seed, self.validators)

    def merge(self, fork: "Book") -> None:
        """Take over a fork's changes."""
        self.draft.merge(fork.draft)

    def note(self, kind: str, **data: Any) -> None:
        """Record an event: accounts as peer ids, other bytes as hex, amounts as strings where named so."""
        self.draft.events.append(Event(kind, data))

    @property
    def chain(self) -> Chain:
        """The chain's own record."""
        return self.draft.get(Table.CHAIN, _ONLY)

    def set_chain(self, **changes: Any) -> None:
        """Change the chain's own record."""
        self.draft.put(Table.CHAIN, _ONLY, replace(self.chain, **changes))

    def account(self, account: bytes) -> Account:
        """Return an account, empty if new."""
        return self.draft.get(Table.ACCOUNTS, account) or Account()

    def set_account(self, account: bytes, **changes: Any) -> None:
        """Change an account."""
        self.draft.put(Table.ACCOUNTS, account, replace(self.account(account), **changes))

    def credit(self, account: bytes, amount: int) -> None:
        """Add to a balance."""
        self.set_account(account, balance=self.account(account).balance + amount)

    def debit(self, account: bytes, amount: int) -> None:
        """Take from a balance; raise `Refused`."""
        balance = self.account(account).balance
        if balance < amount:
            raise Refused(Reason.NO_FUNDS)
        self.set_account(account, balance=balance - amount)

    def seize(self, account: bytes, amount: int) -> int:
        """Take up to `amount` of an account's stake, also of what is on its way out; return what was there."""
        taken = min(amount, self.account(account).bonded)
        self.set_account(account, bonded=self.account(account).bonded - taken)
        for key, leaving in self.draft.items(Table.UNBONDINGS, account):
            part = min(amount - taken, leaving.amount if leaving.release_at > self.height else 0)
            if part == leaving.amount:
                self.draft.delete(Table.UNBONDINGS, key)
            elif part:
                self.draft.put(Table.UNBONDINGS, key, replace(leaving, amount=leaving.amount - part))
            taken += part
        return taken

    def burn(self, amount: int) -> None:
        """Count an amount, taken from somewhere, as burned."""
        if amount:
            self.set_chain(burned=self.chain.burned + amount)

    def has_other_validator(self, account: bytes) -> bool:
        """Whether somebody else than `account` can validate the next block."""
        return any(
            validator.is_able and self.account(other).bonded >= self.params.min_stake
            for other, validator in self.draft.items(Table.VALIDATORS)
            if other != account
        )

    def task(self, task: bytes) -> Task:
        """Return a task; raise `Refused`."""
        found: Task | None = self.draft.get(Table.TASKS, task)
        if found is None:
            raise Refused(Reason.UNKNOWN_TASK)
        return found

    def open_task(self, task: bytes) -> Task:
        """Return a task that is not closed; raise `Refused`."""
        found = self.task(task)
        if not found.is_open or found.deadline < self.height:
            raise Refused(Reason.TASK_CLOSED)
        return found

    def reserve(self, task: bytes, cells: int) -> None:
        """Set aside, or with a negative number set free, the price of this many cells of a task's escrow."""
        found = self.task(task)
        self.set_task(found, reserved=found.reserved + cells * found.price)

    def set_task(self, task: Task, **changes: Any) -> Task:
        """Change a task and return it."""
        changed = replace(task, **changes)
        self.draft.put(Table.TASKS, task.id, changed)
        return changed

    def worker(self, task: bytes, account: bytes) -> Worker | None:
        """Return an applicant or worker."""
        return self.draft.get(Table.WORKERS, task + account)

    def workers(self, task: bytes) -> list[Worker]:
        """Return all applicants and workers of a task, by account."""
        return [worker for _, worker in self.draft.items(Table.WORKERS, task)]

    def set_worker(self, worker: Worker, **changes: Any) -> Worker:
        """Change a worker and return it."""
        changed = replace(worker, **changes)
        self.draft.put(Table.WORKERS, worker.task + worker.account, changed)
        return changed

    def claim(self, claim: bytes) -> ClaimRecord:
        """Return a claim that exists."""
        return self.draft.get(Table.CLAIMS, claim)

    def set_claim(self, claim: ClaimRecord, **changes: Any) -> ClaimRecord:
        """Change a claim and return it."""
        changed = replace(claim, **changes)
        self.draft.put(Table.CLAIMS, claim.id, changed)
        return changed

    def set_audit(self, audit: Audit, state: AuditStatus | None = None, **changes: Any) -> Audit:
        """Change an audit, its state too, and return it; it is active exactly while it says so."""
        if state is not None:
            changes["status"] = status_of(AuditStatus, state)
        changed = replace(audit, **changes)
        self.draft.put(Table.AUDITS, audit.id, changed)
        was_listed = self.draft.get(Table.ACTIVE, audit.id) is not None
        if was_listed and not changed.is_active:
            self.draft.delete(Table.ACTIVE, audit.id)
        if state is not None and not changed.is_active and state not in EVIDENCE:
            self.retire(Table.AUDITS, audit.id)
        return changed

    def retire(self, table: Table, key: bytes) -> None:
        """Let an ended record leave the state after the blocks of history."""
        self.draft.put(Table.ENDED, retirement(self.height + self.params.history_blocks, table, key), Marker())

    def active_audits(self, task: bytes | None = None) -> list[Audit]:
        """Return the audits, of one task or of all, in which somebody owes something, by id."""
        found = (self.draft.get(Table.AUDITS, identity) for identity, _ in self.draft.items(Table.ACTIVE))
        return [audit for audit in found if task in (None, audit.task)]

    def holding(self, record: Any) -> int:
        """Return the base units that a record holds."""
        match record:
            case Account():
                return record.balance + record.bonded
            case Unbonding():
                return record.amount
            case Task():
                return record.escrow
            case Worker():
                return record.bond + record.withheld
            case Chain():
                return record.burned + record.faucet
            case _:
                return 0


def retirement(height: int, table: Table, key: bytes) -> bytes:
    """Return the key under which a record waits to leave the state at `height`."""
    return height.to_bytes(32, "big") + bytes([table]) + key


def name(account: bytes) -> str:
    """Return an account as events name it."""
    return peer_id(account)
