"""Inputs of a cell for those who re-execute it: who sent what, by content address and signature.

`/tdml/inputs/1` answers with a descriptor; the tensors follow by their addresses over the blob protocol.
At the first stage x is the tokens, at the last gy is the labels; both are signed by the client.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, TypeVar

import msgspec

from chain.codec import Hash, SignatureBytes, Uint
from chain.keys import PrivateKey, peer_id
from chain.transactions import Opening, Trace
from tdml_p2p.swarm.envelope import is_proven, statement
from trainer.manifest import TaskManifest
from trainer.messages import Activation, Gradient, Labels, Message, Tokens, encode_header
from trainer.payloads import TensorPayload
from trainer.tensor_shapes import gradient_of, input_of

if TYPE_CHECKING:
    from tdml_p2p.swarm.traces import KeptCell

PROTOCOL = "/tdml/inputs/1"
MAX_REQUEST_BYTES = 256
MAX_REPLY_BYTES = 2048

PeerText = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
Index = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]


class Wanted(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A request for the inputs of one cell of one stage."""

    task: Hash
    generation: Index
    step: Uint
    stage: Index
    cell: Index


class Input(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One input tensor: its content address, the peer that sent it and that peer's signature."""

    address: Hash
    sender: PeerText
    signature: SignatureBytes


class Descriptor(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a peer can say of a cell's inputs: x, and gy (the labels at the last stage)."""

    x: Input | None
    gy: Input | None


@dataclass(frozen=True, slots=True)
class Inputs:
    """Both inputs of a cell, each with the signature of a peer that may send it."""

    x: Input
    gy: Input


class InputsRefused(ValueError):
    """A request, or a reply, about a cell's inputs that cannot be used."""


T = TypeVar("T")

_wanted = msgspec.msgpack.Decoder(Wanted)
_descriptor = msgspec.msgpack.Decoder(Descriptor)


def decode_wanted(data: bytes) -> Wanted:
    """Return the request that `data` encodes; raise `InputsRefused`."""
    return _decoded(_wanted, data, MAX_REQUEST_BYTES)


def decode_descriptor(data: bytes) -> Descriptor:
    """Return the reply that `data` encodes; raise `InputsRefused`."""
    return _decoded(_descriptor, data, MAX_REPLY_BYTES)


def encode(value: Wanted | Descriptor) -> bytes:
    """Return the bytes of a request or a reply."""
    return msgspec.msgpack.encode(value)


def describe_own(kept: "KeptCell", client: str) -> Descriptor:
    """Return the inputs of a cell that this peer executed itself, for the task of `client`."""
    record, trace = kept.record, kept.trace
    is_last = record.labels is not None
    gy_proof = record.labels_proof if is_last else record.gy_proof
    gy_sender = client if is_last else record.gy_sender
    return Descriptor(
        Input(trace.x, record.x_sender, record.x_proof[0][1]),
        Input(trace.gy, gy_sender, gy_proof[0][1]),
    )


def signed_input(key: PrivateKey, task: bytes, message: Message, address: bytes) -> Input:
    """Return the input that `key`'s peer sent in `message`, signed as it was then (ed25519 repeats itself)."""
    signature = key.sign(statement(task, encode_header(message), address))
    return Input(address, peer_id(key.account), signature)


def merge(parts: Iterable[Descriptor], opened: Trace | None = None) -> Inputs | None:
    """Return both inputs out of checked `parts`, or None while one is missing.

    They are the first of each, but those that the worker has opened if these are among them.
    """
    kept = list(parts)
    x = _chosen([part.x for part in kept], None if opened is None else opened.x)
    gy = _chosen([part.gy for part in kept], None if opened is None else opened.gy)
    return Inputs(x, gy) if x is not None and gy is not None else None


def _chosen(given: "list[Input | None]", address: bytes | None) -> Input | None:
    known = [one for one in given if one is not None]
    return next((one for one in known if one.address == address), known[0] if known else None)


def is_of(inputs: Inputs, opened: Trace) -> bool:
    """Whether a trace names these inputs."""
    return (inputs.x.address, inputs.gy.address) == (opened.x, opened.gy)


def to_show(inputs: Inputs, opened: Trace) -> bytes:
    """Return, encoded, those inputs of a cell that the worker has opened others for."""
    x = None if inputs.x.address == opened.x else inputs.x
    gy = None if inputs.gy.address == opened.gy else inputs.gy
    return encode(Descriptor(x, gy))


def opened_inputs(opening: Opening, wanted: Wanted, manifest: TaskManifest, senders: "Senders") -> Inputs | None:
    """Return the opened inputs if they are signed, in the opening, by who may send them; else None."""
    try:
        inputs = merge([checked(wanted, decode_descriptor(opening.inputs), manifest, senders)])
    except InputsRefused:
        return None
    return inputs if inputs is not None and is_of(inputs, opening.trace) else None


def misleads(shown: bytes, opened: Trace, wanted: Wanted, manifest: TaskManifest, senders: "Senders") -> bool:
    """Whether `shown` holds another input than was opened, signed for that very cell by a peer that may send it."""
    try:
        part = checked(wanted, decode_descriptor(shown), manifest, senders)
    except InputsRefused:
        return False
    pairs = ((part.x, opened.x), (part.gy, opened.gy))
    return any(given is not None and given.address != named for given, named in pairs)


def agreed(parts: Iterable[Descriptor], senders: "Senders", quorum: int) -> Inputs | None:
    """Return the inputs that so many of a team say they sent, where only one may send them that one's; or None.

    What a minority sent was not what its receivers computed on.
    """
    kept = list(parts)
    x = _backed([part.x for part in kept], min(quorum, len(senders.x)))
    gy = _backed([part.gy for part in kept], min(quorum, len(senders.gy)))
    return Inputs(x, gy) if x is not None and gy is not None else None


def unanimous(parts: Iterable[Descriptor]) -> Inputs | None:
    """Return the inputs of which nobody tells otherwise, or None."""
    kept = list(parts)
    addresses = ({part.x.address for part in kept if part.x}, {part.gy.address for part in kept if part.gy})
    return merge(kept) if all(len(found) == 1 for found in addresses) else None


def _backed(given: "list[Input | None]", least: int) -> Input | None:
    senders: dict[bytes, set[str]] = {}
    for one in given:
        if one is not None:
            senders.setdefault(one.address, set()).add(one.sender)
            if len(senders[one.address]) >= least:
                return one
    return None


def checked(wanted: Wanted, part: Descriptor, manifest: TaskManifest, senders: "Senders") -> Descriptor:
    """Return `part`; raise `InputsRefused` unless its inputs are signed by peers that may have sent them."""
    x, gy = expected_messages(wanted, manifest)
    for name, message, given, allowed in (("x", x, part.x, senders.x), ("gy", gy, part.gy, senders.gy)):
        if given is None:
            continue
        if given.sender not in allowed:
            raise InputsRefused(f"{given.sender} may not send the {name} of this cell")
        if not is_proven(wanted.task, given.sender, encode_header(message), (given.address, given.signature)):
            raise InputsRefused(f"the signature under the {name} of this cell is false")
    return part


class Senders(msgspec.Struct, frozen=True):
    """The peers that may have sent a cell's x and gy."""

    x: frozenset[str]
    gy: frozenset[str]


def expected_messages(wanted: Wanted, manifest: TaskManifest) -> tuple[Message, Message]:
    """Return the messages, without their bytes, in which a cell's x and gy must have travelled."""
    place = (wanted.generation, wanted.step, wanted.cell)
    x_bare, gy_bare = (
        (TensorPayload(*form, memoryview(b"")),)
        for form in (input_of(manifest, wanted.stage), gradient_of(manifest, wanted.stage))
    )
    is_first, is_last = wanted.stage == 0, wanted.stage == manifest.stages - 1
    x: Message = Tokens(*place, x_bare) if is_first else Activation(*place, wanted.stage - 1, x_bare)
    gy: Message = Labels(*place, gy_bare) if is_last else Gradient(*place, wanted.stage + 1, gy_bare)
    return x, gy


def _decoded(decoder: "msgspec.msgpack.Decoder[T]", data: bytes, limit: int) -> T:
    if len(data) > limit:
        raise InputsRefused(f"{len(data)} bytes where at most {limit} belong")
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise InputsRefused(str(error)) from None
