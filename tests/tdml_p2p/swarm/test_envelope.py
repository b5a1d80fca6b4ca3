"""Proofs and receipts bind one peer, one task, one message and one tensor, and nothing else passes for them."""

import pytest

from chain.keys import PrivateKey, peer_id
from tdml_p2p.swarm.envelope import (
    MAX_MESSAGE_HEADER,
    MAX_RECEIPTS,
    Carried,
    EnvelopeError,
    Receipts,
    decode_envelope,
    encode_envelope,
    is_acknowledged,
    is_proven,
    receipt,
    statement,
)

TASK, OTHER_TASK = bytes(range(32)), bytes(32)
KEY, OTHER_KEY = PrivateKey(bytes([7]) * 32), PrivateKey(bytes([8]) * 32)
PEER, OTHER_PEER = peer_id(KEY.account), peer_id(OTHER_KEY.account)
HEADER, ADDRESS = b"header", bytes([3]) * 32
SIGNATURE = KEY.sign(statement(TASK, HEADER, ADDRESS))
PROOFS = tuple(bytes([number]) * 64 for number in range(3))


def test_a_proof_holds_for_what_was_signed() -> None:
    assert is_proven(TASK, PEER, HEADER, (ADDRESS, SIGNATURE))
    assert not is_proven(TASK, "nobody's name", HEADER, (ADDRESS, SIGNATURE))


@pytest.mark.parametrize(
    ("task", "peer", "header", "proof"),
    [
        (OTHER_TASK, PEER, HEADER, (ADDRESS, SIGNATURE)),
        (TASK, OTHER_PEER, HEADER, (ADDRESS, SIGNATURE)),
        (TASK, PEER, HEADER + b"x", (ADDRESS, SIGNATURE)),
        (TASK, PEER, HEADER, (bytes(32), SIGNATURE)),
        (TASK, PEER, HEADER, (ADDRESS, bytes(64))),
        (TASK, PEER, HEADER, (ADDRESS, SIGNATURE[:-1] + bytes([SIGNATURE[-1] ^ 1]))),
    ],
    ids=["task", "peer", "header", "address", "no-signature", "changed-signature"],
)
def test_a_proof_holds_for_nothing_else(task: bytes, peer: str, header: bytes, proof: tuple[bytes, bytes]) -> None:
    assert not is_proven(task, peer, header, proof)


def test_a_receipt_is_no_proof_and_a_proof_no_receipt() -> None:
    received = receipt(TASK, KEY, (ADDRESS * 2,))
    assert not is_proven(TASK, PEER, HEADER, (ADDRESS, received.signature))
    assert not is_acknowledged(TASK, PEER, Receipts((ADDRESS * 2,), SIGNATURE))


def test_a_receipt_holds_for_its_peer_task_and_proofs_in_order() -> None:
    received = receipt(TASK, KEY, PROOFS)
    assert is_acknowledged(TASK, PEER, received)
    assert not is_acknowledged(OTHER_TASK, PEER, received)
    assert not is_acknowledged(TASK, OTHER_PEER, received)
    for changed in (PROOFS[:2], PROOFS[::-1], (*PROOFS, bytes(64))):
        assert not is_acknowledged(TASK, PEER, Receipts(changed, received.signature))


@pytest.mark.parametrize("envelope", [Carried(HEADER, ((ADDRESS, SIGNATURE),) * 4), receipt(TASK, KEY, PROOFS)])
def test_envelopes_come_back(envelope: Carried | Receipts) -> None:
    assert decode_envelope(encode_envelope(envelope)) == envelope


@pytest.mark.parametrize(
    "envelope",
    [
        Carried(bytes(MAX_MESSAGE_HEADER + 1), ()),
        Carried(HEADER, ((ADDRESS, SIGNATURE),) * 5),
        Carried(HEADER, ((ADDRESS[:-1], SIGNATURE),)),
        Carried(HEADER, ((ADDRESS, SIGNATURE + b"x"),)),
        Receipts((), SIGNATURE),
        Receipts((bytes(64),) * (MAX_RECEIPTS + 1), SIGNATURE),
        Receipts((bytes(63),), SIGNATURE),
        Receipts(PROOFS, bytes(63)),
    ],
)
def test_envelopes_beyond_their_bounds_are_refused(envelope: Carried | Receipts) -> None:
    with pytest.raises(EnvelopeError):
        decode_envelope(encode_envelope(envelope))


def test_envelopes_at_their_bounds_are_read() -> None:
    for envelope in (Carried(bytes(MAX_MESSAGE_HEADER), ()), Receipts((bytes(64),) * MAX_RECEIPTS, SIGNATURE)):
        assert decode_envelope(encode_envelope(envelope)) == envelope
