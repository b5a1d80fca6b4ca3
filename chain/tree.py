"""A compressed sparse binary Merkle tree over 256-bit keys: persistent, incremental, with strict proofs.

A subtree of one leaf is that leaf; an empty subtree hashes to zero. Leaves and inner nodes hash with
the prefixes 0x00 and 0x01 (RFC 6962), so no node can stand for a leaf. Trees share unchanged nodes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from blake3 import blake3
from msgspec import Struct

from chain.hashing import ZERO

DEPTH = 256
MAX_PROOF_SIBLINGS = DEPTH


class Leaf(Struct, frozen=True, gc=False):
    """A key with the hash of its value."""

    key: bytes
    value: bytes
    hash: bytes


class Branch(Struct, frozen=True, gc=False):
    """Two subtrees, at least one of them not empty."""

    left: "Node"
    right: "Node"
    hash: bytes


Node = Leaf | Branch | None


@dataclass(frozen=True, slots=True)
class TreeProof:
    """Siblings from the root down to the place of a key, and the leaf found there, if any."""

    siblings: tuple[bytes, ...]
    leaf: tuple[bytes, bytes] | None


def _hash(node: Node) -> bytes:
    return ZERO if node is None else node.hash


def _leaf_hash(key: bytes, value: bytes) -> bytes:
    return blake3(b"\x00" + key + value).digest()


def _node_hash(left: bytes, right: bytes) -> bytes:
    return blake3(b"\x01" + left + right).digest()


def _bit(key: bytes, depth: int) -> int:
    return key[depth >> 3] >> (7 - (depth & 7)) & 1


def _branch(left: Node, right: Node) -> Node:
    if left is None and (right is None or isinstance(right, Leaf)):
        return right
    if right is None and isinstance(left, Leaf):
        return left
    return Branch(left, right, _node_hash(_hash(left), _hash(right)))


def _update(node: Node, changes: list[tuple[bytes, bytes | None]], depth: int) -> Node:
    """Return `node` with sorted `changes` (value None deletes) applied below `depth`."""
    if not changes:
        return node
    if node is None or isinstance(node, Leaf):
        if node is not None and all(key != node.key for key, _ in changes):
            changes = sorted([*changes, (node.key, node.value)])
        return _build([(key, value) for key, value in changes if value is not None], depth)
    split = next((i for i, (key, _) in enumerate(changes) if _bit(key, depth)), len(changes))
    return _branch(_update(node.left, changes[:split], depth + 1), _update(node.right, changes[split:], depth + 1))


def _build(leaves: list[tuple[bytes, bytes]], depth: int) -> Node:
    if not leaves:
        return None
    if len(leaves) == 1:
        key, value = leaves[0]
        return Leaf(key, value, _leaf_hash(key, value))
    split = next((i for i, (key, _) in enumerate(leaves) if _bit(key, depth)), len(leaves))
    return _branch(_build(leaves[:split], depth + 1), _build(leaves[split:], depth + 1))


@dataclass(frozen=True, slots=True)
class SparseTree:
    """An immutable tree; `update` returns the next one."""

    root_node: Node = field(default=None)

    @property
    def root(self) -> bytes:
        """The 32-byte root; zero for the empty tree."""
        return _hash(self.root_node)

    def update(self, changes: Mapping[bytes, bytes | None]) -> "SparseTree":
        """Return the tree with 32-byte keys set to 32-byte value hashes, or removed where None."""
        return SparseTree(_update(self.root_node, sorted(changes.items(), key=lambda item: item[0]), 0))

    def is_full(self, depth: int) -> bool:
        """Whether every place above `depth` is a branch, so that each of its 2^depth subtrees has siblings."""
        level = [self.root_node]
        for _ in range(depth):
            if not all(isinstance(node, Branch) for node in level):
                return False
            level = [child for node in level if isinstance(node, Branch) for child in (node.left, node.right)]
        return True

    def siblings(self, index: int, depth: int) -> tuple[bytes, ...]:
        """Return the hashes beside the path to subtree `index` of a tree that is full to `depth`, root first."""
        node, found = self.root_node, []
        for place in range(depth - 1, -1, -1):
            if not isinstance(node, Branch):
                raise LookupError(f"the tree is not full to depth {depth}")
            here, other = (node.right, node.left) if index >> place & 1 else (node.left, node.right)
            found.append(_hash(other))
            node = here
        return tuple(found)

    def prove(self, key: bytes) -> TreeProof:
        """Return the proof of the value at `key`, or of its absence."""
        node, siblings = self.root_node, []
        depth = 0
        while isinstance(node, Branch):
            here, other = (node.right, node.left) if _bit(key, depth) else (node.left, node.right)
            siblings.append(_hash(other))
            node, depth = here, depth + 1
        return TreeProof(tuple(siblings), None if node is None else (node.key, node.value))


def verify_proof(root: bytes, key: bytes, value: bytes | None, proof: TreeProof) -> bool:
    """Whether `proof` shows that `root` holds value hash `value` at `key`, or nothing when None."""
    if len(proof.siblings) > MAX_PROOF_SIBLINGS or len(key) != 32:
        return False
    if any(len(sibling) != 32 for sibling in proof.siblings):
        return False
    if proof.leaf is None:
        if value is not None:
            return False
        current = ZERO
    else:
        found, held = proof.leaf
        if len(found) != 32 or len(held) != 32 or (value is None) == (found == key) or value not in (None, held):
            return False
        if any(_bit(found, depth) != _bit(key, depth) for depth in range(len(proof.siblings))):
            return False
        current = _leaf_hash(found, held)
    for depth in range(len(proof.siblings) - 1, -1, -1):
        sibling = proof.siblings[depth]
        current = _node_hash(sibling, current) if _bit(key, depth) else _node_hash(current, sibling)
    return current == root


def subtree_root(leaves: list[tuple[bytes, bytes]], depth: int) -> bytes:
    """Return the hash of the subtree at `depth` with these (key, value hash) leaves, sorted, of one prefix."""
    return _hash(_build(leaves, depth))


def root_above(subtree: bytes, index: int, siblings: Sequence[bytes]) -> bytes:
    """Return the root of the tree in which `subtree` stands at place `index` of depth `len(siblings)`."""
    for place, sibling in enumerate(reversed(siblings)):
        subtree = _node_hash(sibling, subtree) if index >> place & 1 else _node_hash(subtree, sibling)
    return subtree
