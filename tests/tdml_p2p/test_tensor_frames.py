"""The bytes of tensor streams: round trips, bounds before allocation, and fuzz."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdml_p2p.tensor_frames import (
    CONTROL_BYTES,
    MAX_HEADER_BYTES,
    MAX_TENSORS,
    RECORD_BYTES,
    Control,
    ControlKind,
    FrameError,
    FrameReason,
    Record,
    RecordKind,
    RefusalReason,
    decode_control,
    decode_lengths,
    decode_record,
    encode_lengths,
)

SESSION = bytes(range(32))
MAX_FRAME = 1 << 20

sessions = st.binary(min_size=32, max_size=32)
records = st.one_of(
    st.builds(Record, st.just(RecordKind.OPEN), sessions),
    st.builds(
        Record,
        st.just(RecordKind.FRAME),
        sessions,
        st.integers(0, MAX_TENSORS),
        st.integers(0, MAX_HEADER_BYTES),
        st.integers(0, MAX_FRAME),
    ),
)
controls = st.builds(
    Control,
    st.sampled_from(ControlKind),
    sessions,
    st.integers(0, 2**64 - 1),
    st.sampled_from(RefusalReason),
)


@given(records)
def test_records_round_trip(record: Record) -> None:
    assert decode_record(record.encode(), MAX_FRAME) == record


@given(controls)
def test_controls_round_trip(control: Control) -> None:
    assert decode_control(control.encode()) == control


def test_golden_bytes() -> None:
    record = Record(RecordKind.FRAME, SESSION, 2, 3, 4)
    assert record.encode().hex() == "54444d5401020002000000030000000000000004" + SESSION.hex()
    control = Control(ControlKind.REFUSE, SESSION, reason=RefusalReason.EVICTED)
    assert control.encode().hex() == "03010000000000000000000000000000" + SESSION.hex()
    assert encode_lengths([1, 2]).hex() == "00000000000000010000000000000002"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (Record(RecordKind.FRAME, SESSION, 1, MAX_HEADER_BYTES + 1, 0), FrameReason.HEADER_TOO_LARGE),
        (Record(RecordKind.FRAME, SESSION, 1, 0, MAX_FRAME + 1), FrameReason.FRAME_TOO_LARGE),
        (Record(RecordKind.FRAME, SESSION, 1, 0, 2**64 - 1), FrameReason.FRAME_TOO_LARGE),
        (Record(RecordKind.FRAME, SESSION, MAX_TENSORS + 1, 0, 0), FrameReason.TOO_MANY_TENSORS),
        (Record(RecordKind.OPEN, SESSION, 0, 1, 0), FrameReason.NOT_A_RECORD),
    ],
)
def test_what_exceeds_a_bound_is_refused_by_name(record: Record, reason: FrameReason) -> None:
    with pytest.raises(FrameError) as error:
        decode_record(record.encode(), MAX_FRAME)
    assert error.value.reason is reason


@pytest.mark.parametrize(
    ("offset", "value", "reason"),
    [
        (0, 0, FrameReason.NOT_A_RECORD),
        (4, 2, FrameReason.UNKNOWN_VERSION),
        (5, 9, FrameReason.UNKNOWN_KIND),
    ],
)
def test_foreign_heads_are_refused_by_name(offset: int, value: int, reason: FrameReason) -> None:
    head = bytearray(Record(RecordKind.FRAME, SESSION).encode())
    head[offset] = value
    with pytest.raises(FrameError) as error:
        decode_record(bytes(head), MAX_FRAME)
    assert error.value.reason is reason


@settings(max_examples=300)
@given(st.binary(max_size=2 * RECORD_BYTES) | st.binary(min_size=RECORD_BYTES, max_size=RECORD_BYTES))
def test_any_bytes_are_a_record_within_bounds_or_an_error(data: bytes) -> None:
    try:
        record = decode_record(data, MAX_FRAME)
    except FrameError:
        return
    assert record.encode() == data
    assert record.total <= MAX_FRAME
    assert record.header <= MAX_HEADER_BYTES


@settings(max_examples=300)
@given(st.binary(min_size=CONTROL_BYTES, max_size=CONTROL_BYTES) | st.binary(max_size=100))
def test_any_bytes_are_a_control_or_an_error(data: bytes) -> None:
    try:
        control = decode_control(data)
    except FrameError:
        return
    assert decode_control(control.encode()) == control


@given(st.lists(st.integers(0, 2**64 - 1), max_size=8), st.integers(0, 2**20))
def test_lengths_are_the_record_s_or_an_error(lengths: list[int], total: int) -> None:
    record = Record(RecordKind.FRAME, SESSION, len(lengths), 0, total)
    if sum(lengths) == total:
        assert decode_lengths(encode_lengths(lengths), record) == tuple(lengths)
    else:
        with pytest.raises(FrameError):
            decode_lengths(encode_lengths(lengths), record)


@given(st.binary(max_size=64))
def test_a_table_of_another_size_is_refused(data: bytes) -> None:
    with pytest.raises(FrameError):
        decode_lengths(data, Record(RecordKind.FRAME, SESSION, 9, 0, 0))
