"""A worker's commitment to its cells of one step: salted leaves under one Merkle root."""

from collections.abc import Sequence

from blake3 import blake3

from chain.codec import encode
from chain.hashing import digest
from chain.transactions import Trace


def leaf(salt: bytes, trace: Trace) -> bytes:
    """Return the 32-byte leaf of one cell's trace; without the salt nobody can test a guess."""
    return digest("claim leaf", salt, encode(trace))


def claim_root(leaves: Sequence[bytes]) -> bytes:
    """Return the Merkle root (RFC 6962 shape, BLAKE3) of at least one leaf."""
    if not leaves:
        raise ValueError("a claim has at least one cell")
    return _root([_leaf(one) for one in leaves])


def prove(leaves: Sequence[bytes], index: int) -> tuple[bytes, ...]:
    """Return the audit path of leaf `index`, from the leaf upwards."""
    return _path([_leaf(one) for one in leaves], index)


def is_member(root: bytes, one: bytes, index: int, size: int, proof: Sequence[bytes]) -> bool:
    """Whether `proof` shows `one` to be leaf `index` of `size` under `root`."""
    if not 0 <= index < size:
        return False
    sides = _sides(index, size)
    if len(sides) != len(proof):
        return False
    current = _leaf(one)
    for is_right, sibling in zip(sides, proof, strict=True):
        current = _node(sibling, current) if is_right else _node(current, sibling)
    return current == root


def _leaf(one: bytes) -> bytes:
    return blake3(b"\x00" + one).digest()


def _node(left: bytes, right: bytes) -> bytes:
    return blake3(b"\x01" + left + right).digest()


def _split(size: int) -> int:
    """Return the largest power of two below `size`."""
    return 1 << ((size - 1).bit_length() - 1)


def _root(hashes: Sequence[bytes]) -> bytes:
    if len(hashes) == 1:
        return hashes[0]
    split = _split(len(hashes))
    return _node(_root(hashes[:split]), _root(hashes[split:]))


def _path(hashes: Sequence[bytes], index: int) -> tuple[bytes, ...]:
    if len(hashes) == 1:
        return ()
    split = _split(len(hashes))
    if index < split:
        return (*_path(hashes[:split], index), _root(hashes[split:]))
    return (*_path(hashes[split:], index - split), _root(hashes[:split]))


def _sides(index: int, size: int) -> tuple[bool, ...]:
    """Return, from the leaf upwards, whether the leaf's subtree is the right one."""
    if size == 1:
        return ()
    split = _split(size)
    if index < split:
        return (*_sides(index, split), False)
    return (*_sides(index - split, size - split), True)
