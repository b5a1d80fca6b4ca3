"""Votes, certificates and proposals: what is authentic, what conflicts, and the bytes they have."""

import contextlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from chain.blocks import (
    MAX_MESSAGE_BYTES,
    Block,
    Certificate,
    ConsensusMessage,
    Header,
    Proposal,
    Reason,
    Refused,
    ValidatorSet,
    VerifiedSignatures,
    Vote,
    VoteKind,
    certify,
    decode_message,
    is_conflict,
    proposal_subject,
    transactions_root,
    verify_message,
    vote_bytes,
)
from chain.codec import DecodeError, encode
from chain.hashing import ZERO
from chain.keys import PrivateKey, verify

KEYS = [PrivateKey(bytes([i + 1]) * 32) for i in range(4)]
CHAIN = b"c" * 32
SET = ValidatorSet.of((key.account, 10) for key in KEYS)


def vote(key: PrivateKey, kind: VoteKind = VoteKind.NOTARIZE, block_hash: bytes = b"b" * 32) -> Vote:
    subject = ZERO if kind == VoteKind.NULLIFY else block_hash
    said = vote_bytes(kind, CHAIN, 5, 2, subject)
    return Vote(kind, CHAIN, 5, 2, subject, key.account, key.sign(said))


def block(height: int = 1) -> Block:
    certificate = None if height == 1 else certify([vote(key) for key in KEYS[:3]], SET)
    header = Header(
        chain_id=CHAIN,
        height=height,
        parent=CHAIN,
        proposer=KEYS[0].account,
        view=1,
        timestamp=7,
        transactions_root=transactions_root(()),
        certificate_hash=certificate.hash if certificate else ZERO,
        state_root=b"s" * 32,
        validators_hash=SET.hash,
        next_validators_hash=SET.hash,
        reveal=b"r" * 32,
        seed=b"d" * 32,
        leader_seed=b"l" * 32,
    )
    return Block(header, (), certificate)


def proposal(of: Block, key: PrivateKey = KEYS[0]) -> Proposal:
    subject = proposal_subject(of.hash, 0)
    said = vote_bytes(VoteKind.PROPOSE, CHAIN, of.height, 1, subject)
    return Proposal(Vote(VoteKind.PROPOSE, CHAIN, of.height, 1, subject, key.account, key.sign(said)), 0, of)


@pytest.mark.parametrize(("powers", "quorum"), [((1,), 1), ((1, 1), 2), ((1, 1, 1), 3), ((1,) * 4, 3), ((5, 1), 5)])
def test_quorum_is_more_than_two_thirds(powers: tuple[int, ...], quorum: int) -> None:
    validators = ValidatorSet.of((bytes([i]) * 32, power) for i, power in enumerate(powers))
    assert validators.quorum == quorum
    assert 3 * quorum > 2 * validators.total >= 3 * (quorum - 1)


def test_authentic_messages_pass_and_survive_encoding() -> None:
    certificate = certify([vote(key) for key in (KEYS[2], KEYS[0], KEYS[3])], SET)
    for message in (vote(KEYS[1]), certificate, proposal(block()), proposal(block(2))):
        again = decode_message(encode(message))
        assert again == message
        verify_message(again, SET, verify)
    assert len(encode(certificate)) == 275
    assert set(certificate.accounts(SET)) == {KEYS[i].account for i in (0, 2, 3)}


def changed(certificate: Certificate, **changes: object) -> Certificate:
    return structs.replace(certificate, **changes)


FALSE_CERTIFICATES: list[tuple[Reason, Callable[[Certificate], Certificate]]] = [
    (Reason.NO_QUORUM, lambda c: changed(c, signers=b"\x03", signatures=c.signatures[:2])),
    (Reason.BAD_BITMAP, lambda c: changed(c, signers=b"\x0f")),
    (Reason.BAD_BITMAP, lambda c: changed(c, signers=b"\x17", signatures=(*c.signatures, bytes(64)))),
    (Reason.BAD_BITMAP, lambda c: changed(c, signers=b"\x07\x00")),
    (Reason.BAD_SIGNATURE, lambda c: changed(c, signers=b"\x0b")),
    (Reason.BAD_SIGNATURE, lambda c: changed(c, view=3)),
    (Reason.BAD_SIGNATURE, lambda c: changed(c, height=6)),
    (Reason.BAD_SIGNATURE, lambda c: changed(c, chain_id=bytes(32))),
    (Reason.BAD_SIGNATURE, lambda c: changed(c, kind=VoteKind.FINALIZE)),
    (Reason.BAD_SIGNATURE, lambda c: changed(c, signatures=(c.signatures[0],) * 3)),
    (Reason.WRONG_BLOCK, lambda c: changed(c, block_hash=ZERO)),
    (Reason.WRONG_BLOCK, lambda c: changed(c, kind=VoteKind.NULLIFY)),
    (Reason.WRONG_KIND, lambda c: changed(c, kind=VoteKind.PROPOSE)),
]


@pytest.mark.parametrize("case", range(len(FALSE_CERTIFICATES)))
def test_false_certificate_is_refused(case: int) -> None:
    ordered = sorted(KEYS, key=lambda key: key.account)
    good = certify([vote(key) for key in ordered[:3]], SET)
    reason, falsify = FALSE_CERTIFICATES[case]
    with pytest.raises(Refused) as refusal:
        verify_message(falsify(good), SET, verify)
    assert refusal.value.reason == reason


def test_false_votes_and_proposals_are_refused() -> None:
    good = proposal(block())
    stranger = PrivateKey(bytes(32))
    cases: list[tuple[Reason, ConsensusMessage]] = [
        (Reason.UNKNOWN_VALIDATOR, vote(stranger)),
        (Reason.BAD_SIGNATURE, structs.replace(vote(KEYS[0]), view=9)),
        (Reason.WRONG_BLOCK, structs.replace(vote(KEYS[0]), block_hash=ZERO)),
        (Reason.WRONG_KIND, good.vote),
        (Reason.WRONG_BLOCK, structs.replace(good, parent_view=1)),
        (Reason.WRONG_BLOCK, structs.replace(good, block=block(2))),
        (Reason.WRONG_BLOCK, proposal(structs.replace(block(2), parent_certificate=None))),
        (Reason.WRONG_KIND, structs.replace(good, vote=vote(KEYS[0]))),
    ]
    for reason, message in cases:
        with pytest.raises(Refused) as refusal:
            verify_message(message, SET, verify)
        assert refusal.value.reason == reason


def test_conflicts_are_exactly_what_no_honest_validator_signs() -> None:
    one, two = b"1" * 32, b"2" * 32
    key, other = KEYS[0], KEYS[1]
    notarize, nullify, finalize = VoteKind.NOTARIZE, VoteKind.NULLIFY, VoteKind.FINALIZE
    assert is_conflict(vote(key, notarize, one), vote(key, notarize, two))
    assert is_conflict(vote(key, finalize, one), vote(key, finalize, two))
    assert is_conflict(vote(key, notarize, one), vote(key, finalize, two))
    assert is_conflict(vote(key, nullify), vote(key, finalize, one))
    assert is_conflict(vote(key, VoteKind.PROPOSE, one), vote(key, VoteKind.PROPOSE, two))
    assert not is_conflict(vote(key, notarize, one), vote(key, notarize, one))
    assert not is_conflict(vote(key, notarize, one), vote(key, nullify))
    assert not is_conflict(vote(key, notarize, one), vote(key, finalize, one))
    assert not is_conflict(vote(key, notarize, one), vote(other, notarize, two))
    later = structs.replace(vote(key, notarize, two), view=3)
    assert not is_conflict(vote(key, notarize, one), later)


def test_a_signature_is_checked_once_and_failures_are_not_remembered() -> None:
    calls: list[bytes] = []

    def check(account: bytes, message: bytes, signature: bytes) -> bool:
        calls.append(message)
        return signature == b"good"

    known = VerifiedSignatures(check, capacity=2)
    assert [known(b"a", b"m", b"good") for _ in range(3)] == [True] * 3
    assert [known(b"a", b"m", b"bad") for _ in range(2)] == [False] * 2
    assert len(calls) == 3
    assert known(b"a", b"2", b"good")
    assert known(b"a", b"3", b"good")
    assert known(b"a", b"m", b"good")
    assert len(calls) == 6


@given(st.binary(max_size=400))
def test_any_bytes_decode_or_raise_decode_error(data: bytes) -> None:
    with contextlib.suppress(DecodeError):
        assert encode(decode_message(data)) == data


@given(st.integers(0, 300), st.integers(0, 255))
def test_a_changed_byte_never_gives_the_same_message(position: int, value: int) -> None:
    message = certify([vote(key) for key in KEYS[:3]], SET)
    data = bytearray(encode(message))
    data[position % len(data)] = value
    with contextlib.suppress(DecodeError):
        assert (decode_message(bytes(data)) == message) == (bytes(data) == encode(message))


def test_oversized_messages_are_refused() -> None:
    with pytest.raises(DecodeError):
        decode_message(bytes(MAX_MESSAGE_BYTES + 1))
