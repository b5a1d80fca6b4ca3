"""The working copy that the rules write on: accounts moved, events noted, value conserved."""

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from msgspec.structs import replace

from chain.blocks import ValidatorSet
from chain.duties import parties
from chain.hashing import digest
from chain.keys import peer_id
from chain.params import Params
from chain.reasons import Reason, Refused
from chain.records import (
    Account,
    Audit,
    AuditStatus,
    Chain,
    ClaimRecord,
    Task,
    Unbonding,
    Validator,
    Worker,
    heir,
    status_of,
)
from chain.state import Draft, Marker, Table

EVIDENCE = (AuditStatus.CONVICTED, AuditStatus.WITHHELD, AuditStatus.FAULTED, AuditStatus.REFUTED)
"""Ends of audits that a conviction may rest on: they stay."""
_SUMMONING = (AuditStatus.OPINION, AuditStatus.VOTING)
_ONLY = b""


@dataclass(frozen=True)
class Event:
    """Something that a block did, for people and queries; not part of the state."""

    kind: str
    data: dict[str, Any]


class Book:
    """A draft of the state at the height of the block being executed."""

    def __init__(
        self, draft: Draft, height: int, seed: bytes, validators: ValidatorSet, touched: set[bytes] | None = None
    ) -> None:
        self.draft = draft
        self.height = height
        self.seed = seed
        self.validators = validators
        self.touched = set() if touched is None else touched
        """Tasks to look at after the transactions of this block."""
        self.params: Params = draft.get(Table.PARAMS, _ONLY)

    def fork(self) -> "Book":
        """Return a book whose changes can be thrown away."""
        return Book(self.draft.fork(), self.height, self.seed, self.validators, self.touched)

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

    def heir(self, account: bytes) -> bytes:
        """Return the account that answers for `account` now: itself, or the last successor of its key."""
        return heir(partial(self.draft.get, Table.ROTATIONS), account)

    def credit(self, account: bytes, amount: int) -> None:
        """Add to a balance, to that of the heir where the account's key was rotated."""
        account = self.heir(account)
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
        self.weaken(account, taken)
        return taken

    def release(self, account: bytes, amount: int, height: int) -> None:
        """Let stake that is bonded no more be withdrawn from a height on."""
        key = account + height.to_bytes(8, "big")
        before: Unbonding | None = self.draft.get(Table.UNBONDINGS, key)
        self.draft.put(Table.UNBONDINGS, key, Unbonding(amount + (before.amount if before else 0), height))

    def weaken(self, account: bytes, lost: int) -> None:
        """Take slashed stake out of a validator's power at once, unless nobody would be left."""
        known: Validator | None = self.draft.get(Table.VALIDATORS, account)
        if known is not None and known.power and lost:
            least = 0 if self.has_other_validator(account) else 1
            self.draft.put(Table.VALIDATORS, account, replace(known, power=max(least, known.power - lost)))

    def burn(self, amount: int) -> None:
        """Count an amount, taken from somewhere, as burned."""
        if amount:
            self.set_chain(burned=self.chain.burned + amount)

    def has_other_validator(self, account: bytes) -> bool:
        """Whether somebody else than `account` can validate the next block."""
        return any(
            validator.is_able and validator.power and self.account(other).bonded >= self.params.min_stake
            for other in self.validators.powers
            if other != account and (validator := self.draft.get(Table.VALIDATORS, other))
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
        """Change a worker and return it; a change of its status or of what it owes lets the task be looked at."""
        changed = replace(worker, **changes)
        self.draft.put(Table.WORKERS, worker.task + worker.account, changed)
        if (changed.status, changed.engaged) != (worker.status, worker.engaged):
            self.touched.add(worker.task)
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
        if state in _SUMMONING:
            self.draft.summoned |= parties(changed)
        if changed.deadline != audit.deadline or not changed.is_active:
            self.draft.delete(Table.WAKE, place_at(audit.deadline + 1, Table.AUDITS, audit.id))
        if changed.deadline != audit.deadline and changed.is_active:
            self.wake(changed.deadline + 1, Table.AUDITS, audit.id)
        was_listed = self.draft.get(Table.ACTIVE, audit.id) is not None
        if was_listed and not changed.is_active:
            self.draft.delete(Table.ACTIVE, audit.id)
        if state is not None and not changed.is_active and state not in EVIDENCE:
            self.retire(Table.AUDITS, audit.id)
        return changed

    def retire(self, table: Table, key: bytes) -> None:
        """Let an ended record leave the state after the blocks of history."""
        self.draft.put(Table.ENDED, place_at(self.height + self.params.history_blocks, table, key), Marker())

    def wake(self, height: int, table: Table, key: bytes) -> None:
        """Let a task or an audit be looked at after the transactions of a later block."""
        self.draft.put(Table.WAKE, place_at(height, table, key), Marker())

    def engage(self, task: bytes, account: bytes, change: int) -> None:
        """Count claims and audits of a worker that are not over."""
        worker = self.worker(task, account)
        assert worker is not None  # only a worker's claims are taken
        self.set_worker(worker, engaged=worker.engaged + change)

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


def place_at(height: int, table: Table, key: bytes) -> bytes:
    """Return the key under which a record waits for `height`."""
    return height.to_bytes(32, "big") + bytes([table]) + key


def step_key(task: bytes, generation: int, step: int) -> bytes:
    """Return the key of a step's progress."""
    return task + generation.to_bytes(4, "big") + step.to_bytes(8, "big")


def audit_id(record: ClaimRecord, cell: int) -> bytes:
    """Return the 32-byte id of the audit of a claimed cell."""
    return digest("audit", record.id, cell.to_bytes(4, "big"))


def second_id(audit: bytes) -> bytes:
    """Return the 32-byte id of the second audit of the cell of an audit."""
    return digest("second audit", audit)


@lru_cache(maxsize=4096)
def name(account: bytes) -> str:
    """Return an account as events name it."""
    return peer_id(account)
