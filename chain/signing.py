"""The signing record, `signing.db`: a validator's own votes, durable before their signatures leave.

Whoever loses this record may sign a second, conflicting vote and be slashed for it. So the file is
opened exclusively, every commit is synced (`synchronous=FULL`), and a record that is missing beside
a chain that is not empty is an error, never a fresh start.
"""

import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

from msgspec import structs

from chain.blocks import MAX_MESSAGE_BYTES, Proposal, Vote, VoteKind, is_conflict
from chain.codec import AccountId, Hash, Record, Uint, decode, encode

MAX_EXPORT_BYTES = 256 * 1024 * 1024
Request = tuple[Vote, Proposal | None]
"""An unsigned vote and the proposal that has to be durable with it."""

_SCHEMA = (
    "CREATE TABLE owner (chain_id BLOB NOT NULL, account BLOB NOT NULL, floor INTEGER NOT NULL)",
    "CREATE TABLE votes (height INTEGER NOT NULL, view INTEGER NOT NULL, kind INTEGER NOT NULL,"
    " block_hash BLOB NOT NULL, signature BLOB NOT NULL, PRIMARY KEY (height, view, kind)) WITHOUT ROWID",
    "CREATE TABLE proposals (height INTEGER NOT NULL, view INTEGER NOT NULL, data BLOB NOT NULL,"
    " PRIMARY KEY (height, view))",
)


class SigningError(Exception):
    """A signature that the record does not allow."""


class Conflict(SigningError):
    """A vote that contradicts one already signed, or of a height whose record is closed."""


class RecordMissing(SigningError):
    """No signing record of this key and chain, although the chain is not empty."""


class RecordInUse(SigningError):
    """Another process holds the record."""


class Exported(Record, frozen=True):
    """A signing record on its way to another machine; a proposal is kept as its encoding."""

    chain_id: Hash
    account: AccountId
    floor: Uint
    votes: tuple[Vote, ...]
    proposals: tuple[bytes, ...]


class SigningRecord:
    """The durable votes of one account on one chain. Not for concurrent use."""

    def __init__(self, connection: sqlite3.Connection, sign: Callable[[bytes], bytes]) -> None:
        self._db = connection
        self._sign = sign
        self._chain_id, self._account, self._floor = connection.execute(
            "SELECT chain_id, account, floor FROM owner"
        ).fetchone()
        self.is_new = False
        """Whether it was made just now: what its key may have signed before is not in it."""
        self._is_exported = bool(connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'exported'").fetchone())

    @classmethod
    def open(cls, path: Path, *, chain_id: bytes, account: bytes, sign: Callable[[bytes], bytes], tip: int) -> Self:
        """Return the record at `path`, a new one when the chain is empty (`tip` 0).

        Raises `RecordMissing` for no record or another key's record, `RecordInUse` when it is locked,
        `sqlite3.DatabaseError` when the file is damaged.
        """
        if not path.exists() and tip > 0:
            raise RecordMissing(f"{path.name} is missing, but the chain is at height {tip}")
        connection = _connect(path)
        try:
            owner = _owner(connection)
            if owner is None and tip > 0:
                raise RecordMissing(f"{path.name} is empty, but the chain is at height {tip}")
            if owner is None:
                _create(connection, chain_id, account, floor=0)
            elif owner != (chain_id, account):
                raise RecordMissing(f"{path.name} belongs to another key or network")
            record = cls(connection, sign)
            record.is_new = owner is None
            if record._is_exported:
                raise RecordMissing(f"{path.name} was exported: this key signs somewhere else now")
            return record
        except BaseException:
            connection.close()
            raise

    @classmethod
    def create(cls, path: Path, *, chain_id: bytes, account: bytes, sign: Callable[[bytes], bytes], floor: int) -> Self:
        """Return a new record that never signs at heights up to `floor`; raise `FileExistsError`."""
        if path.exists():
            raise FileExistsError(path)
        connection = _connect(path)
        _create(connection, chain_id, account, floor)
        return cls(connection, sign)

    @classmethod
    def open_existing(cls, path: Path, sign: Callable[[bytes], bytes]) -> Self:
        """Return the record at `path`, whoever's it is; raise `RecordMissing` or `RecordInUse`."""
        if not path.exists():
            raise RecordMissing(f"There is no {path.name}")
        connection = _connect(path)
        if _owner(connection) is None:
            connection.close()
            raise RecordMissing(f"{path.name} is empty")
        return cls(connection, sign)

    @property
    def account(self) -> bytes:
        """Whose votes these are."""
        return self._account

    @property
    def floor(self) -> int:
        """The height up to which nothing is signed any more."""
        return self._floor

    def export(self) -> bytes:
        """Return the whole record for another place, after closing this one for signing for good.

        A second call returns the same bytes: what was written down may be lost, what is closed stays closed.
        """
        if not self._is_exported:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.execute("CREATE TABLE exported (done INTEGER)")
            self._db.execute("COMMIT")
            self._is_exported = True
        heights = self._db.execute("SELECT DISTINCT height FROM votes ORDER BY height").fetchall()
        votes = tuple(vote for (height,) in heights for vote in self.votes(height))
        proposals = tuple(data for (data,) in self._db.execute("SELECT data FROM proposals ORDER BY height, view"))
        return encode(Exported(self._chain_id, self._account, self._floor, votes, proposals))

    @classmethod
    def import_(cls, path: Path, data: bytes, account: bytes) -> int:
        """Make a new record of exported bytes; return the newest height with a vote, 0 without any.

        An import that was cut off leaves an empty file and can be made again. Raises `FileExistsError`,
        `DecodeError`, and `RecordMissing` for another account's record.
        """
        if _is_begun(path):
            raise FileExistsError(path)
        found: Exported = decode(Exported, data, MAX_EXPORT_BYTES)
        if found.account != account:
            raise RecordMissing("the exported record belongs to another key")
        connection = _connect(path)
        try:
            _create(connection, found.chain_id, account, found.floor, found)
        except BaseException:
            connection.close()
            path.unlink(missing_ok=True)
            raise
        connection.close()
        return max((vote.height for vote in found.votes), default=0)

    def close(self) -> None:
        """Release the file."""
        self._db.close()

    def sign(self, vote: Vote, proposal: Proposal | None = None) -> Vote:
        """Return `vote` signed, after it is durable; see `sign_all`."""
        return self.sign_all([(vote, proposal)])[0]

    def sign_all(self, requests: Sequence[Request]) -> list[Vote]:
        """Return the signed votes after one commit has made all of them durable.

        A vote signed before returns its stored signature. Raises `Conflict`, and signs none of them,
        when one contradicts the record.
        """
        self._db.execute("BEGIN IMMEDIATE")
        try:
            signed = [self._record(vote, proposal) for vote, proposal in requests]
        except BaseException:
            if self._db.in_transaction:  # a full disk has ended it already
                self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")
        return signed

    def votes(self, height: int) -> tuple[Vote, ...]:
        """Return the votes signed at `height`, by view and kind."""
        rows = self._db.execute(
            "SELECT kind, view, block_hash, signature FROM votes WHERE height = ? ORDER BY view, kind",
            (height,),
        )
        return tuple(
            Vote(VoteKind(kind), self._chain_id, height, view, block_hash, self._account, signature)
            for kind, view, block_hash, signature in rows
        )

    def proposals(self, height: int) -> tuple[Proposal, ...]:
        """Return the proposals that were proposed or notarized at `height`, by view."""
        rows = self._db.execute("SELECT data FROM proposals WHERE height = ? ORDER BY view", (height,))
        return tuple(decode(Proposal, data, MAX_MESSAGE_BYTES) for (data,) in rows)

    def forget(self, height: int) -> None:
        """Drop the records up to `height`, which is final, and refuse to sign there from now on."""
        if height <= self._floor:
            return
        self._db.execute("BEGIN IMMEDIATE")
        self._db.execute("DELETE FROM votes WHERE height <= ?", (height,))
        self._db.execute("DELETE FROM proposals WHERE height <= ?", (height,))
        self._db.execute("UPDATE owner SET floor = ?", (height,))
        self._db.execute("COMMIT")
        self._floor = height

    def _record(self, vote: Vote, proposal: Proposal | None) -> Vote:
        if (vote.chain_id, vote.validator) != (self._chain_id, self._account):
            raise Conflict("a vote of another key or network")
        if self._is_exported:
            raise Conflict("the record was exported")
        if vote.height <= self._floor:
            raise Conflict(f"the record is closed up to height {self._floor}")
        for stored in self._at(vote.height, vote.view):
            if (stored.kind, stored.block_hash) == (vote.kind, vote.block_hash):
                return stored
            if is_conflict(stored, vote):
                raise Conflict(f"{vote.kind.name} contradicts {stored.kind.name} in view {vote.view}")
        signed = structs.replace(vote, signature=self._sign(vote.signing_bytes))
        self._db.execute(
            "INSERT INTO votes VALUES (?, ?, ?, ?, ?)",
            (vote.height, vote.view, int(vote.kind), vote.block_hash, signed.signature),
        )
        if proposal is not None:
            if vote.kind == VoteKind.PROPOSE:
                proposal = structs.replace(proposal, vote=signed)
            self._db.execute(
                "INSERT OR IGNORE INTO proposals VALUES (?, ?, ?)", (vote.height, vote.view, encode(proposal))
            )
        return signed

    def _at(self, height: int, view: int) -> list[Vote]:
        rows = self._db.execute(
            "SELECT kind, block_hash, signature FROM votes WHERE height = ? AND view = ?", (height, view)
        )
        return [
            Vote(VoteKind(kind), self._chain_id, height, view, block_hash, self._account, signature)
            for kind, block_hash, signature in rows
        ]


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=0)
    try:
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("BEGIN EXCLUSIVE")
        connection.execute("COMMIT")
    except sqlite3.OperationalError as error:
        connection.close()
        if "locked" in str(error):
            raise RecordInUse(f"{path.name} is in use by another process") from None
        raise
    except BaseException:
        connection.close()
        raise
    return connection


def _owner(connection: sqlite3.Connection) -> tuple[bytes, bytes] | None:
    if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'owner'").fetchone():
        return None
    row: tuple[bytes, bytes] | None = connection.execute("SELECT chain_id, account FROM owner").fetchone()
    return row


def _is_begun(path: Path) -> bool:
    """Whether there is anything at `path` but a file that no record was made in."""
    if not path.exists():
        return False
    try:
        connection = _connect(path)
    except sqlite3.DatabaseError:
        return True
    try:
        return _owner(connection) is not None
    finally:
        connection.close()


def _create(
    connection: sqlite3.Connection, chain_id: bytes, account: bytes, floor: int, exported: "Exported | None" = None
) -> None:
    connection.execute("BEGIN EXCLUSIVE")
    for statement in _SCHEMA:
        connection.execute(statement)
    connection.execute("INSERT INTO owner VALUES (?, ?, ?)", (chain_id, account, floor))
    for vote in exported.votes if exported else ():
        row = (vote.height, vote.view, int(vote.kind), vote.block_hash, vote.signature)
        connection.execute("INSERT INTO votes VALUES (?, ?, ?, ?, ?)", row)
    for data in exported.proposals if exported else ():
        vote = decode(Proposal, data, MAX_MESSAGE_BYTES).vote
        connection.execute("INSERT INTO proposals VALUES (?, ?, ?)", (vote.height, vote.view, data))
    connection.execute("COMMIT")
