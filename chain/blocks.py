"""Blocks, votes and certificates: the records of consensus, their digests and their authentication.

Everything signed names the chain, the height and the view. A proposal is signed through a vote of
kind `PROPOSE` over the digest of (block, parent view), so that evidence is always two small votes.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from enum import IntEnum, StrEnum
from functools import cached_property
from typing import Annotated

from msgspec import Meta

from chain.codec import AccountId, DecodeError, Hash, Record, SignatureBytes, Uint, decode, encode
from chain.hashing import ZERO, digest
from chain.keys import verify
from chain.transactions import Transaction

MAX_VALIDATORS = 256
MAX_VIEW = 2**31
MAX_BLOCK_BYTES = 1024 * 1024
MAX_TRANSACTIONS = 8192
MAX_VOTE_BYTES = 256
MAX_CERTIFICATE_BYTES = 256 + MAX_VALIDATORS * 66
MAX_MESSAGE_BYTES = MAX_BLOCK_BYTES + 1024

MAX_CLOCK_DRIFT_MS = 10_000
"""How far a timestamp may lie ahead of the local clock."""

View = Annotated[int, Meta(ge=1, le=MAX_VIEW)]
Verifier = Callable[[bytes, bytes, bytes], bool]
"""(account, message, signature) -> whether the signature is the account's."""


class Reason(StrEnum):
    """Why a consensus object is refused."""

    MALFORMED = "malformed"
    WRONG_CHAIN = "wrong-chain"
    WRONG_HEIGHT = "wrong-height"
    WRONG_KIND = "wrong-kind"
    UNKNOWN_VALIDATOR = "unknown-validator"
    BAD_SIGNATURE = "bad-signature"
    BAD_BITMAP = "bad-bitmap"
    NO_QUORUM = "no-quorum"
    WRONG_BLOCK = "wrong-block"
    WRONG_CHUNK = "wrong-chunk"
    WRONG_VALIDATORS = "wrong-validators"
    WRONG_TIME = "wrong-time"
    WRONG_PROOF = "wrong-proof"
    NO_TRUST = "no-trust"
    TRUST_EXPIRED = "trust-expired"
    EMPTY_ANSWER = "empty-answer"
    TOO_MANY_BLOCKS = "too-many-blocks"


class Refused(ValueError):
    """A consensus object that breaks a rule; `reason` names it."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else str(reason))
        self.reason = reason


class VoteKind(IntEnum):
    """What a signed vote says."""

    PROPOSE = 0
    NOTARIZE = 1
    NULLIFY = 2
    FINALIZE = 3


class ValidatorSet(Record, frozen=True, dict=True):
    """The validators of one height as (account, power), ascending by account, every power positive."""

    members: Annotated[
        tuple[tuple[AccountId, Annotated[int, Meta(ge=1, le=2**63 - 1)]], ...],
        Meta(max_length=MAX_VALIDATORS),
    ]

    @classmethod
    def of(cls, powers: Iterable[tuple[bytes, int]]) -> "ValidatorSet":
        """Return the canonical set of these (account, power) pairs."""
        return cls(tuple(sorted(powers)))

    @cached_property
    def powers(self) -> dict[bytes, int]:
        """Power by account."""
        return dict(self.members)

    @cached_property
    def positions(self) -> dict[bytes, int]:
        """Place in the bitmap by account."""
        return {account: index for index, (account, _) in enumerate(self.members)}

    @cached_property
    def total(self) -> int:
        """Sum of all power, W."""
        return sum(power for _, power in self.members)

    @property
    def quorum(self) -> int:
        """The least power of a certificate: floor(2W/3) + 1."""
        return 2 * self.total // 3 + 1

    @cached_property
    def hash(self) -> bytes:
        """32-byte digest of the set."""
        return digest("validators", encode(self))

    def power(self, account: bytes) -> int:
        """Return the power of `account`, 0 outside the set."""
        return self.powers.get(account, 0)

    def __contains__(self, account: bytes) -> bool:
        return account in self.powers

    def __len__(self) -> int:
        return len(self.members)


class Vote(Record, frozen=True, dict=True, tag=2):
    """One validator's signed statement about one view; `block_hash` is zero for a nullification."""

    kind: VoteKind
    chain_id: Hash
    height: Uint
    view: View
    block_hash: Hash
    validator: AccountId
    signature: SignatureBytes

    @cached_property
    def signing_bytes(self) -> bytes:
        """The digest that the signature covers."""
        return vote_bytes(self.kind, self.chain_id, self.height, self.view, self.block_hash)


class Certificate(Record, frozen=True, dict=True, tag=3):
    """A quorum of equal votes: bitmap over the ordered set, then the signatures in that order."""

    kind: VoteKind
    chain_id: Hash
    height: Uint
    view: View
    block_hash: Hash
    signers: Annotated[bytes, Meta(min_length=1, max_length=(MAX_VALIDATORS + 7) // 8)]
    signatures: Annotated[tuple[SignatureBytes, ...], Meta(min_length=1, max_length=MAX_VALIDATORS)]

    @cached_property
    def hash(self) -> bytes:
        """32-byte digest of the certificate."""
        return digest("certificate", encode(self))

    def accounts(self, validators: ValidatorSet) -> tuple[bytes, ...]:
        """Return the signers in order; raise `Refused` when the bitmap does not fit the set."""
        return _signers(self.signers, validators)


class Header(Record, frozen=True, dict=True):
    """What a block hash commits to. `state_root` is the state after this block."""

    chain_id: Hash
    height: Annotated[int, Meta(ge=1, le=2**63 - 1)]
    parent: Hash
    """Hash of the parent's header; the chain id at height 1."""
    proposer: AccountId
    view: View
    """The view of the block's first proposal."""
    timestamp: Uint
    """Milliseconds since the Unix epoch, greater than the parent's."""
    transactions_root: Hash
    certificate_hash: Hash
    """Digest of the parent's finalization in the body; zero at height 1."""
    state_root: Hash
    validators_hash: Hash
    next_validators_hash: Hash
    reveal: Hash
    """The proposer's next onion preimage."""
    seed: Hash
    leader_seed: Hash
    """The seed that this height's leaders are drawn from."""

    @cached_property
    def hash(self) -> bytes:
        """The block hash."""
        return digest("header", encode(self))


class Block(Record, frozen=True, dict=True):
    """A header, its transactions and the finalization of its parent (None at height 1)."""

    header: Header
    transactions: Annotated[tuple[Transaction, ...], Meta(max_length=MAX_TRANSACTIONS)]
    parent_certificate: Certificate | None

    @property
    def hash(self) -> bytes:
        """The hash of the header."""
        return self.header.hash

    @property
    def height(self) -> int:
        """The height of the header."""
        return self.header.height

    @cached_property
    def is_consistent(self) -> bool:
        """Whether the header commits to this body."""
        certificate = self.parent_certificate
        return (
            self.header.transactions_root == transactions_root(self.transactions)
            and self.header.certificate_hash == (certificate.hash if certificate else ZERO)
            and (certificate is None) == (self.header.height == 1)
        )


class Proposal(Record, frozen=True, dict=True, tag=1):
    """A leader's block for a view, built on the notarization of `parent_view` (0: a fresh block)."""

    vote: Vote
    parent_view: Annotated[int, Meta(ge=0, le=MAX_VIEW)]
    block: Block


ConsensusMessage = Proposal | Vote | Certificate


class BlockContext(Record, frozen=True):
    """What the ledger needs of a header beside the transactions."""

    chain_id: Hash
    height: Uint
    timestamp: Uint
    proposer: AccountId
    reveal: Hash
    seed: Hash
    parent_absent: tuple[AccountId, ...]
    """Which validators of the parent's height did not sign its finalization; whoever joined since owed nothing."""


def transactions_root(transactions: Iterable[Transaction]) -> bytes:
    """Return the digest of the ordered transaction ids."""
    return digest("transactions", *(transaction.tx_id for transaction in transactions))


def proposal_subject(block_hash: bytes, parent_view: int) -> bytes:
    """Return the digest that a `PROPOSE` vote carries as its block hash."""
    return digest("proposal subject", block_hash, parent_view.to_bytes(8, "big"))


def vote_bytes(kind: VoteKind, chain_id: bytes, height: int, view: int, block_hash: bytes) -> bytes:
    """Return the domain-separated digest that a vote's signature covers."""
    return digest("vote", chain_id, bytes([kind]), height.to_bytes(8, "big"), view.to_bytes(8, "big"), block_hash)


def is_conflict(first: Vote, second: Vote) -> bool:
    """Whether an honest validator cannot have signed both votes (the one slashing rule of consensus)."""
    same = (first.chain_id, first.height, first.view, first.validator)
    if same != (second.chain_id, second.height, second.view, second.validator):
        return False
    kinds = {first.kind, second.kind}
    if kinds == {VoteKind.NULLIFY, VoteKind.FINALIZE}:
        return True
    if len(kinds) == 1 or kinds == {VoteKind.NOTARIZE, VoteKind.FINALIZE}:
        return first.block_hash != second.block_hash
    return False


def certify(votes: Iterable[Vote], validators: ValidatorSet) -> Certificate:
    """Return the certificate of these equal votes of distinct members (weight unchecked)."""
    ordered = sorted(votes, key=lambda vote: validators.positions[vote.validator])
    bitmap = bytearray((len(validators) + 7) // 8)
    for vote in ordered:
        position = validators.positions[vote.validator]
        bitmap[position // 8] |= 1 << (position % 8)
    first = ordered[0]
    return Certificate(
        first.kind,
        first.chain_id,
        first.height,
        first.view,
        first.block_hash,
        bytes(bitmap),
        tuple(vote.signature for vote in ordered),
    )


def _signers(bitmap: bytes, validators: ValidatorSet) -> tuple[bytes, ...]:
    size = len(validators)
    if len(bitmap) != (size + 7) // 8 or int.from_bytes(bitmap, "little") >> size:
        raise Refused(Reason.BAD_BITMAP)
    return tuple(account for i, (account, _) in enumerate(validators.members) if bitmap[i // 8] >> (i % 8) & 1)


class VerifiedSignatures:
    """A `Verifier` that remembers what it has verified, so that no signature is checked twice."""

    def __init__(self, check: Verifier = verify, capacity: int = 65_536) -> None:
        self._check = check
        self._capacity = capacity
        self._known: OrderedDict[tuple[bytes, bytes, bytes], None] = OrderedDict()

    def __call__(self, account: bytes, message: bytes, signature: bytes) -> bool:
        entry = (account, message, signature)
        if entry in self._known:
            return True
        if not self._check(account, message, signature):
            return False
        self._known[entry] = None
        if len(self._known) > self._capacity:
            self._known.popitem(last=False)
        return True


def verify_vote(vote: Vote, validators: ValidatorSet, check: Verifier) -> None:
    """Raise `Refused` unless a member signed this vote."""
    if (vote.kind == VoteKind.NULLIFY) != (vote.block_hash == ZERO):
        raise Refused(Reason.WRONG_BLOCK, "a nullification names no block, every other vote one")
    if vote.validator not in validators:
        raise Refused(Reason.UNKNOWN_VALIDATOR)
    if not check(vote.validator, vote.signing_bytes, vote.signature):
        raise Refused(Reason.BAD_SIGNATURE)


def verify_certificate(certificate: Certificate, validators: ValidatorSet, check: Verifier) -> None:
    """Raise `Refused` unless a quorum of the set signed what this certificate says."""
    if certificate.kind == VoteKind.PROPOSE:
        raise Refused(Reason.WRONG_KIND)
    if (certificate.kind == VoteKind.NULLIFY) != (certificate.block_hash == ZERO):
        raise Refused(Reason.WRONG_BLOCK)
    accounts = certificate.accounts(validators)
    if len(accounts) != len(certificate.signatures):
        raise Refused(Reason.BAD_BITMAP)
    if sum(validators.power(account) for account in accounts) < validators.quorum:
        raise Refused(Reason.NO_QUORUM)
    message = vote_bytes(
        certificate.kind,
        certificate.chain_id,
        certificate.height,
        certificate.view,
        certificate.block_hash,
    )
    if not all(map(check, accounts, [message] * len(accounts), certificate.signatures)):
        raise Refused(Reason.BAD_SIGNATURE)


def verify_proposal(proposal: Proposal, validators: ValidatorSet, check: Verifier) -> None:
    """Raise `Refused` unless a member signed this proposal of a self-consistent block of its height."""
    vote, block = proposal.vote, proposal.block
    if vote.kind != VoteKind.PROPOSE:
        raise Refused(Reason.WRONG_KIND)
    if vote.block_hash != proposal_subject(block.hash, proposal.parent_view):
        raise Refused(Reason.WRONG_BLOCK)
    verify_vote(vote, validators, check)
    header = block.header
    if (header.chain_id, header.height) != (vote.chain_id, vote.height) or not block.is_consistent:
        raise Refused(Reason.WRONG_BLOCK)


def verify_message(message: ConsensusMessage, validators: ValidatorSet, check: Verifier) -> None:
    """Raise `Refused` unless `message` is authentic for a height with these validators."""
    match message:
        case Proposal():
            verify_proposal(message, validators, check)
        case Certificate():
            verify_certificate(message, validators, check)
        case Vote():
            if message.kind == VoteKind.PROPOSE:
                raise Refused(Reason.WRONG_KIND, "a bare proposal vote is evidence, not a message")
            verify_vote(message, validators, check)


def chain_of(message: ConsensusMessage) -> tuple[bytes, int]:
    """Return the (chain id, height) that a message speaks of."""
    vote = message.vote if isinstance(message, Proposal) else message
    return vote.chain_id, vote.height


def decode_message(data: bytes) -> ConsensusMessage:
    """Return the consensus message in `data`; raise `DecodeError` beyond the bounds of its kind."""
    message: ConsensusMessage = decode(ConsensusMessage, data, MAX_MESSAGE_BYTES)
    if isinstance(message, Vote) and len(data) > MAX_VOTE_BYTES:
        raise DecodeError("oversized vote")
    return message
