"""The schema of `chain.db`: made, migrated and checked, and how damage is told from a disk's troubles.

Version 3 added the undo journal. An older file is migrated in one transaction when a peer opens it; a
newer one is refused and left as it is.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from chain.codec import DecodeError, encode
from chain.genesis import Genesis, from_json, to_json
from chain.state import genesis_state

SCHEMA_VERSION = 3
_OLDEST = 2
_UNDO = """
CREATE TABLE undo (height INTEGER NOT NULL, tbl INTEGER NOT NULL, key BLOB NOT NULL, value BLOB,
                   PRIMARY KEY (height, tbl, key)) STRICT, WITHOUT ROWID;
"""
_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value BLOB NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE blocks (height INTEGER PRIMARY KEY, hash BLOB NOT NULL UNIQUE, block BLOB NOT NULL,
                     certificate BLOB NOT NULL) STRICT;
CREATE TABLE state (tbl INTEGER NOT NULL, key BLOB NOT NULL, value BLOB NOT NULL,
                    PRIMARY KEY (tbl, key)) STRICT, WITHOUT ROWID;
CREATE TABLE archive (tbl INTEGER NOT NULL, key BLOB NOT NULL, value BLOB NOT NULL,
                      PRIMARY KEY (tbl, key)) STRICT, WITHOUT ROWID;
CREATE TABLE validator_sets (hash BLOB PRIMARY KEY, members BLOB NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE receipts (tx_id BLOB PRIMARY KEY, height INTEGER NOT NULL, place INTEGER NOT NULL,
                       reason TEXT NOT NULL) STRICT, WITHOUT ROWID;
CREATE UNIQUE INDEX receipts_by_place ON receipts (height, place);
CREATE TABLE events (height INTEGER NOT NULL, place INTEGER NOT NULL, kind TEXT NOT NULL, data TEXT NOT NULL,
                     PRIMARY KEY (height, place)) STRICT, WITHOUT ROWID;
CREATE INDEX events_by_kind ON events (kind, height);
"""
_MIGRATIONS = {2: _UNDO}
"""What leads from a version to the next one."""
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR, sqlite3.SQLITE_FORMAT)


class StoreCorrupt(Exception):
    """A database that cannot be trusted; the message is one sentence."""


def create(connection: sqlite3.Connection, genesis: Genesis) -> None:
    """Make an empty chain of a network, durably or not at all."""
    connection.execute("BEGIN IMMEDIATE")
    _run(connection, _SCHEMA + _UNDO)
    connection.execute("INSERT INTO meta VALUES ('schema', ?)", (SCHEMA_VERSION.to_bytes(4, "big"),))
    connection.execute("INSERT INTO meta VALUES ('genesis', ?)", (to_json(genesis).encode(),))
    for table, rows in genesis_state(genesis).tables.items():
        connection.executemany(
            "INSERT INTO state VALUES (?, ?, ?)", [(int(table), key, encode(record)) for key, record in rows.items()]
        )
    connection.execute("COMMIT")


def _run(connection: sqlite3.Connection, statements: str) -> None:
    for statement in statements.split(";"):
        if statement.strip():
            connection.execute(statement)


def migrate(connection: sqlite3.Connection) -> None:
    """Bring an older schema to the present one, in one transaction; leave a newer one to `check_schema`."""
    version = _version(connection)
    if not _OLDEST <= version < SCHEMA_VERSION:
        return
    connection.execute("BEGIN IMMEDIATE")
    for step in range(version, SCHEMA_VERSION):
        _run(connection, _MIGRATIONS[step])
    connection.execute("UPDATE meta SET value = ? WHERE name = 'schema'", (SCHEMA_VERSION.to_bytes(4, "big"),))
    connection.execute("COMMIT")


def _version(connection: sqlite3.Connection) -> int:
    rows = connection.execute("SELECT value FROM meta WHERE name = 'schema'").fetchall()
    return int.from_bytes(rows[0][0], "big") if rows else 0


def check_schema(connection: sqlite3.Connection, path: Path, genesis: Genesis | None) -> Genesis:
    """Return the database's genesis; raise `StoreCorrupt` for an unknown schema, another network or damage."""
    version = _version(connection)
    if version > SCHEMA_VERSION:
        raise StoreCorrupt(f"{path} was written by a newer version of this program (schema {version}).")
    if version < _OLDEST:
        raise corrupt(path, "its schema version is not known")
    found = dict(connection.execute("SELECT name, value FROM meta").fetchall())
    try:
        kept = from_json(found["genesis"].decode())
    except (KeyError, ValueError) as error:
        raise corrupt(path, f"its genesis cannot be read: {error}") from None
    if genesis is not None and kept.chain_id != genesis.chain_id:
        raise StoreCorrupt(f"{path} belongs to another network.")
    return kept


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Raise `StoreCorrupt` for whatever shows that the file is damaged; let the disk's troubles through.

    A store that has been closed meanwhile is no damage: `sqlite3.ProgrammingError`.
    """
    try:
        yield
    except sqlite3.ProgrammingError:
        raise
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)
        if code & 0xFF not in _DAMAGE:
            raise
        raise corrupt(path, str(error)) from error
    except (DecodeError, ValueError) as error:
        raise corrupt(path, str(error)) from error


def corrupt(path: Path, why: str) -> StoreCorrupt:
    """Return the error that names a damaged file."""
    return StoreCorrupt(f"{path} is damaged: {why}.")
