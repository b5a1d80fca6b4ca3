"""The hashes below a trusted block: parents followed down from it before anything below it is believed. Pure.

Old validators' keys can sign any history below the trusted height, and a false one would be noticed only
there, with everything below it stored. A block's hash commits to all of its ancestors: whoever serves the
headers cannot lie about them, and what has another hash is refused by name.
"""

from collections.abc import Sequence

from chain.blocks import Header, Reason, Refused
from chain.engine_seam import Distrusted
from chain.light import Trust
from chain.sync import MAX_HEADERS, HeadersRequest

HASH_BYTES = 32


class TrustedPath:
    """Which block each height up to the trusted one must have, as far down as headers were followed."""

    def __init__(self, trust: Trust, chain_id: bytes) -> None:
        self.trust = trust
        self._chain_id = chain_id
        self._hashes = bytearray(trust.block_hash)  # from the trusted height downwards: 32 bytes a height

    @property
    def lowest(self) -> int:
        """The lowest height whose hash is known; 0 stands for the genesis."""
        return self.trust.height + 1 - len(self._hashes) // HASH_BYTES

    def wanted(self, tip: int) -> HeadersRequest | None:
        """Return what to ask for next on the way down to the own tip, None when it is reached."""
        count = min(self.lowest - tip, MAX_HEADERS)
        return HeadersRequest(self._chain_id, self.lowest, count) if count > 0 else None

    def extend(self, headers: Sequence[Header]) -> None:
        """Take headers in ascending order, up to the lowest known height.

        Raises `Refused` for headers that are not on the path, `Distrusted` when the trusted block itself
        is of another place.
        """
        known, height = bytearray(), self.lowest
        expected = self._hash(height)
        for header in reversed(headers):
            if header.hash != expected:
                raise Refused(Reason.WRONG_BLOCK, f"not on the way to the trusted block {self.trust}")
            if (header.chain_id, header.height) != (self._chain_id, height):
                raise Distrusted(f"The trusted block {self.trust} is of another height or another network")
            expected, height = header.parent, height - 1
            known += expected
        self._hashes += known

    def check(self, height: int, block_hash: bytes) -> None:
        """Raise `Distrusted` unless the own tip (the chain id at height 0) is on the path."""
        if height >= self.lowest and self._hash(height) != block_hash:
            raise Distrusted(
                f"block {height} of this peer is not below the trusted block {self.trust}; what it has stored is "
                "another history: move chain.db away and start again"
            )

    def allows(self, height: int, block_hash: bytes) -> bool:
        """Whether a block may become final here: above the trusted height any, below only what is known."""
        if height > self.trust.height:
            return True
        return height >= self.lowest and block_hash == self._hash(height)

    def forget(self) -> None:
        """Keep only the trusted block; the chain has passed it."""
        del self._hashes[HASH_BYTES:]

    def _hash(self, height: int) -> bytes:
        place = (self.trust.height - height) * HASH_BYTES
        return bytes(self._hashes[place : place + HASH_BYTES])
