"""Every decoder of the swarm's own messages: what was encoded comes back, anything else is refused by name."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chain.keys import PrivateKey, peer_id
from tdml_p2p.swarm.envelope import (
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
from tdml_p2p.swarm.inputs import (
    Descriptor,
    Input,
    InputsRefused,
    Wanted,
    decode_descriptor,
    decode_wanted,
    encode,
    merge,
)

TASK = bytes(range(32))
KEY = PrivateKey(bytes([7]) * 32)
PEER = peer_id(KEY.account)


@given(st.binary(max_size=300))
def test_any_bytes_are_an_envelope_or_refused(data: bytes) -> None:
    try:
        decode_envelope(data)
    except EnvelopeError as error:
        assert str(error)


@given(st.binary(max_size=300))
def test_any_bytes_are_a_request_or_refused(data: bytes) -> None:
    for decoder in (decode_wanted, decode_descriptor):
        try:
            decoder(data)
        except InputsRefused as error:
            assert str(error)


@given(st.integers(0, 2**31 - 1), st.integers(0, 2**31 - 1), st.integers(0, 255), st.integers(0, 1023))
def test_requests_come_back(generation: int, step: int, stage: int, cell: int) -> None:
    wanted = Wanted(TASK, generation, step, stage, cell)
    assert decode_wanted(encode(wanted)) == wanted


def test_an_oversized_reply_is_refused_before_it_is_read() -> None:
    with pytest.raises(InputsRefused, match="at most"):
        decode_descriptor(bytes(5000))


def test_a_tensor_is_proven_only_by_its_sender_in_its_message() -> None:
    header, address = b"header", bytes([1]) * 32
    proof = (address, KEY.sign(statement(TASK, header, address)))
    assert is_proven(TASK, PEER, header, proof)
    assert not is_proven(TASK, PEER, b"other", proof)
    assert not is_proven(bytes(32), PEER, header, proof)
    other = peer_id(PrivateKey(bytes([8]) * 32).account)
    assert not is_proven(TASK, other, header, proof)


def test_receipts_acknowledge_exactly_the_proofs_they_name() -> None:
    proofs = (bytes([1]) * 64, bytes([2]) * 64)
    given_receipts = receipt(TASK, KEY, proofs)
    assert is_acknowledged(TASK, PEER, given_receipts)
    assert not is_acknowledged(TASK, PEER, Receipts(proofs[:1], given_receipts.signature))
    assert decode_envelope(encode_envelope(given_receipts)) == given_receipts


def test_envelopes_come_back() -> None:
    carried = Carried(b"header", ((bytes(32), bytes(64)),))
    assert decode_envelope(encode_envelope(carried)) == carried


def test_inputs_are_merged_from_whoever_knows_them() -> None:
    x, gy = Input(bytes(32), PEER, bytes(64)), Input(bytes([1]) * 32, PEER, bytes(64))
    assert merge([Descriptor(x, None)]) is None
    merged = merge([Descriptor(x, None), Descriptor(None, gy)])
    assert merged is not None
    assert (merged.x, merged.gy) == (x, gy)
