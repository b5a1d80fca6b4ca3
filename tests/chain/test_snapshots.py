"""Chunks of a state: whatever a server changes in one is refused, whatever it leaves is the state."""

from collections.abc import Callable
from functools import cache

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from chain.blocks import Refused
from chain.codec import DecodeError, encode
from chain.hashing import ZERO, digest
from chain.records import Account
from chain.snapshots import CHUNK_BYTES, Assembly, Chunk, Row, Snapshot, check_chunk, decode_chunk
from chain.state import Draft, State, Table, genesis_state, state_key
from chain.tree import SparseTree, root_above, subtree_root
from tests.chain.ledger_kit import genesis_of


@cache
def populous(accounts: int = 12_000) -> State:
    before = genesis_state(genesis_of())
    draft = Draft(before)
    for index in range(accounts):
        draft.put(Table.ACCOUNTS, digest("resident", index.to_bytes(4, "big")), Account(balance=index))
    return draft.freeze(before)


@cache
def snapshot() -> Snapshot:
    found = Snapshot(populous())
    assert found.depth >= 2
    return found


def changed_row(chunk: Chunk, **changes: object) -> Chunk:
    return structs.replace(chunk, rows=(structs.replace(chunk.rows[0], **changes), *chunk.rows[1:]))


def foreign() -> Row:
    return snapshot().chunk(1).rows[0]


FORGERIES: dict[str, Callable[[Chunk], Chunk]] = {
    "a row less": lambda c: structs.replace(c, rows=c.rows[:-1]),
    "no rows": lambda c: structs.replace(c, rows=()),
    "a row twice": lambda c: structs.replace(c, rows=(c.rows[0], *c.rows)),
    "a row more": lambda c: structs.replace(c, rows=(*c.rows, Row(2, bytes(32), encode(Account(balance=1))))),
    "a row of another chunk": lambda c: structs.replace(c, rows=(*c.rows, foreign())),
    "rows in another order": lambda c: structs.replace(c, rows=(c.rows[1], c.rows[0], *c.rows[2:])),
    "another value": lambda c: changed_row(c, value=encode(Account(balance=10**9))),
    "a value that is no record": lambda c: changed_row(c, value=b"\xc1"),
    "another key": lambda c: changed_row(c, key=bytes(32)),
    "another table": lambda c: changed_row(c, table=3),
    "another place": lambda c: structs.replace(c, index=c.index + 1),
    "a place beyond": lambda c: structs.replace(c, index=c.index + 2**c.depth),
    "another depth": lambda c: structs.replace(c, depth=c.depth - 1),
    "a sibling less": lambda c: structs.replace(c, siblings=c.siblings[:-1]),
    "a sibling more": lambda c: structs.replace(c, siblings=(*c.siblings, ZERO)),
    "another sibling": lambda c: structs.replace(c, siblings=(ZERO, *c.siblings[1:])),
    "the whole as a part": lambda c: structs.replace(c, depth=0, index=0, siblings=()),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_chunk_is_refused(forgery: str) -> None:
    good = snapshot().chunk(0)
    root = populous().root
    check_chunk(root, good)
    forged = FORGERIES[forgery](good)
    with pytest.raises(Refused, match="wrong-chunk"):
        check_chunk(root, forged)
    with pytest.raises(Refused):
        Assembly(root, snapshot().depth).add(forged)


def test_a_true_leaf_that_is_no_record_is_refused() -> None:
    key, value = bytes(32), b"\xc1\xc1"
    leaf = state_key(Table.ACCOUNTS, key)
    tree = SparseTree().update({leaf: blake3(value).digest()})
    with pytest.raises(Refused, match="a row of table 2"):
        check_chunk(tree.root, Chunk(0, 0, (), (Row(2, key, value),)))


def test_all_chunks_make_the_state() -> None:
    offered = snapshot()
    assembly = Assembly(populous().root, offered.depth)
    with pytest.raises(LookupError):
        assembly.state()
    for index in reversed(range(2**offered.depth)):
        data = encode(offered.chunk(index))
        assert len(data) < 2 * CHUNK_BYTES
        assembly.add(decode_chunk(data))
        assert len(assembly.missing()) == index
    made = assembly.state()
    assert made.tables == populous().tables
    assert made.root == populous().root


@settings(max_examples=30)
@given(st.sets(st.binary(min_size=32, max_size=32), max_size=40), st.integers(0, 4))
def test_subtrees_lead_to_the_root_of_any_tree(keys: set[bytes], depth: int) -> None:
    tree = SparseTree().update(dict.fromkeys(keys, ZERO))
    if not tree.is_full(depth):
        with pytest.raises(LookupError):
            [tree.siblings(index, depth) for index in range(2**depth)]
        return
    for index in range(2**depth):
        inside = sorted((key, ZERO) for key in keys if key[0] >> (8 - depth) == index)
        assert root_above(subtree_root(inside, depth), index, tree.siblings(index, depth)) == tree.root


def test_the_genesis_is_one_chunk() -> None:
    state = genesis_state(genesis_of())
    offered = Snapshot(state)
    assert offered.depth == 0
    assembly = Assembly(state.root, 0)
    assembly.add(offered.chunk(0))
    assert assembly.state().tables == state.tables


def test_a_chunk_of_another_depth_does_not_fit() -> None:
    with pytest.raises(Refused, match="of another depth"):
        Assembly(populous().root, snapshot().depth + 1).add(snapshot().chunk(0))


@pytest.mark.parametrize("spoil", [lambda d: d + b"\x00", lambda d: d[:-1], lambda d: bytes(5 << 20)])
def test_other_bytes_are_no_chunk(spoil: Callable[[bytes], bytes]) -> None:
    with pytest.raises(DecodeError):
        decode_chunk(spoil(encode(snapshot().chunk(0))))
