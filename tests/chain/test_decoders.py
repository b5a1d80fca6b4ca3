"""Every consensus object under fuzz: one spelling each, and nothing but a named refusal in bounded memory."""

import random
import struct
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chain.blocks import Refused, decode_message
from chain.codec import DecodeError, Record, decode, encode
from chain.engine_transactions import Batch
from chain.light import decode_light_block
from chain.proofs import Proof
from chain.signing import Exported
from chain.snapshots import decode_chunk
from chain.state import KINDS, Table, decode_record
from chain.sync import (
    MAX_HEADERS,
    HeadersRequest,
    decode_headers,
    decode_info,
    decode_range,
    decode_request,
    decode_status,
)
from chain.transactions import Payload, decode_transaction
from tests.chain.record_strategies import record_types, valid

KINDS_OF_RECORD = record_types()
BY_NAME = pytest.mark.parametrize("kind", KINDS_OF_RECORD, ids=lambda kind: kind.__name__)
CHAIN_ID = bytes(32)
ENTRANCES: dict[str, Callable[[bytes], Any]] = {
    "message": decode_message,
    "transaction": decode_transaction,
    "request": partial(decode_request, chain_id=CHAIN_ID),
    "status": decode_status,
    "range": decode_range,
    "headers": partial(decode_headers, request=HeadersRequest(CHAIN_ID, 9, MAX_HEADERS)),
    "snapshot": decode_info,
    "light block": decode_light_block,
    "chunk": decode_chunk,
    "proof": partial(decode, Proof),
    "exported record": partial(decode, Exported),
    "batch": partial(decode, Batch),
    "payload": partial(decode, Payload),
}
DEEP, HUGE = 200_000, 2**32 - 1
BOMBS = {
    "deep arrays": b"\x91" * DEEP,
    "deep maps": b"\x81\x00" * DEEP,
    "an array of 2^32 - 1": b"\xdd" + struct.pack(">I", HUGE),
    "a map of 2^32 - 1": b"\xdf" + struct.pack(">I", HUGE),
    "bytes of 2^32 - 1": b"\xc6" + struct.pack(">I", HUGE),
    "text of 2^32 - 1": b"\xdb" + struct.pack(">I", HUGE),
    "many empty arrays": b"\xdc\xff\xff" + b"\x90" * 0xFFFF,
    "many zeros": b"\xdd\x00\x0f\xff\xff" + bytes(0xFFFFF),
}


def respelled(value: Any, rng: random.Random) -> bytes:
    """Return msgpack of the same value with one length or integer written longer than it need be."""
    if value is None or isinstance(value, bool):
        return encode(value)
    if isinstance(value, int):
        return struct.pack(">Bq", 0xD3, value) if value < 0 or rng.random() < 0.5 else struct.pack(">BQ", 0xCF, value)
    if isinstance(value, bytes):
        return struct.pack(">BI", 0xC6, len(value)) + value
    place = rng.randrange(len(value) + 1)
    if place == len(value):
        return struct.pack(">BI", 0xDD, len(value)) + b"".join(map(encode, value))
    parts = [encode(part) for part in value]
    parts[place] = respelled(value[place], rng)
    return encode((None,) * len(value))[: -len(value)] + b"".join(parts)


@BY_NAME
@settings(max_examples=40)
@given(data=st.data())
def test_what_is_encoded_decodes_to_itself_and_has_one_spelling(kind: type[Record], data: st.DataObject) -> None:
    record = data.draw(valid(kind))
    encoded = encode(record)
    assert decode(kind, encoded) == record
    other = respelled(decode(Any, encoded), data.draw(st.randoms(use_true_random=False)))
    if other != encoded:
        with pytest.raises(DecodeError):
            decode(kind, other)
    for wrong in (encoded + b"\x00", encoded[:-1], b"\x91" + encoded):
        with pytest.raises(DecodeError):
            decode(kind, wrong)


@BY_NAME
@settings(max_examples=40)
@given(data=st.data())
def test_altered_bytes_are_another_object_or_refused(kind: type[Record], data: st.DataObject) -> None:
    encoded = bytearray(encode(data.draw(valid(kind))))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(encoded) - 1))
        encoded[place] = data.draw(st.integers(0, 255))
    try:
        record: Record = decode(kind, bytes(encoded))
    except DecodeError:
        return
    assert encode(record) == bytes(encoded)


@pytest.mark.parametrize("entrance", ENTRANCES)
@settings(max_examples=150)
@given(data=st.one_of(st.binary(max_size=200), *[valid(kind).map(encode) for kind in KINDS_OF_RECORD]))
def test_an_entrance_takes_its_object_or_says_no(entrance: str, data: bytes) -> None:
    with suppress(DecodeError, Refused):
        ENTRANCES[entrance](data)


@pytest.mark.parametrize("table", Table)
@settings(max_examples=30)
@given(data=st.binary(max_size=100))
def test_a_row_of_the_state_decodes_to_its_record_or_is_refused(table: Table, data: bytes) -> None:
    try:
        record = decode_record(table, data)
    except DecodeError:
        return
    assert isinstance(record, KINDS[table])


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("entrance", ENTRANCES)
def test_a_bomb_is_refused_in_little_memory(entrance: str, bomb: str) -> None:
    data = BOMBS[bomb]
    tracemalloc.start()
    try:
        with pytest.raises(DecodeError):
            ENTRANCES[entrance](data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * len(data) + 65_536
