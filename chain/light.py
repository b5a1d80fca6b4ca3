"""The light client: headers followed from one that is trusted, without executing a block.

A header is believed when a quorum of its own validators signed it, and those validators are known:
either the header right before names them (an adjacent step), or signers with more than a third of the
trusted validators' power are among them (a skip), so that one honest validator vouches for them. Both
hold only while the trusted validators can still be punished: within the trusting period, two thirds
of the time that stake takes to unbond at the fastest block rate. Sources: Tendermint light client
(arXiv 2010.07031); weak subjectivity.
"""

from dataclasses import dataclass

from chain.blocks import (
    MAX_CLOCK_DRIFT_MS,
    Certificate,
    Header,
    Reason,
    Refused,
    ValidatorSet,
    Verifier,
    VoteKind,
    verify_certificate,
)
from chain.codec import MAX_OBJECT_BYTES, Record, decode
from chain.genesis import Genesis
from chain.params import Params
from chain.state import genesis_state


class LightBlock(Record, frozen=True):
    """A header, its finalization and the validators that signed it."""

    header: Header
    certificate: Certificate
    validators: ValidatorSet


@dataclass(frozen=True)
class Trust:
    """A block that somebody vouches for, out of band."""

    height: int
    block_hash: bytes

    @classmethod
    def parse(cls, text: str) -> "Trust":
        """Return the trust that HEIGHT:HASH says; raise `ValueError` with a sentence."""
        height, _, block_hash = text.partition(":")
        if not height.isdecimal() or not 0 < len(height) <= 18 or int(height) < 1:
            raise ValueError(f"{text[:100]!r} does not begin with a height; trust is written HEIGHT:HASH")
        try:
            digest = bytes.fromhex(block_hash)
        except ValueError:
            digest = b""
        if len(digest) != 32:
            raise ValueError(f"{text[:100]!r} does not end with a block hash of 64 hexadecimal digits")
        return cls(int(height), digest)

    def __str__(self) -> str:
        return f"{self.height}:{self.block_hash.hex()}"


@dataclass(frozen=True)
class Anchor:
    """What the next step is verified against: a trusted place and its validators."""

    height: int
    block_hash: bytes
    timestamp: int
    validators: ValidatorSet
    next_hash: bytes
    """Digest of the validators of the next height."""


def trusting_ms(params: Params) -> int:
    """Return the trusting period in milliseconds: two thirds of the least time that unbonding takes."""
    return 2 * params.unbonding_blocks * params.block_interval_ms // 3


def genesis_anchor(genesis: Genesis) -> Anchor:
    """Return the anchor that every peer of a network has."""
    validators = genesis_state(genesis).validators()
    return Anchor(0, genesis.chain_id, genesis.timestamp, validators, validators.hash)


def decode_light_block(data: bytes) -> LightBlock:
    """Return the light block that `data` encodes; raise `DecodeError`."""
    return decode(LightBlock, data, MAX_OBJECT_BYTES)


class NotEnoughTrust(Refused):
    """A skip too far: too little of the trusted power signed. A height in between may do."""

    def __init__(self) -> None:
        super().__init__(Reason.NO_TRUST, "too few of the trusted validators signed it")


class LightClient:
    """Follows headers from an anchor, or from the block that `trust` names, whichever is given.

    `period_ms` is the trusting period. With `trust` the first block that is taken must be the named one.
    """

    def __init__(
        self, chain_id: bytes, anchor: Anchor | None, trust: Trust | None, period_ms: int, check: Verifier
    ) -> None:
        if anchor is None and trust is None:
            raise ValueError("a light client starts from an anchor or from a trusted block")
        self._chain_id = chain_id
        self._trust = trust
        self._period_ms = period_ms
        self._check = check
        self._too_far: int | None = None
        self.anchor = None if trust is not None else anchor
        """The newest verified place; None until the trusted block is here."""

    def wanted(self, target: int) -> int:
        """Return the height to ask for next on the way to `target`: the target, or half of a skip refused."""
        if self.anchor is None:
            assert self._trust is not None
            return self._trust.height
        if self._too_far is None or self._too_far > target:
            return target
        return max(self.anchor.height + 1, (self.anchor.height + self._too_far) // 2)

    def update(self, block: LightBlock, now_ms: int) -> None:
        """Verify `block` and make it the anchor; raise `Refused`, `NotEnoughTrust` for a skip too far."""
        self._check_itself(block, now_ms)
        if self.anchor is None:
            self._check_trusted(block)
        else:
            self._check_step(self.anchor, block, now_ms)
        header = block.header
        self.anchor = Anchor(
            header.height, header.hash, header.timestamp, block.validators, header.next_validators_hash
        )
        self._too_far = None

    def _check_itself(self, block: LightBlock, now_ms: int) -> None:
        """Check what the block says of itself: its set, its finalization, its time."""
        header, certificate, validators = block.header, block.certificate, block.validators
        if header.chain_id != self._chain_id:
            raise Refused(Reason.WRONG_CHAIN)
        if validators != ValidatorSet.of(validators.powers.items()) or validators.hash != header.validators_hash:
            raise Refused(Reason.WRONG_VALIDATORS, "not the set that the header names")
        if certificate.kind != VoteKind.FINALIZE:
            raise Refused(Reason.WRONG_KIND)
        said = (certificate.chain_id, certificate.height, certificate.block_hash)
        if said != (header.chain_id, header.height, header.hash):
            raise Refused(Reason.WRONG_BLOCK, "the certificate is of another block")
        if header.timestamp > now_ms + MAX_CLOCK_DRIFT_MS:
            raise Refused(Reason.WRONG_TIME, "the header is from the future")
        verify_certificate(certificate, validators, self._check)

    def _check_trusted(self, block: LightBlock) -> None:
        assert self._trust is not None
        if (block.header.height, block.header.hash) != (self._trust.height, self._trust.block_hash):
            raise Refused(Reason.WRONG_BLOCK, f"not the trusted block {self._trust}")

    def _check_step(self, anchor: Anchor, block: LightBlock, now_ms: int) -> None:
        header = block.header
        if header.height <= anchor.height:
            raise Refused(Reason.WRONG_HEIGHT, f"{header.height} is not above {anchor.height}")
        if now_ms - anchor.timestamp > self._period_ms:
            raise Refused(Reason.TRUST_EXPIRED, f"height {anchor.height} is older than the trusting period")
        if header.timestamp <= anchor.timestamp:
            raise Refused(Reason.WRONG_TIME, "the header is not after the trusted one")
        if header.height == anchor.height + 1:
            if header.parent != anchor.block_hash:
                raise Refused(Reason.WRONG_BLOCK, "it does not follow the trusted block")
            if header.validators_hash != anchor.next_hash:
                raise Refused(Reason.WRONG_VALIDATORS, "not the set that the trusted header names for it")
            return
        signers = block.certificate.accounts(block.validators)
        if 3 * sum(map(anchor.validators.power, signers)) <= anchor.validators.total:
            self._too_far = header.height
            raise NotEnoughTrust
