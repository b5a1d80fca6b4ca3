"""Messages of a swarm: one closed union of frozen structs, each with its bounds, decoded or refused by name.

A message travels as a header (this module) and the raw bytes of its tensors (the transport's business):
`encode_header` leaves the tensor bytes out, `decode_message` puts them back after checking every length.
Shape legend: B sequences of a micro-batch, T tokens of a sequence, D hidden width, N parameters of a stage; where
images are classified, pixels and outputs are (B, C, H, W), C channels of height H and width W, and labels (B).
"""

from collections.abc import Sequence
from typing import Annotated, Literal, TypeAlias

import msgspec

from trainer.payloads import WIRE, Buffer, Dtype, Kind, MessageError, Payload, Reason, TensorPayload, attach

MAX_HEADER_BYTES = 1 << 20
MAX_CELLS = 4096
MAX_STAGES = 256
MAX_REPLICAS = 256

PeerText = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
Generation = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
StepIndex = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
CellIndex = Annotated[int, msgspec.Meta(ge=0, lt=MAX_CELLS)]
StageIndex = Annotated[int, msgspec.Meta(ge=0, lt=MAX_STAGES)]
Attempt = Annotated[int, msgspec.Meta(ge=1, le=2**16)]
Question = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]
Root = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
MaybeRoot = Annotated[bytes, msgspec.Meta(max_length=32)]
"""A state root, or empty: any state of that step."""
Square = Annotated[float, msgspec.Meta(ge=0)]
Peers = Annotated[tuple[PeerText, ...], msgspec.Meta(max_length=MAX_REPLICAS)]
Route = Annotated[tuple[PeerText, ...], msgspec.Meta(min_length=1, max_length=MAX_STAGES)]
Routes = Annotated[tuple[Route, ...], msgspec.Meta(min_length=1, max_length=MAX_CELLS)]
Teams = Annotated[tuple[Peers, ...], msgspec.Meta(max_length=MAX_STAGES * MAX_REPLICAS)]
Owners = Annotated[tuple[PeerText, ...], msgspec.Meta(min_length=1, max_length=MAX_CELLS)]


class _Wire(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=True):
    pass


class _OfStep(_Wire, frozen=True):
    generation: Generation
    step: StepIndex


class _OfCell(_OfStep, frozen=True):
    cell: CellIndex


class Prepare(_OfStep, frozen=True):
    """Client to worker: make the state after `step` current, from your ring, the seed or `holders`.

    The client numbers its questions from 1, so that an answer to an earlier one is not taken for that to a later one.
    """

    stage: StageIndex
    root: MaybeRoot
    holders: Peers
    question: Question = 0


class Ready(_OfStep, frozen=True):
    """Worker to client: the state after `step` is current, and this is its root; `question` is whose answer it is."""

    root: Root
    question: Question = 0


class OpenStep(_OfStep, frozen=True):
    """Client to worker: the peers of stage 0 … S−1 for every cell of the step.

    With redundancy a route names one member of each team, and every member computes the cell.
    """

    routes: Routes
    teams: Teams = ()


class Tokens(_OfCell, frozen=True):
    """Client to first stage: int32 tokens (B, T), or fp32 pixels (B, C, H, W)."""

    payload: Payload


class Labels(_OfCell, frozen=True):
    """Client to last stage: int32 labels (B, T)."""

    payload: Payload


class Activation(_OfCell, frozen=True):
    """Worker of `stage` to the next stage: its output (B, T, D), fp32 or encoded as the manifest says."""

    stage: StageIndex
    payload: Payload


class Gradient(_OfCell, frozen=True):
    """Worker of `stage` to the stage before: the gradient of the loss by its input (B, T, D), encoded likewise."""

    stage: StageIndex
    payload: Payload


class Passed(_OfCell, frozen=True):
    """Worker to client: the forward half of a cell is done and on its way; with redundancy, at this address."""

    stage: StageIndex
    digest: MaybeRoot = b""


class CellDone(_OfCell, frozen=True):
    """Worker to client: a cell is complete; `loss` counts at the last stage, `seconds` is its own word.

    `digest` is, with redundancy, that of its results' content addresses.
    """

    stage: StageIndex
    loss: float
    seconds: Annotated[float, msgspec.Meta(ge=0)]
    digest: MaybeRoot = b""


class NotFinite(_OfCell, frozen=True):
    """Worker to client: what `stage`, its own or the one beside it, makes of a cell is not finite."""

    stage: StageIndex
    what: Literal["output", "gradient"]


class Reroute(_OfCell, frozen=True):
    """Client to worker: `stage` of this cell is now with `peer`; neighbours send again what they hold."""

    stage: StageIndex
    peer: PeerText


class Reduce(_OfStep, frozen=True):
    """Client to worker: sum the gradients of your stage; `owners[cell]` is whose result counts.

    `ends` are the replicas of the other stage that holds the tied tensor, none at a stage without one.
    """

    attempt: Attempt
    owners: Owners
    replicas: Peers
    ends: Peers = ()


class Partial(_OfStep, frozen=True):
    """Worker to its replicas: the sum (N,) of its gradients over its cells of this attempt, encoded likewise."""

    attempt: Attempt
    stage: StageIndex
    payload: Payload


class Tied(_OfStep, frozen=True):
    """Worker of `stage` to the replicas of the other end: its mean gradient (K,) of the tied tensor, fp32."""

    attempt: Attempt
    stage: StageIndex
    payload: Payload


class Summed(_OfStep, frozen=True):
    """Worker to client: the squared norm of its stage's mean gradient, and the tied tensor's, if any, by digest."""

    attempt: Attempt
    squares: float
    digest: MaybeRoot


class Apply(_OfStep, frozen=True):
    """Client to worker: do the optimiser's step; `attempts` and `squares` are those of the stages 0 … S−1."""

    attempt: Attempt
    attempts: Annotated[tuple[Attempt, ...], msgspec.Meta(min_length=1, max_length=MAX_STAGES)]
    squares: Annotated[tuple[Square, ...], msgspec.Meta(min_length=1, max_length=MAX_STAGES)]


class Repeat(_OfStep, frozen=True):
    """Client to worker: send your part of this attempt to `peer` once more, for whom it was lost on its way."""

    attempt: Attempt
    peer: PeerText


class Reduced(_OfStep, frozen=True):
    """Worker to client: the root of the state that this attempt to reduce, or to apply, leads to."""

    attempt: Attempt
    root: Root


class Commit(_OfStep, frozen=True):
    """Client to worker: the step is complete everywhere; its state becomes current."""


class Fault(_OfStep, frozen=True):
    """Worker to client: what stopped it, and the peers it waits for or cannot reach."""

    reason: Reason
    peers: Peers


class Probe(_OfCell, frozen=True):
    """Client to first stage, to validate: int32 tokens and labels (B, T) to run forward after `step` by `route`."""

    route: Route
    payload: Payload


class Relay(_OfCell, frozen=True):
    """Worker of `stage` to the next on `route`: its fp32 output (B, T, D) of a probe, and the labels (B, T)."""

    stage: StageIndex
    route: Route
    payload: Payload


class Probed(_OfCell, frozen=True):
    """Worker to client: a probe's mean loss from the last stage; not a number from one that cannot go on."""

    loss: float


class Finish(_Wire, frozen=True):
    """Client to worker: the task is over."""


FromClient: TypeAlias = (
    Prepare | OpenStep | Tokens | Labels | Reroute | Reduce | Repeat | Apply | Commit | Probe | Finish
)
FromWorker: TypeAlias = Ready | Passed | CellDone | NotFinite | Summed | Reduced | Fault | Probed
Message: TypeAlias = FromClient | FromWorker | Activation | Gradient | Partial | Tied | Relay
_Carrier: TypeAlias = Tokens | Labels | Activation | Gradient | Partial | Tied | Probe | Relay


def _of(dtypes: frozenset[Dtype], *ranks: int) -> Kind:
    return frozenset((dtype, rank) for dtype in dtypes for rank in ranks)


_INTEGERS = frozenset((Dtype.INT32,))
_EXACT = frozenset((Dtype.FP32,))
_FLOATS = frozenset(WIRE.values())
_EXAMPLES: Kind = _of(_INTEGERS, 2) | _of(_EXACT, 4)
_ANSWERS: Kind = _of(_INTEGERS, 1, 2)
_KINDS: dict[type, tuple[Kind, ...]] = {
    Tokens: (_EXAMPLES,),
    Labels: (_ANSWERS,),
    Activation: (_of(_FLOATS, 3, 4),),
    Gradient: (_of(_FLOATS, 3, 4),),
    Partial: (_of(_FLOATS, 1),),
    Tied: (_of(_EXACT, 1),),
    Probe: (_EXAMPLES, _ANSWERS),
    Relay: (_of(_EXACT, 3, 4), _ANSWERS),
}
_NO_DATA = memoryview(b"")
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def payload_of(message: Message) -> tuple[TensorPayload, ...]:
    """Return the tensors of a message, empty for those that carry none."""
    return message.payload if isinstance(message, _Carrier) else ()


def encode_header(message: Message) -> bytes:
    """Return the header of a message: everything but the bytes of its tensors."""
    if isinstance(message, _Carrier):
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
    if _encoder.encode(message) != header:  # what is signed is these bytes, and judges have the message only
        raise MessageError(Reason.MALFORMED, "not in its one canonical form")
    if not isinstance(message, _Carrier):
        if tensors:
            raise MessageError(Reason.TENSOR_COUNT, f"{len(tensors)} where none belongs")
        return message
    kinds = _KINDS[type(message)]
    if not len(message.payload) == len(tensors) == len(kinds):
        raise MessageError(Reason.TENSOR_COUNT, f"{len(message.payload)} announced, {len(tensors)} sent")
    filled = tuple(attach(*each) for each in zip(kinds, message.payload, tensors, strict=True))
    return msgspec.structs.replace(message, payload=filled)
