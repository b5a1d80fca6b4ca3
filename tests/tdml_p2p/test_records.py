"""Discovery records: signatures, bounds, expiry and fuzz."""

from dataclasses import dataclass

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chain.keys import PrivateKey, peer_id
from tdml_p2p.discovery import decode_message
from tdml_p2p.records import (
    MAX_KEYS_PER_PEER,
    MAX_RECORD_BYTES,
    MAX_RECORD_SECONDS,
    MAX_RECORDS_PER_KEY,
    RecordBook,
    RecordError,
    RecordReason,
    SignedRecord,
    check_key,
    check_record,
    sign_record,
)
from tests.tdml_p2p.network_kit import key

NOW = 1_700_000_000
TASK = f"task/{'ab' * 32}"


@dataclass
class Clock:
    now: float = NOW

    def __call__(self) -> float:
        return self.now


def record(name: str = "tasks", by: PrivateKey | None = None, now: int = NOW, data: bytes = b"x") -> SignedRecord:
    return sign_record(by or key(0), name, data, now, 600)


def why(action) -> RecordReason:
    with pytest.raises(RecordError) as error:
        action()
    return error.value.reason


@pytest.mark.parametrize("name", ["tasks", TASK, f"{TASK}/stage/0", f"{TASK}/stage/17", f"blob/{'0' * 64}"])
def test_keys_of_the_network(name: str) -> None:
    check_key(name)
    check_record(record(name), NOW)


@pytest.mark.parametrize(
    "name", ["", "task", "tasks/", "task/ab", f"{TASK}/stage/", f"{TASK}/stage/01", f"{TASK}\n", "blob/" + "G" * 64]
)
def test_other_keys_are_refused(name: str) -> None:
    assert why(lambda: check_key(name)) is RecordReason.BAD_KEY


def test_every_field_is_signed() -> None:
    good = record()
    other = peer_id(key(1).account)
    for change in ({"key": TASK}, {"record": b"y"}, {"issued": NOW - 1}, {"expires": NOW + 9}, {"peer": other}):
        forged = msgspec.structs.replace(good, **change)
        assert why(lambda forged=forged: check_record(forged, NOW)) is RecordReason.BAD_SIGNATURE
    forged = msgspec.structs.replace(good, peer="QmNotAnEd25519Peer")
    assert why(lambda: check_record(forged, NOW)) is RecordReason.BAD_PEER


def test_records_live_between_their_times() -> None:
    good = record()
    check_record(good, NOW + 599)
    assert why(lambda: check_record(good, NOW + 600)) is RecordReason.EXPIRED
    assert why(lambda: check_record(good, NOW - 300)) is RecordReason.FROM_THE_FUTURE
    long = sign_record(key(0), "tasks", b"", NOW, MAX_RECORD_SECONDS + 1)
    assert why(lambda: check_record(long, NOW)) is RecordReason.LIVES_TOO_LONG
    assert why(lambda: record(data=bytes(MAX_RECORD_BYTES + 1))) is RecordReason.TOO_LARGE


def test_the_newest_record_of_a_peer_counts() -> None:
    clock = Clock()
    book = RecordBook(clock)
    book.add(record(data=b"new", now=NOW))
    book.add(record(data=b"old", now=NOW - 5))
    assert [held.record for held in book.get("tasks")] == [b"new"]
    book.add(record(data=b"other", by=key(1)))
    assert {held.record for held in book.get("tasks")} == {b"new", b"other"}
    clock.now = NOW + 601
    assert book.get("tasks") == ()
    book.expire()
    assert list(book.all()) == []


def test_a_book_is_bounded_per_key_and_per_peer() -> None:
    book = RecordBook(Clock())
    for number in range(MAX_RECORDS_PER_KEY):
        book.add(record(by=PrivateKey(number.to_bytes(32, "big"))))
    late = record(by=PrivateKey(bytes([200]) * 32))
    assert why(lambda: book.add(late)) is RecordReason.FULL
    for number in range(MAX_KEYS_PER_PEER):
        book.add(record(f"blob/{number:064x}"))
    assert why(lambda: book.add(record(f"blob/{'f' * 64}"))) is RecordReason.FULL
    book.remove(f"blob/{0:064x}", peer_id(key(0).account))
    book.add(record(f"blob/{'f' * 64}"))


@given(st.binary(max_size=400))
def test_any_bytes_are_a_message_or_a_named_error(data: bytes) -> None:
    try:
        decode_message(data)
    except RecordError as error:
        assert error.reason is RecordReason.MALFORMED


@given(st.lists(st.binary(max_size=6000), max_size=3))
def test_records_of_any_content_are_bounded_when_decoded(payloads: list[bytes]) -> None:
    fields = [("tasks", "p", payload, 1, 2, bytes(64)) for payload in payloads]
    data = msgspec.msgpack.encode([2, fields])
    if all(len(payload) <= MAX_RECORD_BYTES for payload in payloads):
        decode_message(data)
    else:
        with pytest.raises(RecordError):
            decode_message(data)
