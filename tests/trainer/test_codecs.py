"""Lossy encodings of tensors on the wire: their bounds, their sizes, and what is refused."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer import messages as m
from trainer import payloads
from trainer.codecs import BLOCK

SHAPES = st.sampled_from([(1,), (BLOCK - 1,), (BLOCK,), (BLOCK + 1,), (2, 3, 70), (4, 8, 64)])


def drawn(shape: tuple[int, ...], seed: int, exponent: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * 10.0**exponent


def through(tensor: torch.Tensor, wire: payloads.Dtype) -> torch.Tensor:
    """Return what the receiver of `tensor` computes on."""
    payload = payloads.pack(tensor, wire)
    return payloads.unpack(
        (payloads.TensorPayload(payload[0].dtype, payload[0].shape, memoryview(bytes(payload[0].data))),)
    )


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.integers(0, 2**32), st.integers(-30, 30))
def test_int8_is_off_by_half_a_step_of_its_block_at_most(shape: tuple[int, ...], seed: int, exponent: int) -> None:
    x = drawn(shape, seed, exponent)
    back = through(x, payloads.Dtype.INT8)
    assert back.shape == x.shape
    for before, after in zip(x.flatten().split(BLOCK), back.flatten().split(BLOCK), strict=True):
        assert float((before - after).abs().max()) <= float(before.abs().max()) / 254 * (1 + 1e-5)


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.integers(0, 2**32), st.integers(-30, 30))
def test_bf16_is_off_by_one_part_in_256_at_most(shape: tuple[int, ...], seed: int, exponent: int) -> None:
    x = drawn(shape, seed, exponent)
    assert bool(((through(x, payloads.Dtype.BF16) - x).abs() <= x.abs() / 256).all())


@pytest.mark.parametrize("wire", [payloads.Dtype.BF16, payloads.Dtype.INT8])
def test_encoding_what_was_decoded_changes_nothing(wire: payloads.Dtype) -> None:
    once = through(drawn((4, 8, 64), 1, 0), wire)
    assert torch.equal(through(once, wire), once)


@pytest.mark.parametrize("threads", [1, 2])
def test_bytes_do_not_depend_on_threads(threads: int) -> None:
    usual = torch.get_num_threads()
    x = drawn((64, 64, 16), 7, 0)
    expected = [bytes(payloads.pack(x, wire)[0].data) for wire in payloads.WIRE.values()]
    torch.set_num_threads(threads)
    try:
        assert [bytes(payloads.pack(x, wire)[0].data) for wire in payloads.WIRE.values()] == expected
    finally:
        torch.set_num_threads(usual)


def test_zeros_stay_zeros_and_infinities_show() -> None:
    x = torch.zeros(2 * BLOCK)
    x[BLOCK] = math.inf
    back = through(x, payloads.Dtype.INT8)
    assert not back[:BLOCK].any()
    assert back[BLOCK:].isnan().all()
    assert through(x, payloads.Dtype.BF16)[BLOCK] == math.inf
    assert through(torch.empty(0, 3), payloads.Dtype.INT8).shape == (0, 3)
    assert not through(torch.full((BLOCK,), 1e-44), payloads.Dtype.INT8).any()


def test_bytes_on_the_wire() -> None:
    sizes = {wire: payloads.pack(torch.ones(2, 3, 64), wire)[0].nbytes for wire in payloads.WIRE.values()}
    assert sizes == {payloads.Dtype.FP32: 1536, payloads.Dtype.BF16: 768, payloads.Dtype.INT8: 384 + 8}
    assert all(len(payloads.pack(torch.ones(2, 3, 64), wire)[0].data) == size for wire, size in sizes.items())
    assert payloads.pack(torch.ones(2, dtype=torch.int32), payloads.Dtype.INT8)[0].dtype is payloads.Dtype.INT32


@pytest.mark.parametrize("wire", [payloads.Dtype.BF16, payloads.Dtype.INT8])
def test_encoded_messages_travel_and_lies_about_them_are_refused(wire: payloads.Dtype) -> None:
    message = m.Activation(0, 1, 0, 0, payloads.pack(drawn((2, 3, 64), 3, 0), wire))
    data = bytes(message.payload[0].data)
    header = m.encode_header(message)
    assert m.decode_message(header, [data]) == message
    for wrong in (data[:-1], data + b"\0", b""):
        with pytest.raises(payloads.MessageError) as caught:
            m.decode_message(header, [wrong])
        assert caught.value.reason is payloads.Reason.TENSOR_LENGTH
    tokens = m.Tokens(0, 1, 0, (payloads.TensorPayload(wire, (2, 3), memoryview(b"")),))
    with pytest.raises(payloads.MessageError) as caught:
        m.decode_message(m.encode_header(tokens), [bytes(tokens.payload[0].nbytes)])
    assert caught.value.reason is payloads.Reason.TENSOR_KIND
