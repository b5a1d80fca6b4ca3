"""Snapshots: a state in chunks, each verified alone against the state root of a header.

A chunk is the subtree of all tree keys that begin with one prefix of `depth` bits, with the hashes
beside the path to it. Nothing rests on the server's word: whatever rows, order or number of them is
wrong gives another root, because leaves and branches hash with different prefixes.
"""

from itertools import pairwise
from typing import Annotated

from blake3 import blake3
from msgspec import Meta

from chain.blocks import Reason, Refused
from chain.codec import MAX_OBJECT_BYTES, DecodeError, Hash, Record, decode, encode
from chain.state import State, Table, decode_record, empty_state, state_key
from chain.tree import root_above, subtree_root

CHUNK_BYTES = 256 * 1024
"""About the most of a chunk; prefixes divide evenly because keys are digests."""
MAX_DEPTH = 16
MAX_ROWS = 2**16

Depth = Annotated[int, Meta(ge=0, le=MAX_DEPTH)]
Place = Annotated[int, Meta(ge=0, lt=2**MAX_DEPTH)]


class Row(Record, frozen=True):
    """One encoded record of the state."""

    table: Annotated[int, Meta(ge=0, le=len(Table) - 1)]
    key: Annotated[bytes, Meta(max_length=256)]
    value: bytes


class Chunk(Record, frozen=True):
    """All rows whose tree keys begin with the `depth` bits of `index`, in order of their tree keys."""

    depth: Depth
    index: Place
    siblings: Annotated[tuple[Hash, ...], Meta(max_length=MAX_DEPTH)]
    """The hashes beside the path to the subtree, from the root down."""
    rows: Annotated[tuple[Row, ...], Meta(max_length=MAX_ROWS)]


class Snapshot:
    """A state as a server offers it: its rows in order of their tree keys, cut into 2^depth chunks."""

    def __init__(self, state: State) -> None:
        self.state = state
        entries = [
            (state_key(table, key), Row(int(table), key, encode(record)))
            for table, rows in state.tables.items()
            for key, record in rows.items()
        ]
        entries.sort(key=lambda entry: entry[0])
        size = sum(len(row.key) + len(row.value) + 8 for _, row in entries)
        self.depth = _depth(state, size)
        self._cells: list[list[Row]] = [[] for _ in range(2**self.depth)]
        for key, row in entries:
            self._cells[_place(key, self.depth)].append(row)

    def chunk(self, index: int) -> Chunk:
        """Return one chunk; raise `IndexError`."""
        rows = tuple(self._cells[index])
        return Chunk(self.depth, index, self.state.tree.siblings(index, self.depth), rows)


def _depth(state: State, size: int) -> int:
    wanted = min(MAX_DEPTH, max(0, (2 * size // CHUNK_BYTES).bit_length() - 1))
    return next(depth for depth in range(wanted, -1, -1) if state.tree.is_full(depth))


def _place(key: bytes, depth: int) -> int:
    return int.from_bytes(key[:4], "big") >> (32 - depth)


def decode_chunk(data: bytes) -> Chunk:
    """Return the chunk that `data` encodes; raise `DecodeError`."""
    return decode(Chunk, data, MAX_OBJECT_BYTES)


def check_chunk(root: bytes, chunk: Chunk) -> None:
    """Raise `Refused` unless `chunk` is exactly what the state under `root` holds at its place."""
    if chunk.index >> chunk.depth or len(chunk.siblings) != chunk.depth:
        raise Refused(Reason.WRONG_CHUNK, "its place does not fit its depth")
    leaves = [(_tree_key(row), blake3(row.value).digest()) for row in chunk.rows]
    if any(_place(key, chunk.depth) != chunk.index for key, _ in leaves):
        raise Refused(Reason.WRONG_CHUNK, "a row of another place")
    if any(first >= second for (first, _), (second, _) in pairwise(leaves)):
        raise Refused(Reason.WRONG_CHUNK, "rows out of order")
    if root_above(subtree_root(leaves, chunk.depth), chunk.index, chunk.siblings) != root:
        raise Refused(Reason.WRONG_CHUNK, "it does not lead to the state root")
    for row in chunk.rows:
        try:
            decode_record(Table(row.table), row.value)
        except DecodeError as error:
            raise Refused(Reason.WRONG_CHUNK, f"a row of table {row.table}: {error}") from None


def _tree_key(row: Row) -> bytes:
    return state_key(Table(row.table), row.key)


class Assembly:
    """A state under `root` being put together from chunks of one depth, in any order."""

    def __init__(self, root: bytes, depth: int) -> None:
        self._root = root
        self._depth = depth
        self._chunks: dict[int, Chunk] = {}

    def add(self, chunk: Chunk) -> None:
        """Take a chunk; raise `Refused` for a false one."""
        if chunk.depth != self._depth:
            raise Refused(Reason.WRONG_CHUNK, "of another depth")
        check_chunk(self._root, chunk)
        self._chunks[chunk.index] = chunk

    def missing(self) -> set[int]:
        """Return the places of the chunks that are not here yet."""
        return set(range(2**self._depth)) - self._chunks.keys()

    def state(self) -> State:
        """Return the whole state, its root computed anew; raise `LookupError` while chunks are missing."""
        if self.missing():
            raise LookupError(f"{len(self.missing())} chunks are missing")
        base = empty_state()
        hashes: dict[bytes, bytes | None] = {}
        for chunk in self._chunks.values():
            for row in chunk.rows:
                base.tables[Table(row.table)][row.key] = decode_record(Table(row.table), row.value)
                hashes[_tree_key(row)] = blake3(row.value).digest()
        state = State(base.tables, base.tree.update(hashes))
        if state.root != self._root:
            raise Refused(Reason.WRONG_CHUNK, "together they do not lead to the state root")
        return state
