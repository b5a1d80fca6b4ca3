"""`chain.db`: one SQLite transaction a height for block, certificate, state, receipts and events."""

import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from chain.blocks import Block, Certificate, ValidatorSet
from chain.codec import Record, decode, encode
from chain.genesis import Genesis
from chain.ledger import Event, Executed, Receipt
from chain.state import (
    Changes,
    State,
    Table,
    decode_record,
    empty_state,
    genesis_state,
    state_key,
    value_hash,
)
from chain.store_schema import StoreCorrupt, check_schema, corrupt, create, damage_named, migrate
from chain.transactions import Evidence

__all__ = ["LEAST_KEPT", "Store", "StoreCorrupt"]

UNDO_HEIGHTS = 1000
"""Heights below the tip whose states can be rebuilt."""
LEAST_KEPT = 1000
"""Blocks that every store keeps: peers that fall behind a little, proofs and evidence need the newest ones."""
PRUNE_EVERY = 16
PRUNE_SLICE = 64
"""Blocks deleted at once: faster than they come, and never a long wait."""
_ARCHIVED = (Table.AUDITS, Table.CLAIMS)


class Store:
    """One open chain database; use it from one thread at a time.

    Every method that reads raises `StoreCorrupt` for damage; a full or failing disk raises
    `sqlite3.OperationalError`.
    """

    def __init__(self, connection: sqlite3.Connection, path: Path, genesis: Genesis) -> None:
        self.keep = 0
        """Newest blocks that are kept, 0 for all; set before the first commit."""
        self._db = connection
        self._path = path
        self.genesis = genesis

    @classmethod
    def open(cls, path: Path, genesis: Genesis) -> "Store":
        """Open or create `path` for writing."""
        with damage_named(path):
            connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            try:
                connection.execute("PRAGMA journal_mode=WAL")
                connection.execute("PRAGMA synchronous=FULL")
                if not connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]:
                    create(connection, genesis)
                migrate(connection)
                return cls(connection, path, check_schema(connection, path, genesis))
            except BaseException:
                connection.close()
                raise

    @classmethod
    def open_read_only(cls, path: Path) -> "Store":
        """Open an existing database for reading, beside a running peer or without one."""
        if not path.exists():
            raise FileNotFoundError(path)
        with damage_named(path):
            uri = f"{path.resolve().as_uri()}?mode=ro"
            connection = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
            try:
                return cls(connection, path, check_schema(connection, path, None))
            except BaseException:
                connection.close()
                raise

    def close(self) -> None:
        """Close the database."""
        self._db.close()

    def pin(self) -> None:
        """Let every read from now on see the database as of the next one."""
        self._db.execute("BEGIN")

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Let every read within see the database as of the first one, whatever a peer writes meanwhile."""
        if self._db.in_transaction:
            yield
            return
        self._db.execute("BEGIN")
        try:
            yield
        finally:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Make the commits within durable together, or none of them."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:  # a full disk has ended it already
                self._db.execute("ROLLBACK")
            raise

    def commit(self, block: Block, certificate: Certificate, before: State, executed: Executed) -> None:
        """Write everything of one height durably, or nothing; within `batch` with the batch."""
        height, write = block.height, self._db.executemany
        validators = before.validators()
        with nullcontext() if self._db.in_transaction else self.batch():
            write("INSERT INTO blocks VALUES (?, ?, ?, ?)", [(height, block.hash, encode(block), encode(certificate))])
            self._write_state(height, before, executed.changes)
            write("INSERT OR IGNORE INTO validator_sets VALUES (?, ?)", [(validators.hash, encode(validators))])
            write(
                "INSERT INTO receipts VALUES (?, ?, ?, ?)",
                [(r.tx_id, height, place, r.reason) for place, r in enumerate(executed.receipts)],
            )
            write(
                "INSERT INTO events VALUES (?, ?, ?, ?)",
                [(height, place, e.kind, json.dumps(e.data)) for place, e in enumerate(executed.events)],
            )
            self._forget(height)

    def _forget(self, height: int) -> None:
        """Let the undo journal end `UNDO_HEIGHTS` below, and blocks `keep` below, a few at a time."""
        self._db.execute("DELETE FROM undo WHERE height <= ?", (height - UNDO_HEIGHTS,))
        if not self.keep or height % PRUNE_EVERY:
            return
        base = self.base
        last = min(height - self.keep, base + PRUNE_SLICE - 1)
        for table in ("blocks", "receipts", "events"):
            self._db.execute(f"DELETE FROM {table} WHERE height BETWEEN ? AND ?", (base, last))

    def install(self, block: Block, certificate: Certificate, signers: ValidatorSet, state: State) -> None:
        """Take a verified snapshot, the state after `block`, into a store that is still at genesis.

        Raises `ValueError` when the store has blocks already.
        """
        with self.batch():
            if self.tip() is not None:
                raise ValueError("a snapshot is for an empty store")
            row = (block.height, block.hash, encode(block), encode(certificate))
            self._db.execute("INSERT INTO blocks VALUES (?, ?, ?, ?)", row)
            self._db.execute("INSERT OR IGNORE INTO validator_sets VALUES (?, ?)", (signers.hash, encode(signers)))
            self._db.execute("DELETE FROM state")
            for table, rows in state.tables.items():
                self._db.executemany(
                    "INSERT INTO state VALUES (?, ?, ?)",
                    [(int(table), key, encode(record)) for key, record in rows.items()],
                )

    @property
    def base(self) -> int:
        """The lowest height whose block is kept, 1 for an empty store."""
        return self._rows("SELECT MIN(height) FROM blocks")[0][0] or 1

    def _write_state(self, height: int, before: State, changes: Changes) -> None:
        for table, changed in changes.items():
            rows = before.tables[table]
            olds = [(key, encode(rows[key]) if key in rows else None) for key in changed]
            self._db.executemany(
                "INSERT INTO undo VALUES (?, ?, ?, ?)", [(height, int(table), key, old) for key, old in olds]
            )
            gone = [key for key, record in changed.items() if record is None and key in before.tables[table]]
            if table in _ARCHIVED:
                self._db.executemany(
                    "INSERT OR REPLACE INTO archive VALUES (?, ?, ?)",
                    [(int(table), key, encode(before.tables[table][key])) for key in gone],
                )
            self._db.executemany("DELETE FROM state WHERE tbl = ? AND key = ?", [(int(table), key) for key in gone])
            self._db.executemany(
                "INSERT OR REPLACE INTO state VALUES (?, ?, ?)",
                [(int(table), key, encode(record)) for key, record in changed.items() if record is not None],
            )

    def _rows(self, statement: str, *values: Any) -> list[Any]:
        with damage_named(self._path):
            return self._db.execute(statement, values).fetchall()

    def tip(self) -> tuple[Block, Certificate] | None:
        """Return the newest block and its certificate, None at genesis."""
        return self._pair(self._rows("SELECT block, certificate FROM blocks ORDER BY height DESC LIMIT 1"))

    def block(self, height: int) -> tuple[Block, Certificate] | None:
        """Return the block of a height and its certificate."""
        return self._pair(self._rows("SELECT block, certificate FROM blocks WHERE height = ?", height))

    def block_by_hash(self, block_hash: bytes) -> tuple[Block, Certificate] | None:
        """Return the block with this hash and its certificate."""
        return self._pair(self._rows("SELECT block, certificate FROM blocks WHERE hash = ?", block_hash))

    def _pair(self, rows: list[Any]) -> tuple[Block, Certificate] | None:
        if not rows:
            return None
        with damage_named(self._path):
            return decode(Block, rows[0][0]), decode(Certificate, rows[0][1])

    def validators(self, validators_hash: bytes) -> ValidatorSet | None:
        """Return the validator set with this hash, of any height."""
        rows = self._rows("SELECT members FROM validator_sets WHERE hash = ?", validators_hash)
        with damage_named(self._path):
            return decode(ValidatorSet, rows[0][0]) if rows else None

    def raw_blocks(
        self, first: int, last: int, most: float = float("inf"), *, newest_first: bool = False
    ) -> list[tuple[bytes, bytes]]:
        """Return the encoded blocks and certificates of a range of heights, none beyond the first `most` bytes."""
        found: list[tuple[bytes, bytes]] = []
        select = "SELECT block, certificate FROM blocks WHERE height BETWEEN ? AND ? ORDER BY height"
        with damage_named(self._path):
            for block, certificate in self._db.execute(select + " DESC" * newest_first, (first, last)):
                found.append((block, certificate))
                most -= len(block) + len(certificate)
                if most <= 0:
                    break
        return found

    def load_state(self) -> State:
        """Return the state after the newest block, which its header commits to."""
        with self.snapshot():
            tip = self.tip()
            if tip is None:
                return genesis_state(self.genesis)
            state = self._read_state()
        if state.root != tip[0].header.state_root:
            raise corrupt(self._path, "the state does not hash to the newest header")
        return state

    def oldest_state(self, newest: State) -> int:
        """Return the lowest height, `newest`'s at most, that `state_at` can go back to."""
        oldest = self._rows("SELECT MIN(height) FROM undo")[0][0]
        return newest.height if oldest is None else max(self.base, oldest - 1)

    def state_at(self, height: int, newest: State) -> State:
        """Return the state after block `height`, its root checked; raise `LookupError` where it is not kept.

        `newest` is a later state of this chain that is stored already, such as `load_state` returns. The last
        `UNDO_HEIGHTS` states can be had: the journal holds what each block replaced.
        """
        if height == newest.height:
            return newest
        with self.snapshot():
            found, oldest = self.block(height), self._rows("SELECT MIN(height) FROM undo")[0][0]
            if found is None or oldest is None or not oldest - 1 <= height < newest.height:
                raise LookupError(f"the state of height {height} is not kept")
            rows = self._rows(
                "SELECT tbl, key, value FROM undo WHERE height > ? AND height <= ? ORDER BY height DESC",
                height,
                newest.height,
            )
        state = _undone(newest, rows)
        if state.root != found[0].header.state_root:
            raise corrupt(self._path, f"the journal does not lead to the state of height {height}")
        return state

    def _read_state(self) -> State:
        base = empty_state()
        hashes: dict[bytes, bytes | None] = {}
        with damage_named(self._path):
            for number, key, value in self._db.execute("SELECT tbl, key, value FROM state"):
                table = Table(number)
                record = decode_record(table, value)
                base.tables[table][key] = record
                hashes[state_key(table, key)] = value_hash(record)
        return State(base.tables, base.tree.update(hashes))

    def keep_cases(self, cases: Sequence[Evidence]) -> None:
        """Write the open cases of evidence durably, in the place of the ones before."""
        self._db.execute("INSERT OR REPLACE INTO meta VALUES ('cases', ?)", (encode(tuple(cases)),))

    def cases(self) -> tuple[Evidence, ...]:
        """Return the cases that were open when they were last written."""
        rows = self._rows("SELECT value FROM meta WHERE name = 'cases'")
        with damage_named(self._path):
            return decode(tuple[Evidence, ...], rows[0][0]) if rows else ()

    def archived(self, table: Table, key: bytes) -> Record | None:
        """Return an audit or claim as it was when it left the state."""
        rows = self._rows("SELECT value FROM archive WHERE tbl = ? AND key = ?", int(table), key)
        with damage_named(self._path):
            return decode_record(table, rows[0][0]) if rows else None

    def receipt(self, tx_id: bytes) -> tuple[int, int, str] | None:
        """Return (height, place, reason) of an included transaction."""
        rows = self._rows("SELECT height, place, reason FROM receipts WHERE tx_id = ?", tx_id)
        return tuple(rows[0]) if rows else None

    def receipts(self, height: int) -> tuple[Receipt, ...]:
        """Return the receipts of a block in order."""
        rows = self._rows("SELECT tx_id, reason FROM receipts WHERE height = ? ORDER BY place", height)
        return tuple(Receipt(tx_id, reason) for tx_id, reason in rows)

    def events(self, first: int, last: int, kinds: Iterable[str] = (), limit: int = 100_000) -> list[tuple[int, Event]]:
        """Return the events of a range of heights, of some kinds or of all."""
        wanted = tuple(kinds)
        clause = f" AND kind IN ({','.join('?' * len(wanted))})" if wanted else ""
        rows = self._rows(
            f"SELECT height, kind, data FROM events WHERE height BETWEEN ? AND ?{clause}"
            " ORDER BY height, place LIMIT ?",
            first,
            last,
            *wanted,
            limit,
        )
        with damage_named(self._path):
            return [(height, Event(kind, json.loads(data))) for height, kind, data in rows]


def _undone(state: State, rows: list[Any]) -> State:
    """Return `state` with records set back; of several rows of one key the last one counts."""
    tables = {table: type(records)(records) for table, records in state.tables.items()}
    hashes: dict[bytes, bytes | None] = {}
    for number, key, value in rows:
        table = Table(number)
        tables[table].pop(key, None)
        hashes[state_key(table, key)] = None
        if value is not None:
            tables[table][key] = record = decode_record(table, value)
            hashes[state_key(table, key)] = value_hash(record)
    return State(tables, state.tree.update(hashes))
