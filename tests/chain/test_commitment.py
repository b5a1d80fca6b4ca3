"""A claim's Merkle root: every cell opens, nothing else does."""

import pytest

from chain.commitment import claim_root, is_member, leaf, prove
from chain.hashing import digest
from chain.transactions import Trace

SIZES = (1, 2, 3, 5, 8, 13)


def leaves_of(size: int) -> list[bytes]:
    return [digest("a leaf", bytes([i])) for i in range(size)]


@pytest.mark.parametrize("size", SIZES)
def test_every_leaf_opens_at_its_place_only(size: int) -> None:
    leaves = leaves_of(size)
    root = claim_root(leaves)
    for index, one in enumerate(leaves):
        proof = prove(leaves, index)
        for place in range(size):
            assert is_member(root, one, place, size, proof) == (place == index)


def test_no_proof_for_another_size_leaf_or_root() -> None:
    leaves = leaves_of(5)
    root, proof = claim_root(leaves), prove(leaves, 2)
    assert not is_member(root, leaves[2], 2, 9, proof)
    assert not is_member(root, leaves[1], 2, 5, proof)
    assert not is_member(claim_root(leaves[:4]), leaves[2], 2, 5, proof)
    assert not is_member(root, leaves[2], 2, 5, proof[:-1])
    assert not is_member(root, leaves[2], 2, 5, (*proof, bytes(32)))
    assert not is_member(root, leaves[2], -1, 5, proof)
    assert not is_member(root, leaves[2], 5, 5, proof)


def test_a_claim_has_a_cell() -> None:
    with pytest.raises(ValueError, match="at least one"):
        claim_root([])


def test_a_leaf_binds_salt_and_trace() -> None:
    trace = Trace(*(digest("part", bytes([i])) for i in range(7)))
    swapped = Trace(trace.y, trace.x, trace.gy, trace.gx, trace.gw, trace.boundaries, trace.state)
    assert len({leaf(bytes(32), trace), leaf(b"\x01" * 32, trace), leaf(bytes(32), swapped)}) == 3
