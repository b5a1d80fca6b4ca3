"""The state tree: incremental equals from scratch, proofs of membership and absence, false proofs."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chain.hashing import ZERO, digest
from chain.tree import SparseTree, TreeProof, verify_proof

VALUE = digest("value")


def key_of(index: int) -> bytes:
    return digest("tree key", index.to_bytes(4, "big"))


def value_of(index: int) -> bytes:
    return digest("tree value", index.to_bytes(4, "big"))


def tree_of(count: int) -> SparseTree:
    return SparseTree().update({key_of(i): value_of(i) for i in range(count)})


# few keys with long common prefixes, so that branches appear, collapse and move
NEAR = [bytes(31) + bytes([i]) for i in range(8)] + [bytes([i]) + bytes(31) for i in (1, 64, 128, 192)]
CHANGES = st.lists(
    st.dictionaries(st.sampled_from(NEAR), st.none() | st.sampled_from([VALUE, digest("other")])), max_size=8
)


@given(CHANGES)
@settings(max_examples=60, deadline=None)
def test_incremental_updates_equal_a_tree_from_scratch(batches: list[dict[bytes, bytes | None]]) -> None:
    tree, content = SparseTree(), {}
    for batch in batches:
        tree = tree.update(batch)
        content.update(batch)
        content = {key: value for key, value in content.items() if value is not None}
        assert tree.root == SparseTree().update(content).root
    for key in NEAR:
        assert verify_proof(tree.root, key, content.get(key), tree.prove(key))


def test_the_empty_tree_has_the_zero_root() -> None:
    assert SparseTree().root == ZERO
    assert verify_proof(ZERO, key_of(0), None, SparseTree().prove(key_of(0)))
    assert tree_of(10).update({key_of(i): None for i in range(10)}).root == ZERO


def test_the_root_does_not_depend_on_the_order() -> None:
    indices = list(range(100))
    random.Random(7).shuffle(indices)
    tree = SparseTree()
    for index in indices:
        tree = tree.update({key_of(index): value_of(index)})
    assert tree.root == tree_of(100).root


def test_updates_leave_the_tree_before_untouched() -> None:
    before = tree_of(20)
    root = before.root
    before.update({key_of(3): None, key_of(50): VALUE})
    assert before.root == root


def test_a_proof_shows_one_value_at_one_key_under_one_root() -> None:
    tree = tree_of(50)
    proof = tree.prove(key_of(7))
    assert verify_proof(tree.root, key_of(7), value_of(7), proof)
    assert not verify_proof(tree.root, key_of(7), value_of(8), proof)
    assert not verify_proof(tree.root, key_of(7), None, proof)
    assert not verify_proof(tree.root, key_of(8), value_of(7), proof)
    assert not verify_proof(tree_of(51).root, key_of(7), value_of(7), proof)


def test_an_absence_is_shown_by_what_stands_in_the_place() -> None:
    tree = tree_of(50)
    for missing in range(50, 90):
        proof = tree.prove(key_of(missing))
        assert verify_proof(tree.root, key_of(missing), None, proof)
        assert not verify_proof(tree.root, key_of(missing), VALUE, proof)


def test_no_absence_of_what_is_there() -> None:
    tree = tree_of(50)
    for other in range(50):
        if other != 7:
            assert not verify_proof(tree.root, key_of(7), None, tree.prove(key_of(other)))


def malformed(proof: TreeProof) -> list[TreeProof]:
    siblings, leaf = proof.siblings, proof.leaf
    assert leaf is not None
    return [
        TreeProof(siblings[:-1], leaf),
        TreeProof((*siblings, ZERO), leaf),
        TreeProof((), leaf),
        TreeProof(siblings, None),
        TreeProof(siblings[::-1], leaf),
        TreeProof((b"", *siblings[1:]), leaf),
        TreeProof((siblings[0] + b"\x00", *siblings[1:]), leaf),
        TreeProof(tuple([ZERO] * 257), leaf),
        TreeProof(siblings, (leaf[0], b"")),
        TreeProof(siblings, (leaf[0][:-1], leaf[1])),
        TreeProof(siblings, (leaf[1], leaf[0])),
        TreeProof(siblings, (key_of(8), value_of(8))),
    ]


@pytest.mark.parametrize("case", range(12))
def test_malformed_proofs_prove_nothing(case: int) -> None:
    tree = tree_of(50)
    false = malformed(tree.prove(key_of(7)))[case]
    assert not verify_proof(tree.root, key_of(7), value_of(7), false)
    assert not verify_proof(tree.root, key_of(7), None, false)


def test_keys_of_another_length_are_refused() -> None:
    tree = tree_of(5)
    assert not verify_proof(tree.root, key_of(1)[:31], value_of(1), tree.prove(key_of(1)))


def test_a_branch_cannot_pass_for_a_leaf() -> None:
    tree = SparseTree().update({bytes(32): VALUE, b"\x80" + bytes(31): VALUE})
    left, right = tree.prove(b"\x80" + bytes(31)).siblings[0], tree.prove(bytes(32)).siblings[0]
    assert not verify_proof(tree.root, left, right, TreeProof((), (left, right)))
