"""The envelope and its payloads: encoding, signature, fuzz."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from chain.codec import DecodeError, encode
from chain.hashing import digest
from chain.transactions import (
    MAX_TRANSACTION_BYTES,
    Bond,
    Claim,
    CloseTask,
    Commit,
    Commitment,
    Evidence,
    Faucet,
    LeaveSeat,
    Open,
    Opening,
    Payload,
    PostTask,
    RegisterValidator,
    RenewLease,
    Reveal,
    RevealAll,
    SubmitClaims,
    TakeSeat,
    TopUp,
    Trace,
    Transaction,
    Transfer,
    Unbond,
    Unjail,
    Unsigned,
    WatchWorker,
    Withdraw,
    decode_transaction,
    sign,
)
from tests.chain.ledger_kit import KEYS

H = [digest("sample", bytes([i])) for i in range(12)]
SKETCH = bytes(range(96)) * 4

PAYLOADS: tuple[Payload, ...] = (
    Transfer(H[0], 5),
    Bond(6),
    Unbond(7),
    Withdraw(),
    RegisterValidator(H[1]),
    Unjail(),
    Faucet(),
    PostTask(H[0], 2, 3, 40, 8, 10, 12_800, 5000, 1000, 4, 100, 5, 3),
    TopUp(H[2], 8),
    CloseTask(H[3]),
    TakeSeat(H[4], H[5]),
    RenewLease(H[6]),
    LeaveSeat(H[7]),
    SubmitClaims((Claim(H[0], 1, 2, 1, (0, 3, 7), H[1], H[2], H[3]),)),
    Commit((Commitment(H[0], 0, H[1]), Commitment(H[2], 2, H[3]))),
    Open((Opening(H[0], H[1], Trace(*H[2:9]), (H[9], H[10]), SKETCH),)),
    RevealAll((Reveal(H[0], 1, H[1], SKETCH, SKETCH, True, False),)),
    Evidence(b"first", b"second"),
    WatchWorker(H[0], H[1]),
)


def transaction_of(payload: Payload) -> Transaction:
    body = Unsigned(1, H[11], KEYS[0].account, 3, 10, 110, 25, b"memo", payload)
    return sign(KEYS[0], body)


ENCODED = [encode(transaction_of(payload)) for payload in PAYLOADS]


@pytest.mark.parametrize("payload", PAYLOADS, ids=lambda payload: type(payload).__name__)
def test_every_kind_survives_its_encoding(payload: Payload) -> None:
    transaction = transaction_of(payload)
    again = decode_transaction(encode(transaction))
    assert again == transaction
    assert again.is_signed()
    assert again.tx_id == transaction.tx_id


def test_the_signature_covers_every_field_and_the_id_the_signature() -> None:
    transaction = transaction_of(PAYLOADS[0])
    body = transaction.body
    changes = [
        {"chain_id": H[0]},
        {"sender": KEYS[1].account},
        {"nonce": 4},
        {"valid_from": 9},
        {"valid_until": 111},
        {"fee": 24},
        {"memo": b""},
        {"payload": Transfer(H[0], 6)},
    ]
    for change in changes:
        other = Transaction(structs.replace(body, **change), transaction.signature)
        assert not other.is_signed()
        assert other.tx_id != transaction.tx_id
    assert Transaction(body, bytes(64)).tx_id != transaction.tx_id


@given(st.binary(max_size=2048))
@settings(max_examples=200, deadline=None)
def test_arbitrary_bytes_only_raise_a_decode_error(data: bytes) -> None:
    with pytest.raises(DecodeError):
        decode_transaction(data)


@given(
    st.sampled_from(ENCODED),
    st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=4),
    st.integers(-8, 8),
)
@settings(max_examples=300, deadline=None)
def test_mutated_transactions_are_refused_or_another_canonical_transaction(
    encoded: bytes, flips: list[tuple[int, int]], length: int
) -> None:
    data = bytearray(encoded[:length] if length < 0 else encoded + bytes(length))
    for place, value in flips:
        data[place % len(data)] = value
    try:
        found = decode_transaction(bytes(data))
    except DecodeError:
        return
    assert encode(found) == bytes(data)
    assert bytes(data) == encoded or not found.is_signed() or found.signature != decode_transaction(encoded).signature


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data + b"\x00",
        lambda data: data[:-1],
        lambda data: bytes(MAX_TRANSACTION_BYTES + 1),
        lambda data: data.replace(b"\x03\x0a", b"\xcd\x00\x03\x0a", 1),
        lambda data: b"\x9f" * 5000,
    ],
    ids=["trailing", "truncated", "oversized", "another spelling of 3", "deep"],
)
def test_every_other_spelling_is_refused(spoil: object) -> None:
    with pytest.raises(DecodeError):
        decode_transaction(spoil(ENCODED[0]))  # type: ignore[operator]
