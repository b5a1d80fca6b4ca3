from contextlib import suppress

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer import messages as m
from trainer import payloads

PEER = "12D3KooWpeer"
ROOT = bytes(range(32))
X = payloads.pack(torch.arange(6, dtype=torch.float32).reshape(1, 2, 3))
TOKENS = payloads.pack(torch.arange(6, dtype=torch.int32).reshape(2, 3))
SAMPLES: tuple[m.Message, ...] = (
    m.Prepare(1, 2, 0, ROOT, (PEER,)),
    m.Ready(1, 2, ROOT),
    m.OpenStep(1, 3, ((PEER, "b"), ("c", "d"))),
    m.Tokens(1, 3, 0, TOKENS),
    m.Labels(1, 3, 0, TOKENS),
    m.Activation(1, 3, 0, 0, X),
    m.Gradient(1, 3, 0, 1, X),
    m.Passed(1, 3, 0, 0),
    m.CellDone(1, 3, 0, 1, 2.5, 0.25),
    m.Reroute(1, 3, 0, 1, "e"),
    m.Reduce(1, 3, 1, (PEER, "b"), (PEER, "b")),
    m.Partial(1, 3, 1, 0, payloads.pack(torch.ones(5))),
    m.Tied(1, 3, 1, 0, payloads.pack(torch.ones(3))),
    m.NotFinite(1, 3, 0, 1, "output"),
    m.Summed(1, 3, 1, 0.5, ROOT),
    m.Repeat(1, 3, 1, "s0r1"),
    m.Apply(1, 3, 1, (1, 2), (0.5, 0.25)),
    m.Reduced(1, 3, 1, ROOT),
    m.Commit(1, 3),
    m.Fault(1, 3, payloads.Reason.PARTIAL_MISSING, ("b",)),
    m.Probe(1, 3, 0, (PEER, "b"), (*TOKENS, *TOKENS)),
    m.Relay(1, 3, 0, 0, (PEER, "b"), (*X, *TOKENS)),
    m.Probed(1, 3, 0, 2.5),
    m.Finish(),
)


def round_trip(message: m.Message) -> m.Message:
    return m.decode_message(m.encode_header(message), [p.data for p in m.payload_of(message)])


@pytest.mark.parametrize("message", SAMPLES, ids=lambda s: type(s).__name__)
def test_a_message_survives_the_wire(message: m.Message) -> None:
    assert round_trip(message) == message


def test_the_samples_cover_the_union() -> None:
    assert {type(s) for s in SAMPLES} == set(m.Message.__args__)


def test_header_bytes_are_pinned() -> None:
    assert m.encode_header(m.Activation(1, 3, 0, 0, X)).hex() == (
        "96aa41637469766174696f6e010300009193a46670333293010203c400"
    )


def test_tensor_bytes_stay_out_of_the_header() -> None:
    big = m.Activation(1, 3, 0, 0, payloads.pack(torch.zeros(4, 64, 64)))
    assert len(m.encode_header(big)) < 64


def test_tensors_are_shared_not_copied() -> None:
    x = torch.arange(6, dtype=torch.float32)
    assert payloads.unpack(payloads.pack(x)).data_ptr() == x.data_ptr()


def test_read_only_and_empty_tensors_unpack() -> None:
    assert torch.equal(
        payloads.unpack((payloads.TensorPayload(payloads.Dtype.INT32, (2,), memoryview(b"\1\0\0\0\2\0\0\0")),)),
        torch.tensor([1, 2], dtype=torch.int32),
    )
    assert payloads.unpack(payloads.pack(torch.empty(0, 3))).shape == (0, 3)


def refused(header: bytes, tensors: list[bytes]) -> payloads.Reason:
    with pytest.raises(payloads.MessageError) as refusal:
        m.decode_message(header, tensors)
    return refusal.value.reason


def test_wrong_headers_are_refused_by_name() -> None:
    encode = msgspec.msgpack.encode
    assert refused(b"", []) is payloads.Reason.MALFORMED
    assert refused(b"\xc1", []) is payloads.Reason.MALFORMED
    assert refused(encode(["Lost", "b"]), []) is payloads.Reason.MALFORMED
    assert refused(encode(["Commit", 1, 2, 3]), []) is payloads.Reason.MALFORMED
    assert refused(encode(["Commit", -1, 2]), []) is payloads.Reason.MALFORMED
    assert refused(encode(["Commit", True, 2]), []) is payloads.Reason.MALFORMED
    assert refused(encode(["Ready", 1, 2, b"short"]), []) is payloads.Reason.MALFORMED
    assert refused(encode(["OpenStep", 1, 2, []]), []) is payloads.Reason.MALFORMED
    assert refused(bytes(m.MAX_HEADER_BYTES + 1), []) is payloads.Reason.HEADER_SIZE


def test_wrong_tensors_are_refused_by_name() -> None:
    header = m.encode_header(m.Activation(1, 3, 0, 0, X))
    assert refused(header, []) is payloads.Reason.TENSOR_COUNT
    assert refused(header, [bytes(24), bytes(24)]) is payloads.Reason.TENSOR_COUNT
    assert refused(header, [bytes(23)]) is payloads.Reason.TENSOR_LENGTH
    assert refused(m.encode_header(m.Commit(1, 1)), [b""]) is payloads.Reason.TENSOR_COUNT
    assert refused(m.encode_header(m.Activation(1, 3, 0, 0, TOKENS)), [bytes(24)]) is payloads.Reason.TENSOR_KIND
    assert refused(m.encode_header(m.Activation(1, 3, 0, 0, ())), []) is payloads.Reason.TENSOR_COUNT
    assert refused(m.encode_header(m.Probe(1, 3, 0, (PEER,), TOKENS)), [bytes(24)]) is payloads.Reason.TENSOR_COUNT
    relay = m.encode_header(m.Relay(1, 3, 0, 0, (PEER,), (*TOKENS, *TOKENS)))
    assert refused(relay, [bytes(24), bytes(24)]) is payloads.Reason.TENSOR_KIND
    huge = (payloads.TensorPayload(payloads.Dtype.FP32, (2**32, 2**32, 4), memoryview(b"")),)
    assert refused(m.encode_header(m.Activation(1, 3, 0, 0, huge)), [b""]) is payloads.Reason.TENSOR_LENGTH


def test_a_header_in_another_form_than_the_canonical_one_is_refused() -> None:
    """A sender signs a header's bytes, and judges of a step have the message only, which they encode again."""
    reduce = msgspec.msgpack.encode(["Reduce", 1, 3, 1, [PEER], [PEER], []])
    assert m.decode_message(reduce, []) == m.Reduce(1, 3, 1, (PEER,), (PEER,), ())
    assert refused(msgspec.msgpack.encode(["Reduce", 1, 3, 1, [PEER], [PEER]]), []) is payloads.Reason.MALFORMED
    assert reduce[8] == 1
    assert refused(reduce[:8] + b"\xcc\x01" + reduce[9:], []) is payloads.Reason.MALFORMED
    header = m.encode_header(m.Activation(1, 3, 0, 0, X))
    place = header.index(b"\x01\x03")
    assert refused(header[:place] + b"\xcc\x01" + header[place + 1 :], [bytes(24)]) is payloads.Reason.MALFORMED


def test_data_inside_a_header_is_refused() -> None:
    header = msgspec.msgpack.encode(["Partial", 1, 3, 1, 0, [["fp32", [1], b"\0\0\0\0"]]])
    assert refused(header, [bytes(4)]) is payloads.Reason.TENSOR_LENGTH


@given(st.binary(max_size=200), st.lists(st.binary(max_size=32), max_size=3))
def test_any_bytes_decode_or_are_refused(header: bytes, tensors: list[bytes]) -> None:
    with suppress(payloads.MessageError):
        m.decode_message(header, tensors)


@given(st.integers(0, len(SAMPLES) - 1), st.data())
def test_a_damaged_header_decodes_within_bounds_or_is_refused(sample: int, data: st.DataObject) -> None:
    message = SAMPLES[sample]
    header = bytearray(m.encode_header(message))
    position = data.draw(st.integers(0, len(header) - 1))
    header[position] = data.draw(st.integers(0, 255))
    end = data.draw(st.integers(1, len(header)))
    with suppress(payloads.MessageError):
        decoded = m.decode_message(bytes(header[:end]), [p.data for p in m.payload_of(message)])
        assert all(p.nbytes == len(p.data) for p in m.payload_of(decoded))
