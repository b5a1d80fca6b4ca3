"""The beacon: hash onions that feed a seed, and the draws that are made from a seed.

Each validator commits to the tip x_N = H^N(secret) and reveals one preimage per block it proposes;
the seed then becomes H(seed, reveal). A proposer can only withhold a reveal, never choose it.
"""

from collections.abc import Sequence
from functools import lru_cache

from chain.blocks import ValidatorSet
from chain.hashing import digest
from chain.keys import PrivateKey

CHECKPOINT = 256
"""Layers between remembered ones: a reveal costs at most this many hashes."""
ONION_LENGTH = 2**17
"""Blocks that a validator can propose with one onion."""


def peel(reveal: bytes) -> bytes:
    """Return the layer above `reveal`: what a committed tip must equal for `reveal` to open it."""
    return digest("onion", reveal)


class Onion:
    """The hash onion H^N of a secret, N = `length`, with reveals from the tip downwards."""

    def __init__(self, secret: bytes, length: int) -> None:
        self.length = length
        self._found = length // CHECKPOINT
        self._checkpoints: list[bytes] = []
        layer = digest("onion secret", secret)
        for index in range(length + 1):
            if index % CHECKPOINT == 0:
                self._checkpoints.append(layer)
            self.tip = layer
            layer = peel(layer)

    def layer(self, index: int) -> bytes:
        """Return H^index of the secret, 0 <= index <= length; raise `IndexError` outside."""
        if not 0 <= index <= self.length:
            raise IndexError(f"layer {index} of an onion of {self.length}")
        layer = self._checkpoints[index // CHECKPOINT]
        for _ in range(index % CHECKPOINT):
            layer = peel(layer)
        return layer

    def reveal(self, used: int) -> bytes:
        """Return the preimage to reveal when `used` layers below the tip are public."""
        return self.layer(self.length - 1 - used)

    def left(self, tip: bytes) -> int:
        """Return how many layers lie below the layer `tip`; raise `LookupError` for none or another's tip.

        Looks first where the last one was found: tips move downwards, one layer a proposal.
        """
        starts = range(len(self._checkpoints) - 1, -1, -1)
        for start in sorted(starts, key=lambda start: start not in (self._found, self._found - 1)):
            layer, index = self._checkpoints[start], start * CHECKPOINT
            while index < min(self.length, (start + 1) * CHECKPOINT):
                layer, index = peel(layer), index + 1
                if layer == tip:
                    self._found = start
                    return index
        raise LookupError("the tip is not a layer of this onion, or the onion is used up")

    def below(self, tip: bytes) -> bytes:
        """Return the preimage of the layer `tip`; raise `LookupError` when no layer below opens it."""
        return self.layer(self.left(tip) - 1)


@lru_cache(maxsize=16)
def onion_of(key: PrivateKey, number: int = 0) -> Onion:
    """Return one of the onions of a validator's key, derived from its secret seed; they are used in order."""
    secret = digest("onion of key", key.seed, *([number.to_bytes(8, "big")] if number else []))
    return Onion(secret, ONION_LENGTH)


def next_seed(seed: bytes, reveal: bytes) -> bytes:
    """Return the seed after a block whose proposer revealed `reveal`."""
    return digest("seed", seed, reveal)


def uniform(seed: bytes, bound: int) -> int:
    """Return an integer in [0, bound) from `seed`; bias below 2^-128 for bounds below 2^128."""
    wide = digest("uniform low", seed) + digest("uniform high", seed)
    return int.from_bytes(wide, "big") % bound


def weighted_draw(candidates: Sequence[tuple[bytes, int]], seed: bytes, count: int) -> tuple[bytes, ...]:
    """Return up to `count` distinct names, drawn by weight without replacement.

    The result depends on the set of candidates, not on their order; weight 0 is never drawn.
    """
    left = sorted(candidate for candidate in candidates if candidate[1] > 0)
    total = sum(weight for _, weight in left)
    drawn: list[bytes] = []
    while left and len(drawn) < count:
        ticket = uniform(digest("draw", seed, len(drawn).to_bytes(8, "big")), total)
        index = 0
        while ticket >= left[index][1]:
            ticket -= left[index][1]
            index += 1
        name, weight = left.pop(index)
        total -= weight
        drawn.append(name)
    return tuple(drawn)


def chance(seed: bytes, label: bytes, basis_points: int) -> bool:
    """Whether the event `label` happens under `seed`, with probability basis_points / 10,000."""
    return uniform(digest("chance", seed, label), 10_000) < basis_points


@lru_cache(maxsize=64)
def _order(validators: ValidatorSet, seed: bytes, height: int, lap: int) -> tuple[bytes, ...]:
    draw = digest("leaders", seed, height.to_bytes(8, "big"), lap.to_bytes(8, "big"))
    return weighted_draw(validators.members, draw, len(validators))


def leader(validators: ValidatorSet, seed: bytes, height: int, view: int) -> bytes:
    """Return the leader of (height, view), views counted from 1.

    Views 1 … n are led by the whole set in a stake-weighted order without replacement, views n+1 … 2n
    by a fresh draw, and so on: no silent validator leads twice before every other has led once.
    """
    lap, place = divmod(view - 1, len(validators))
    return _order(validators, seed, height, lap)[place]
