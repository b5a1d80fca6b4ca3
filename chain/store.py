"""`chain.db`: one SQLite transaction a height for block, certificate, state, receipts and events."""

import json
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from chain.blocks import Block, Certificate, ValidatorSet
from chain.codec import DecodeError, decode, encode
from chain.genesis import Genesis, from_json, to_json
from chain.ledger import Event, Executed, Receipt
from chain.state import State, Table, decode_record, empty_state, genesis_state, state_key, value_hash

SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value BLOB NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE blocks (height INTEGER PRIMARY KEY, hash BLOB NOT NULL UNIQUE, block BLOB NOT NULL,
                     certificate BLOB NOT NULL) STRICT;
CREATE TABLE state (tbl INTEGER NOT NULL, key BLOB NOT NULL, value BLOB NOT NULL,
                    PRIMARY KEY (tbl, key)) STRICT, WITHOUT ROWID;
CREATE TABLE validator_sets (hash BLOB PRIMARY KEY, members BLOB NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE receipts (tx_id BLOB PRIMARY KEY, height INTEGER NOT NULL, place INTEGER NOT NULL,
                       reason TEXT NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE events (height INTEGER NOT NULL, place INTEGER NOT NULL, kind TEXT NOT NULL, data TEXT NOT NULL,
                     PRIMARY KEY (height, place)) STRICT, WITHOUT ROWID;
CREATE INDEX events_by_kind ON events (kind, height);
"""


class StoreCorrupt(Exception):
    """A database that cannot be trusted; the message is one sentence."""


class Store:
    """One open chain database; use it from one thread at a time."""

    def __init__(self, connection: sqlite3.Connection, path: Path, genesis: Genesis) -> None:
        self._db = connection
        self._path = path
        self.genesis = genesis

    @classmethod
    def open(cls, path: Path, genesis: Genesis) -> "Store":
        """Open or create `path` for writing; raise `StoreCorrupt`."""
        is_new = not path.exists() or path.stat().st_size == 0
        try:
            connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
            if is_new:
                _create(connection, genesis)
            return cls(connection, path, _check(connection, path, genesis))
        except sqlite3.DatabaseError as error:
            raise _corrupt(path, str(error)) from error

    @classmethod
    def open_read_only(cls, path: Path) -> "Store":
        """Open an existing database for reading, beside a running peer or without one."""
        if not path.exists():
            raise FileNotFoundError(path)
        try:
            connection = sqlite3.connect(
                f"file:{path}?mode=ro", uri=True, isolation_level=None, check_same_thread=False
            )
            return cls(connection, path, _check(connection, path, None))
        except sqlite3.DatabaseError as error:
            raise _corrupt(path, str(error)) from error

    def close(self) -> None:
        """Close the database."""
        self._db.close()

    def commit(self, block: Block, certificate: Certificate, before: State, executed: Executed) -> None:
        """Write everything of one height durably, or nothing."""
        height = block.height
        self._db.execute("BEGIN IMMEDIATE")
        try:
            self._db.execute(
                "INSERT INTO blocks VALUES (?, ?, ?, ?)",
                (height, block.hash, encode(block), encode(certificate)),
            )
            self._write_state(before, executed.state)
            validators = before.validators()
            self._db.execute(
                "INSERT OR IGNORE INTO validator_sets VALUES (?, ?)", (validators.hash, encode(validators))
            )
            self._db.executemany(
                "INSERT OR REPLACE INTO receipts VALUES (?, ?, ?, ?)",
                [(r.tx_id, height, place, r.reason) for place, r in enumerate(executed.receipts)],
            )
            self._db.executemany(
                "INSERT INTO events VALUES (?, ?, ?, ?)",
                [(height, place, e.kind, json.dumps(e.data)) for place, e in enumerate(executed.events)],
            )
            self._db.execute("COMMIT")
        except BaseException:
            self._db.execute("ROLLBACK")
            raise

    def _write_state(self, before: State, after: State) -> None:
        for table, key, record in changed_rows(before, after):
            if record is None:
                self._db.execute("DELETE FROM state WHERE tbl = ? AND key = ?", (int(table), key))
            else:
                self._db.execute("INSERT OR REPLACE INTO state VALUES (?, ?, ?)", (int(table), key, encode(record)))

    def tip(self) -> tuple[Block, Certificate] | None:
        """Return the newest block and its certificate, None at genesis."""
        row = self._db.execute("SELECT MAX(height) FROM blocks").fetchone()
        return None if row[0] is None else self.block(row[0])

    def block(self, height: int) -> tuple[Block, Certificate] | None:
        """Return the block of a height and its certificate."""
        row = self._db.execute("SELECT block, certificate FROM blocks WHERE height = ?", (height,)).fetchone()
        return self._pair(row)

    def block_by_hash(self, block_hash: bytes) -> tuple[Block, Certificate] | None:
        """Return the block with this hash and its certificate."""
        row = self._db.execute("SELECT block, certificate FROM blocks WHERE hash = ?", (block_hash,)).fetchone()
        return self._pair(row)

    def _pair(self, row: Any) -> tuple[Block, Certificate] | None:
        if row is None:
            return None
        try:
            return decode(Block, row[0]), decode(Certificate, row[1])
        except DecodeError as error:
            raise _corrupt(self._path, str(error)) from error

    def validators(self, validators_hash: bytes) -> ValidatorSet | None:
        """Return the validator set with this hash, of any height."""
        row = self._db.execute("SELECT members FROM validator_sets WHERE hash = ?", (validators_hash,)).fetchone()
        return None if row is None else decode(ValidatorSet, row[0])

    def raw_blocks(self, first: int, last: int) -> list[tuple[bytes, bytes]]:
        """Return the encoded blocks and certificates of a range of heights."""
        rows = self._db.execute(
            "SELECT block, certificate FROM blocks WHERE height BETWEEN ? AND ? ORDER BY height",
            (first, last),
        )
        return [(row[0], row[1]) for row in rows]

    def load_state(self) -> State:
        """Return the state after the newest block; raise `StoreCorrupt` unless it hashes to the header."""
        tip = self.tip()
        if tip is None:
            return genesis_state(self.genesis)
        state = self._read_state()
        if state.root != tip[0].header.state_root:
            raise _corrupt(self._path, "the state does not hash to the newest header")
        return state

    def _read_state(self) -> State:
        base = empty_state()
        changes: dict[bytes, bytes | None] = {}
        try:
            for number, key, value in self._db.execute("SELECT tbl, key, value FROM state"):
                table = Table(number)
                record = decode_record(table, value)
                base.tables[table][key] = record
                changes[state_key(table, key)] = value_hash(record)
        except (DecodeError, ValueError, sqlite3.DatabaseError) as error:
            raise _corrupt(self._path, str(error)) from error
        return State(base.tables, base.tree.update(changes))

    def receipt(self, tx_id: bytes) -> tuple[int, int, str] | None:
        """Return (height, place, reason) of an included transaction."""
        row = self._db.execute("SELECT height, place, reason FROM receipts WHERE tx_id = ?", (tx_id,)).fetchone()
        return None if row is None else (row[0], row[1], row[2])

    def receipts(self, height: int) -> tuple[Receipt, ...]:
        """Return the receipts of a block in order."""
        rows = self._db.execute("SELECT tx_id, reason FROM receipts WHERE height = ? ORDER BY place", (height,))
        return tuple(Receipt(row[0], row[1]) for row in rows)

    def events(self, first: int, last: int, kinds: Iterable[str] = (), limit: int = 100_000) -> list[tuple[int, Event]]:
        """Return the events of a range of heights, of some kinds or of all."""
        wanted = tuple(kinds)
        marks = ",".join("?" * len(wanted))
        clause = f" AND kind IN ({marks})" if wanted else ""
        rows = self._db.execute(
            f"SELECT height, kind, data FROM events WHERE height BETWEEN ? AND ?{clause}"
            " ORDER BY height, place LIMIT ?",
            (first, last, *wanted, limit),
        )
        return [(row[0], Event(row[1], json.loads(row[2]))) for row in rows]


def changed_rows(before: State, after: State) -> Iterator[tuple[Table, bytes, Any]]:
    """Yield (table, key, record or None) for every record that differs between two states."""
    for table in Table:
        old, new = before.tables[table], after.tables[table]
        if old is new:
            continue
        for key, record in new.items():
            if old.get(key) is not record:
                yield table, key, record
        for key in old.keys() - new.keys():
            yield table, key, None


def _create(connection: sqlite3.Connection, genesis: Genesis) -> None:
    connection.execute("BEGIN IMMEDIATE")
    for statement in _SCHEMA.split(";"):
        if statement.strip():
            connection.execute(statement)
    connection.execute("INSERT INTO meta VALUES ('schema', ?)", (SCHEMA_VERSION.to_bytes(4, "big"),))
    connection.execute("INSERT INTO meta VALUES ('genesis', ?)", (to_json(genesis).encode(),))
    for table, key, record in changed_rows(empty_state(), genesis_state(genesis)):
        connection.execute("INSERT INTO state VALUES (?, ?, ?)", (int(table), key, encode(record)))
    connection.execute("COMMIT")


def _check(connection: sqlite3.Connection, path: Path, genesis: Genesis | None) -> Genesis:
    """Return the database's genesis; raise `StoreCorrupt` for another schema, network or damage."""
    found = dict(connection.execute("SELECT name, value FROM meta").fetchall())
    if int.from_bytes(found.get("schema", b""), "big") != SCHEMA_VERSION:
        raise _corrupt(path, "its schema version is not known")
    try:
        kept = from_json(found["genesis"].decode())
    except (KeyError, ValueError) as error:
        raise _corrupt(path, f"its genesis cannot be read: {error}") from None
    if genesis is not None and kept.chain_id != genesis.chain_id:
        raise StoreCorrupt(f"{path} belongs to another network.")
    return kept


def _corrupt(path: Path, why: str) -> StoreCorrupt:
    return StoreCorrupt(f"{path} is damaged: {why}.")
