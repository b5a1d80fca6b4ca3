"""Who voted for a height: by the certificate of a final one, by what a running peer has heard of the next."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from chain.blocks import Block, Certificate, ValidatorSet, Vote, VoteKind
from chain.codec import encode
from chain.keys import peer_id


@dataclass(frozen=True)
class Deciding:
    """The height under decision: its validators, the view, its leader and the view's votes heard here."""

    height: int
    view: int
    leader: bytes
    validators: ValidatorSet
    votes: tuple[Vote, ...]


def certificate_line(block: Block, certificate: Certificate, validators: ValidatorSet) -> dict[str, Any]:
    """Return a finalization and who of the set signed it."""
    signers = frozenset(certificate.accounts(validators))
    return {
        "height": block.height,
        "view": certificate.view,
        "block_hash": certificate.block_hash.hex(),
        "signers": certificate.signers.hex(),
        **_signed(signers, validators),
        "signatures": [signature.hex() for signature in certificate.signatures],
        "validators_hash": block.header.validators_hash.hex(),
        "raw": encode(certificate).hex(),
    }


def final_votes(found: tuple[Block, Certificate], after: Block | None, validators: ValidatorSet) -> dict[str, Any]:
    """Return who finalized a block; votes that came late are in the certificate that the next block carries."""
    block, certificate = found
    signers = set(certificate.accounts(validators))
    later = after.parent_certificate if after is not None else None
    if later is not None:
        signers |= set(later.accounts(validators))
    return {
        **certificate_line(block, certificate, validators),
        "status": "final",
        "proposer": peer_id(block.header.proposer),
        **_weights(signers, validators),
        **_signed(frozenset(signers), validators),
    }


def votes_heard(deciding: Deciding) -> dict[str, Any]:
    """Return who has notarized, finalized or given up the view under decision, as far as it was heard."""
    by_kind = {kind: frozenset(v.validator for v in deciding.votes if v.kind == kind) for kind in VoteKind}
    answer = {
        "height": deciding.height,
        "status": "under-decision",
        "view": deciding.view,
        "leader": peer_id(deciding.leader),
        "block_hash": next((v.block_hash.hex() for v in deciding.votes if v.kind == VoteKind.NOTARIZE), None),
        **_weights(by_kind[VoteKind.FINALIZE], deciding.validators),
        **_signed(by_kind[VoteKind.FINALIZE], deciding.validators),
    }
    kinds = {"notarized": VoteKind.NOTARIZE, "nullified": VoteKind.NULLIFY}
    for voter, (account, _) in zip(answer["validators"], deciding.validators.members, strict=True):
        voter |= {name: account in by_kind[kind] for name, kind in kinds.items()}
    return answer


def _weights(signers: Iterable[bytes], validators: ValidatorSet) -> dict[str, str]:
    signed = sum(map(validators.power, signers))
    return {"power": str(validators.total), "quorum": str(validators.quorum), "signed_power": str(signed)}


def _signed(signers: frozenset[bytes], validators: ValidatorSet) -> dict[str, Any]:
    voters = [
        {"validator": peer_id(account), "power": str(power), "signed": account in signers}
        for account, power in validators.members
    ]
    return {"bitmap": [voter["signed"] for voter in voters], "validators": voters}
