"""The tensors that messages carry: element types, the bounds of their bytes, encodings; and refusals by name."""

import math
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, TypeAlias

import msgspec

if TYPE_CHECKING:
    from torch import Tensor

Buffer: TypeAlias = bytes | bytearray | memoryview

MAX_TENSOR_BYTES = 1 << 33

Dimension = Annotated[int, msgspec.Meta(ge=0, le=2**32)]
Shape = Annotated[tuple[Dimension, ...], msgspec.Meta(max_length=4)]


class Reason(StrEnum):
    """Why a message was refused or a worker could not go on; the word in tests, logs and on the wire."""

    MALFORMED = "malformed"  # The header is not one of the messages, or breaks a bound.
    HEADER_SIZE = "header-size"  # The header exceeds MAX_HEADER_BYTES.
    TENSOR_COUNT = "tensor-count"  # Not as many tensors as this message carries.
    TENSOR_KIND = "tensor-kind"  # A tensor of another element type or rank than this message carries.
    TENSOR_LENGTH = "tensor-length"  # The bytes are not as many as shape and element type say.
    TENSOR_SHAPE = "tensor-shape"  # The shape is not the one of this task's micro-batches.
    WRONG_SENDER = "wrong-sender"  # The sender is not the peer that this message must come from.
    STALE_GENERATION = "stale-generation"  # That generation ended with an eviction.
    STALE_STEP = "stale-step"  # That step is over, or was never opened.
    WRONG_STAGE = "wrong-stage"  # The receiver holds another stage.
    UNKNOWN_CELL = "unknown-cell"  # The step has no such cell, or routes it elsewhere.
    DUPLICATE = "duplicate"  # Already received; the first one counts.
    TOO_EARLY = "too-early"  # Ahead of its step or route, and no room is left to keep it.
    UNEXPECTED = "unexpected"  # A message that peers of this role do not take.
    MEMORY_FULL = "memory-full"  # Keeping it would exceed the byte bound.
    NO_STATE = "no-state"  # No state of the wanted step is held, and no holder gave one.
    STATE_MISMATCH = "state-mismatch"  # The state received has another root than the wanted one.
    COMPUTE_FAILED = "compute-failed"  # The stage raised an error on this cell.
    PARTIAL_MISSING = "partial-missing"  # Replicas that have not sent their partial sum.
    PEER_UNREACHABLE = "peer-unreachable"  # The link to a neighbour is broken.
    NOT_FINITE = "not-finite"  # A result, or a sum of gradients, is infinite or not a number.
    ODD_STATISTICS = "odd-statistics"  # What a replica adds to running statistics is out of all proportion.


class MessageError(ValueError):
    """A message that was refused, with the `reason`."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else str(reason))
        self.reason = reason


class Dtype(StrEnum):
    """The closed set of element types."""

    FP32 = "fp32"
    INT32 = "int32"
    INT64 = "int64"
    BF16 = "bf16"
    INT8 = "int8"


ITEM_BYTES = {Dtype.FP32: 4, Dtype.INT32: 4, Dtype.INT64: 8, Dtype.BF16: 2, Dtype.INT8: 1}
INT8_BLOCK = 256
"""Values of an int8 tensor that share one fp32 scale; the scales come before the values."""
WIRE = {"none": Dtype.FP32, "bf16": Dtype.BF16, "int8": Dtype.INT8}
"""Element type of activations, gradients and partial sums on the wire, by the manifest's compression."""


class TensorPayload(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A little-endian row-major tensor; `data` is empty in an encoded header.

    `bf16` and `int8` are encodings of fp32 values (`trainer.codecs`), of which `shape` is the shape.
    """

    dtype: Dtype
    shape: Shape
    data: memoryview

    @property
    def nbytes(self) -> int:
        """Bytes that shape and element type call for."""
        count = math.prod(self.shape)
        scales = -(-count // INT8_BLOCK) if self.dtype is Dtype.INT8 else 0
        return count * ITEM_BYTES[self.dtype] + 4 * scales

    @property
    def is_encoded(self) -> bool:
        """Whether the bytes are an encoding of fp32 values."""
        return self.dtype in (Dtype.BF16, Dtype.INT8)


Payload = Annotated[tuple[TensorPayload, ...], msgspec.Meta(max_length=4)]

Kind: TypeAlias = frozenset[tuple[Dtype, int]]
"""Element types that may be sent, each with a rank."""


def attach(kind: Kind, bare: TensorPayload, data: Buffer) -> TensorPayload:
    """Return a payload of one of these kinds with its bytes, uncopied; raise `MessageError`."""
    if (bare.dtype, len(bare.shape)) not in kind:
        raise MessageError(Reason.TENSOR_KIND, f"{bare.dtype} of rank {len(bare.shape)}")
    view = memoryview(data).cast("B")
    if len(bare.data) or bare.nbytes > MAX_TENSOR_BYTES or bare.nbytes != len(view):
        raise MessageError(Reason.TENSOR_LENGTH, f"{bare.nbytes} bytes announced, {len(view)} sent")
    return TensorPayload(bare.dtype, bare.shape, view)


def pack(tensor: "Tensor", wire: Dtype = Dtype.FP32) -> tuple[TensorPayload]:
    """Return a tensor as payload, an fp32 one encoded as `wire`.

    Without encoding the bytes are shared with the tensor, so it must not be written to any more.
    """
    import torch

    from trainer.codecs import encode_bf16, encode_int8
    from trainer.tensors import buffer_of

    if wire is not Dtype.FP32 and tensor.dtype == torch.float32:
        encoded = encode_bf16(tensor).view(torch.uint8) if wire is Dtype.BF16 else encode_int8(tensor)
        return (TensorPayload(wire, tuple(tensor.shape), buffer_of(encoded)),)
    dtype = {torch.float32: Dtype.FP32, torch.int32: Dtype.INT32, torch.int64: Dtype.INT64}[tensor.dtype]
    return (TensorPayload(dtype, tuple(tensor.shape), buffer_of(tensor)),)


def unpack(payload: tuple[TensorPayload, ...]) -> "Tensor":
    """Return the single tensor of a payload, decoded; its memory is shared where the bytes are writable."""
    import torch

    from trainer.codecs import decode_bf16, decode_int8

    (only,) = payload
    if only.is_encoded:
        if not math.prod(only.shape):
            return torch.empty(only.shape, dtype=torch.float32)
        raw = torch.frombuffer(bytearray(only.data), dtype=torch.uint8)
        flat = decode_bf16(raw) if only.dtype is Dtype.BF16 else decode_int8(raw, math.prod(only.shape))
        return flat.reshape(only.shape)
    dtype = {Dtype.FP32: torch.float32, Dtype.INT32: torch.int32, Dtype.INT64: torch.int64}[only.dtype]
    if not only.nbytes:
        return torch.empty(only.shape, dtype=dtype)
    data = bytearray(only.data) if only.data.readonly else only.data
    return torch.frombuffer(data, dtype=dtype).reshape(only.shape)
