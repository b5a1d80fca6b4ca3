"""Messages of a swarm: one closed union of frozen structs, each with its bounds, decoded or refused by name.

A message travels as a header (this module) and the raw bytes of its tensors (the transport's business):
`encode_header` leaves the tensor bytes out, `decode_message` puts them back after checking every length.
Shape legend: B sequences of a micro-batch, T tokens of a sequence, D hidden width, N parameters of a stage.
"""

import math
from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, TypeAlias

import msgspec

if TYPE_CHECKING:
    from torch import Tensor

Buffer: TypeAlias = bytes | bytearray | memoryview

MAX_HEADER_BYTES = 1 << 20
MAX_TENSOR_BYTES = 1 << 33
MAX_CELLS = 4096
MAX_STAGES = 256
MAX_REPLICAS = 256

PeerText = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
Generation = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
StepIndex = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
CellIndex = Annotated[int, msgspec.Meta(ge=0, lt=MAX_CELLS)]
StageIndex = Annotated[int, msgspec.Meta(ge=0, lt=MAX_STAGES)]
Attempt = Annotated[int, msgspec.Meta(ge=1, le=2**16)]
Root = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
MaybeRoot = Annotated[bytes, msgspec.Meta(max_length=32)]
"""A state root, or empty: any state of that step."""
Dimension = Annotated[int, msgspec.Meta(ge=0, le=2**32)]
Shape = Annotated[tuple[Dimension, ...], msgspec.Meta(max_length=4)]
Peers = Annotated[tuple[PeerText, ...], msgspec.Meta(max_length=MAX_REPLICAS)]
Route = Annotated[tuple[PeerText, ...], msgspec.Meta(min_length=1, max_length=MAX_STAGES)]
Routes = Annotated[tuple[Route, ...], msgspec.Meta(min_length=1, max_length=MAX_CELLS)]
Owners = Annotated[tuple[PeerText, ...], msgspec.Meta(min_length=1, max_length=MAX_CELLS)]


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


ITEM_BYTES = {Dtype.FP32: 4, Dtype.INT32: 4, Dtype.INT64: 8}


class TensorPayload(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A dense little-endian row-major tensor; `data` is empty in an encoded header."""

    dtype: Dtype
    shape: Shape
    data: memoryview

    @property
    def nbytes(self) -> int:
        """Bytes that shape and element type call for."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


Payload = Annotated[tuple[TensorPayload, ...], msgspec.Meta(max_length=4)]


class _Wire(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=True):
    pass


class _OfStep(_Wire, frozen=True):
    generation: Generation
    step: StepIndex


class _OfCell(_OfStep, frozen=True):
    cell: CellIndex


class Prepare(_OfStep, frozen=True):
    """Client to worker: make the state after `step` current, from your ring, the seed or `holders`."""

    stage: StageIndex
    root: MaybeRoot
    holders: Peers


class Ready(_OfStep, frozen=True):
    """Worker to client: the state after `step` is current, and this is its root."""

    root: Root


class OpenStep(_OfStep, frozen=True):
    """Client to worker: the peers of stage 0 … S−1 for every cell of the step."""

    routes: Routes


class Tokens(_OfCell, frozen=True):
    """Client to first stage: int32 tokens (B, T)."""

    payload: Payload


class Labels(_OfCell, frozen=True):
    """Client to last stage: int32 labels (B, T)."""

    payload: Payload


class Activation(_OfCell, frozen=True):
    """Worker of `stage` to the next stage: its fp32 output (B, T, D)."""

    stage: StageIndex
    payload: Payload


class Gradient(_OfCell, frozen=True):
    """Worker of `stage` to the stage before: the fp32 gradient of the loss by its input (B, T, D)."""

    stage: StageIndex
    payload: Payload


class Passed(_OfCell, frozen=True):
    """Worker to client: the forward half of a cell is done and on its way."""

    stage: StageIndex


class CellDone(_OfCell, frozen=True):
    """Worker to client: a cell is complete; `loss` counts at the last stage, `seconds` is its own word."""

    stage: StageIndex
    loss: float
    seconds: Annotated[float, msgspec.Meta(ge=0)]


class Reroute(_OfCell, frozen=True):
    """Client to worker: `stage` of this cell is now with `peer`; neighbours send again what they hold."""

    stage: StageIndex
    peer: PeerText


class Reduce(_OfStep, frozen=True):
    """Client to worker: sum the gradients of your stage; `owners[cell]` is whose result counts."""

    attempt: Attempt
    owners: Owners
    replicas: Peers


class Partial(_OfStep, frozen=True):
    """Worker to its replicas: the fp32 sum (N,) of its gradients over the cells it owns in this attempt."""

    attempt: Attempt
    stage: StageIndex
    payload: Payload


class Reduced(_OfStep, frozen=True):
    """Worker to client: the root of the state that this attempt leads to."""

    attempt: Attempt
    root: Root


class Commit(_OfStep, frozen=True):
    """Client to worker: the step is complete everywhere; its state becomes current."""


class Fault(_OfStep, frozen=True):
    """Worker to client: what stopped it, and the peers it waits for or cannot reach."""

    reason: Reason
    peers: Peers


class Finish(_Wire, frozen=True):
    """Client to worker: the task is over."""


FromClient: TypeAlias = Prepare | OpenStep | Tokens | Labels | Reroute | Reduce | Commit | Finish
FromWorker: TypeAlias = Ready | Passed | CellDone | Reduced | Fault
Message: TypeAlias = FromClient | FromWorker | Activation | Gradient | Partial

_KINDS: dict[type, tuple[Dtype, int]] = {
    Tokens: (Dtype.INT32, 2),
    Labels: (Dtype.INT32, 2),
    Activation: (Dtype.FP32, 3),
    Gradient: (Dtype.FP32, 3),
    Partial: (Dtype.FP32, 1),
}
_NO_DATA = memoryview(b"")
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def payload_of(message: Message) -> tuple[TensorPayload, ...]:
    """Return the tensors of a message, empty for those that carry none."""
    return message.payload if isinstance(message, Tokens | Labels | Activation | Gradient | Partial) else ()


def encode_header(message: Message) -> bytes:
    """Return the header of a message: everything but the bytes of its tensors."""
    if isinstance(message, Tokens | Labels | Activation | Gradient | Partial):
        bare = tuple(TensorPayload(p.dtype, p.shape, _NO_DATA) for p in message.payload)
        message = msgspec.structs.replace(message, payload=bare)
    return _encoder.encode(message)


def decode_message(header: Buffer, tensors: Sequence[Buffer]) -> Message:
    """Return the message of a header and its tensors' bytes, uncopied.

    Raises `MessageError` for anything that `encode_header` would not have produced with these tensors.
    """
    if len(header) > MAX_HEADER_BYTES:
        raise MessageError(Reason.HEADER_SIZE, f"{len(header)} bytes")
    try:
        message = _decoder.decode(header)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise MessageError(Reason.MALFORMED, str(error)) from None
    if not isinstance(message, Tokens | Labels | Activation | Gradient | Partial):
        if tensors:
            raise MessageError(Reason.TENSOR_COUNT, f"{len(tensors)} where none belongs")
        return message
    if len(message.payload) != 1 or len(tensors) != 1:
        raise MessageError(Reason.TENSOR_COUNT, f"{len(message.payload)} announced, {len(tensors)} sent")
    filled = _attach(type(message), message.payload[0], tensors[0])
    return msgspec.structs.replace(message, payload=(filled,))


def _attach(kind: type, bare: TensorPayload, data: Buffer) -> TensorPayload:
    if (bare.dtype, len(bare.shape)) != _KINDS[kind]:
        raise MessageError(Reason.TENSOR_KIND, f"{bare.dtype} of rank {len(bare.shape)}")
    view = memoryview(data).cast("B")
    if len(bare.data) or bare.nbytes > MAX_TENSOR_BYTES or bare.nbytes != len(view):
        raise MessageError(Reason.TENSOR_LENGTH, f"{bare.nbytes} bytes announced, {len(view)} sent")
    return TensorPayload(bare.dtype, bare.shape, view)


def pack(tensor: "Tensor") -> tuple[TensorPayload]:
    """Return a tensor as payload; the bytes are shared with it, so it must not be written to any more."""
    import torch

    from trainer.tensors import buffer_of

    dtype = {torch.float32: Dtype.FP32, torch.int32: Dtype.INT32, torch.int64: Dtype.INT64}[tensor.dtype]
    return (TensorPayload(dtype, tuple(tensor.shape), buffer_of(tensor)),)


def unpack(payload: tuple[TensorPayload, ...]) -> "Tensor":
    """Return the single tensor of a payload; its memory is shared where the bytes are writable."""
    import torch

    (only,) = payload
    dtype = {Dtype.FP32: torch.float32, Dtype.INT32: torch.int32, Dtype.INT64: torch.int64}[only.dtype]
    if not only.nbytes:
        return torch.empty(only.shape, dtype=dtype)
    data = bytearray(only.data) if only.data.readonly else only.data
    return torch.frombuffer(data, dtype=dtype).reshape(only.shape)
