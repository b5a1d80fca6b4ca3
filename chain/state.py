"""The ledger's state: immutable tables of records under one Merkle root, and drafts that change them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Any

from blake3 import blake3

from chain.blocks import ValidatorSet
from chain.codec import Record, decode, encode
from chain.duties import Duty, duties_of, parties
from chain.genesis import Genesis, check
from chain.hashing import digest
from chain.params import Params
from chain.records import (
    Account,
    Audit,
    Chain,
    ClaimRecord,
    Conviction,
    Rotation,
    StepProgress,
    Task,
    Unbonding,
    Validator,
    Worker,
    heir,
    is_closed,
)
from chain.tree import SparseTree, TreeProof

__all__ = ["Account", "Audit", "Draft", "Duty", "State", "Table", "Task", "Worker", "genesis_state"]


class Table(IntEnum):
    """The tables, each a map from a key of bytes to a record."""

    CHAIN = 0
    PARAMS = 1
    ACCOUNTS = 2
    VALIDATORS = 3
    UNBONDINGS = 4
    TASKS = 5
    WORKERS = 6
    STEPS = 7
    CLAIMS = 8
    AUDITS = 9
    CONVICTIONS = 10
    QUEUE = 11
    """Claims waiting for their draw, by height and claim id."""
    ACTIVE = 12
    """Ids of audits in which somebody owes something."""
    OPEN = 13
    """Ids of tasks that are not closed, or that still hold bonds."""
    ENDED = 14
    """Audits and claims that leave the state, by height, table and id."""
    WAKE = 15
    """Tasks and audits to look at, by height, table and id."""
    JOBS = 16
    """Tasks that an account works or applied in and that are watched, by account and task."""
    ROTATIONS = 17


class Marker(Record, frozen=True):
    """A record of presence."""


KINDS: dict[Table, type[Record]] = {
    Table.CHAIN: Chain,
    Table.PARAMS: Params,
    Table.ACCOUNTS: Account,
    Table.VALIDATORS: Validator,
    Table.UNBONDINGS: Unbonding,
    Table.TASKS: Task,
    Table.WORKERS: Worker,
    Table.STEPS: StepProgress,
    Table.CLAIMS: ClaimRecord,
    Table.AUDITS: Audit,
    Table.CONVICTIONS: Conviction,
    Table.QUEUE: Marker,
    Table.ACTIVE: Marker,
    Table.OPEN: Marker,
    Table.ENDED: Marker,
    Table.WAKE: Marker,
    Table.JOBS: Marker,
    Table.ROTATIONS: Rotation,
}
_ONLY = b""
PREFIX = 32
"""Bytes of the task, account or height that the keys of some tables begin with."""


Changes = dict[Table, dict[bytes, Any]]
"""Records set, or None for those removed, by table and key."""


class Rows(dict[bytes, Any]):
    """One table: records by key, and the keys grouped by their first 32 bytes."""

    @cached_property
    def groups(self) -> dict[bytes, dict[bytes, None]]:
        """Keys by prefix; made on first use, so only from a table that no longer changes."""
        found: dict[bytes, dict[bytes, None]] = {}
        for key in self:
            found.setdefault(key[:PREFIX], {})[key] = None
        return found

    def changed(self, changes: Mapping[bytes, Any]) -> "Rows":
        """Return the table with records set, or removed where None; groups are taken over, not made again."""
        rows = Rows(self)
        for key, record in changes.items():
            if record is None:
                rows.pop(key, None)
            else:
                rows[key] = record
        if "groups" in self.__dict__:
            rows.groups = _regrouped(self.groups, changes)
        return rows

    def starting(self, prefix: bytes) -> Iterator[tuple[bytes, Any]]:
        """Yield the rows whose keys start with `prefix`, empty or of 32 bytes, in no order."""
        return iter(self.items()) if not prefix else ((key, self[key]) for key in self.groups.get(prefix, ()))


def _regrouped(groups: dict[bytes, dict[bytes, None]], changes: Mapping[bytes, Any]) -> dict[bytes, dict[bytes, None]]:
    """Return new groups after changes; those without changes are shared."""
    found = dict(groups)
    copied: set[bytes] = set()
    for key, record in changes.items():
        prefix = key[:PREFIX]
        if prefix not in copied:
            copied.add(prefix)
            found[prefix] = dict(found.get(prefix, {}))
        if record is None:
            found[prefix].pop(key, None)
        else:
            found[prefix][key] = None
    for prefix in copied:
        if not found[prefix]:
            del found[prefix]
    return found


@dataclass(frozen=True)
class State:
    """The state after one block."""

    tables: dict[Table, Rows]
    tree: SparseTree

    @property
    def root(self) -> bytes:
        """The 32-byte state root."""
        return self.tree.root

    @property
    def chain(self) -> Chain:
        """What the ledger knows of the chain."""
        return self.tables[Table.CHAIN][_ONLY]

    @property
    def params(self) -> Params:
        """The parameters in force."""
        return self.tables[Table.PARAMS][_ONLY]

    @property
    def height(self) -> int:
        """Height of the block whose post-state this is; 0 at genesis."""
        return self.chain.height

    @property
    def seed(self) -> bytes:
        """The beacon's seed."""
        return self.chain.seed

    @property
    def leader_seed(self) -> bytes:
        """The seed that the next height's leaders are drawn from."""
        return self.chain.leader_seed

    def account(self, account: bytes) -> Account:
        """Return an account, empty if it was never used."""
        return self.tables[Table.ACCOUNTS].get(account, Account())

    def validator(self, account: bytes) -> Validator | None:
        """Return a registered validator."""
        return self.tables[Table.VALIDATORS].get(account)

    def heir(self, account: bytes) -> bytes:
        """Return the account that answers for `account` now: itself, or the last successor of its key."""
        return heir(self.tables[Table.ROTATIONS].get, account)

    def is_closed(self, account: bytes) -> bool:
        """Whether the account's key was rotated."""
        return is_closed(self.tables[Table.ROTATIONS].get(account))

    @cached_property
    def obliged(self) -> frozenset[bytes]:
        """Clients of watched tasks and parties of open audits: accounts that others wait for, or will pay."""
        clients = {self.tables[Table.TASKS][task].client for task in self.tables[Table.OPEN]}
        audits = self.tables[Table.AUDITS]
        return frozenset(clients.union(*(parties(audits[audit]) for audit in self.tables[Table.ACTIVE])))

    @cached_property
    def _validators(self) -> ValidatorSet:
        return ValidatorSet.of((key, row.power) for key, row in self.tables[Table.VALIDATORS].items() if row.power)

    def validators(self) -> ValidatorSet:
        """Return the validators of the next height: those with power, at most `blocks.MAX_VALIDATORS`."""
        return self._validators

    def task(self, task: bytes) -> Task | None:
        """Return a task."""
        return self.tables[Table.TASKS].get(task)

    def open_tasks(self) -> tuple[Task, ...]:
        """Return the tasks that are not closed."""
        return tuple(task for key in sorted(self.tables[Table.OPEN]) if (task := self.tables[Table.TASKS][key]).is_open)

    def workers(self, task: bytes) -> tuple[Worker, ...]:
        """Return the applicants and workers of a task, also those who left, by account."""
        return tuple(worker for _, worker in sorted(self.tables[Table.WORKERS].starting(task)))

    def worker(self, task: bytes, account: bytes) -> Worker | None:
        """Return one applicant or worker of a task."""
        return self.tables[Table.WORKERS].get(task + account)

    def claim(self, claim: bytes) -> ClaimRecord | None:
        """Return a claim by id."""
        return self.tables[Table.CLAIMS].get(claim)

    def audit(self, audit: bytes) -> Audit | None:
        """Return an audit by id."""
        return self.tables[Table.AUDITS].get(audit)

    def audits_of(self, task: bytes) -> Iterator[Audit]:
        """Yield the audits of a task that are in the state."""
        return (audit for audit in self.tables[Table.AUDITS].values() if audit.task == task)

    def active_audits(self) -> Iterator[Audit]:
        """Yield the audits in which somebody owes something, by id."""
        return (self.tables[Table.AUDITS][audit] for audit in sorted(self.tables[Table.ACTIVE]))

    def duties(self, account: bytes) -> tuple[Duty, ...]:
        """Return what `account` owes now; who was convicted judges nobody any more."""
        owed = (duty for audit in self.active_audits() for duty in duties_of(audit, account))
        return tuple(duty for duty in owed if duty.kind == "open" or not self.account(account).barred)

    def is_busy(self) -> bool:
        """Whether blocks are due at full rate: draws, audits, seats to fill or steps to settle."""
        if self.tables[Table.QUEUE] or self.tables[Table.ACTIVE] or self.tables[Table.STEPS]:
            return True
        soon = range(self.height + 1, self.height + self.params.formation_blocks + 1)
        woken = (self.tables[Table.WAKE].groups.get(height.to_bytes(PREFIX, "big"), ()) for height in soon)
        return any(key[PREFIX + 1 :] in self.tables[Table.OPEN] for keys in woken for key in keys)

    def is_participant(self, account: bytes) -> bool:
        """Whether an account may owe something: it has stake, or works or worked in an open task."""
        return self.account(account).bonded > 0 or account in self.tables[Table.JOBS].groups

    def prove(self, table: Table, key: bytes) -> TreeProof:
        """Return the proof that a record is, or is not, in the state."""
        return self.tree.prove(state_key(table, key))


def state_key(table: Table, key: bytes) -> bytes:
    """Return the 32-byte tree key of a record."""
    return digest("state key", bytes([table]), key)


def value_hash(record: Record) -> bytes:
    """Return the 32-byte hash of a record that the tree holds."""
    return blake3(encode(record)).digest()


def decode_record(table: Table, data: bytes) -> Record:
    """Return the record of `table` that `data` encodes; raise `DecodeError`."""
    return decode(KINDS[table], data)


class Draft:
    """A changing copy of a state; `fork` makes a nested one that is merged or thrown away."""

    def __init__(self, base: "State | Draft") -> None:
        self._base = base
        self.summoned: set[bytes] = base.summoned if isinstance(base, Draft) else set()
        """Accounts that others have begun to wait for since the state, also in forks that were thrown away."""
        self.changes: Changes = {}
        self._groups: dict[tuple[Table, bytes], dict[bytes, None]] = {}
        """Changed keys by table and prefix."""
        self.events: list[Any] = []

    def get(self, table: Table, key: bytes) -> Any:
        """Return a record or None."""
        changed = self.changes.get(table)
        if changed is not None and key in changed:
            return changed[key]
        if isinstance(self._base, Draft):
            return self._base.get(table, key)
        return self._base.tables[table].get(key)

    def put(self, table: Table, key: bytes, record: Record | None) -> None:
        """Set a record, or remove it where None."""
        changed = self.changes.setdefault(table, {})
        if key not in changed:
            self._groups.setdefault((table, key[:PREFIX]), {})[key] = None
        changed[key] = record

    def delete(self, table: Table, key: bytes) -> None:
        """Remove a record."""
        self.put(table, key, None)

    def items(self, table: Table, prefix: bytes = b"") -> list[tuple[bytes, Any]]:
        """Return the records whose keys start with `prefix`, empty or of 32 bytes, in order of keys."""
        found: dict[bytes, Any] = {}
        self._collect(table, prefix, found)
        return sorted((key, record) for key, record in found.items() if record is not None)

    def _collect(self, table: Table, prefix: bytes, found: dict[bytes, Any]) -> None:
        if isinstance(self._base, Draft):
            self._base._collect(table, prefix, found)
        else:
            found.update(self._base.tables[table].starting(prefix))
        changed = self.changes.get(table, {})
        keys = self._groups.get((table, prefix), ()) if prefix else changed
        found.update((key, changed[key]) for key in keys)

    @property
    def origin(self) -> State:
        """The state that it all stands on."""
        return self._base.origin if isinstance(self._base, Draft) else self._base

    def fork(self) -> "Draft":
        """Return a draft on top of this one."""
        return Draft(self)

    def merge(self, fork: "Draft") -> None:
        """Take over the changes and events of a fork."""
        for table, changed in fork.changes.items():
            self.changes.setdefault(table, {}).update(changed)
        for place, keys in fork._groups.items():
            self._groups.setdefault(place, {}).update(keys)
        self.events.extend(fork.events)

    def freeze(self, state: State) -> State:
        """Return `state` with the changes of this draft, which must stand directly on it."""
        tables = dict(state.tables)
        updates: dict[bytes, bytes | None] = {}
        for table, changed in self.changes.items():
            tables[table] = tables[table].changed(changed)
            for key, record in changed.items():
                updates[state_key(table, key)] = None if record is None else value_hash(record)
        frozen = State(tables, state.tree.update(updates))
        moved = self.changes.get(Table.VALIDATORS, {}).items()
        if all(getattr(row, "power", 0) == getattr(state.validator(key), "power", 0) for key, row in moved):
            frozen.__dict__["_validators"] = state.validators()  # the same set keeps its digest, too
        return frozen


def empty_state() -> State:
    """Return the state without any record."""
    return State({table: Rows() for table in Table}, SparseTree())


def genesis_state(genesis: Genesis) -> State:
    """Return the state before the first block; raise `ValueError` for an impossible genesis."""
    check(genesis)
    draft = Draft(empty_state())
    seed = digest("genesis seed", genesis.chain_id)
    chain = Chain(genesis.chain_id, 0, genesis.timestamp, seed, seed, seed, genesis.issued, 0, genesis.faucet)
    draft.put(Table.CHAIN, _ONLY, chain)
    draft.put(Table.PARAMS, _ONLY, genesis.params)
    balances: dict[bytes, int] = {}
    for allocation in genesis.accounts:
        balances[allocation.account] = balances.get(allocation.account, 0) + allocation.amount
    stakes = {validator.account: validator.stake for validator in genesis.validators}
    for account in sorted(balances.keys() | stakes.keys()):
        draft.put(Table.ACCOUNTS, account, Account(balances.get(account, 0), bonded=stakes.get(account, 0)))
    for validator in genesis.validators:
        power = validator.stake if validator.stake >= genesis.params.min_stake else 0
        draft.put(Table.VALIDATORS, validator.account, Validator(validator.onion_tip, 0, power))
    return draft.freeze(empty_state())


def holdings(state: State) -> dict[str, int]:
    """Return where all base units are; the sum is what was issued."""
    tables = state.tables
    return {
        "balances": sum(account.balance for account in tables[Table.ACCOUNTS].values()),
        "bonded": sum(account.bonded for account in tables[Table.ACCOUNTS].values()),
        "unbonding": sum(record.amount for record in tables[Table.UNBONDINGS].values()),
        "escrow": sum(task.escrow for task in tables[Table.TASKS].values()),
        "worker_bonds": sum(worker.bond for worker in tables[Table.WORKERS].values()),
        "withheld": sum(worker.withheld for worker in tables[Table.WORKERS].values()),
        "faucet": state.chain.faucet,
        "burned": state.chain.burned,
    }
