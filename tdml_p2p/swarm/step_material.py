"""The worker's own record of one optimiser's step: whose gradients it added, on whose orders, by content address.

The record is a blob whose address stands in the claim's last leaf. The client has signed for the orders and the other
contributors for their partial sums, so that each worker answers for its own arithmetic only: that of a partial sum is
audited at who made it.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import msgspec

from chain.codec import Hash, SignatureBytes
from chain.commitment import leaf
from chain.transactions import Claim, Trace
from tdml_p2p.swarm.envelope import MAX_MESSAGE_HEADER, is_proven
from tdml_p2p.swarm.inputs import Index, Input
from trainer.content import address_of
from trainer.manifest import TaskManifest
from trainer.messages import Apply, Partial, Reduce, Tied, decode_message, encode_header
from trainer.payloads import Dtype, MessageError, TensorPayload

if TYPE_CHECKING:
    from tdml_p2p.swarm.reexecution import Cell
    from trainer.reduction import Part
    from trainer.transport import Proof
    from trainer.worker_step import StepRecord

EMPTY = address_of(b"")
MAX_RECORD_BYTES = 4 << 20
UNSIGNED = bytes(64)

_Header = Annotated[bytes, msgspec.Meta(max_length=MAX_MESSAGE_HEADER)]


class FalseRecord(ValueError):
    """A record of a step that does not bear out the claim, in a few words."""


class Leaf(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One of the worker's claimed cells, as its leaf was made."""

    cell: Index
    salt: Hash
    trace: Trace


class Order(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A message of the client and its signature."""

    header: _Header
    signature: SignatureBytes


class StepMaterial(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Everything that a stage's state after a step follows from, with the state before it."""

    reduce: Order
    apply: Order | None
    cells: tuple[Leaf, ...]
    parts: tuple[Input, ...]
    far: Input | None

    @property
    def leaves(self) -> tuple[bytes, ...]:
        """The leaves of the worker's cells, in the order of the claim."""
        return tuple(leaf(one.salt, one.trace) for one in self.cells)


_decoder = msgspec.msgpack.Decoder(StepMaterial)


def record_of(record: "StepRecord", cells: Sequence[Leaf]) -> bytes:
    """Return the bytes of a worker's record of a step."""
    applied = None if record.applied is None else _order(record.applied, record.applied_proof)
    parts = tuple(_input(part) for part in record.parts)
    far = None if record.far is None else _input(record.far)
    material = StepMaterial(_order(record.reduction, record.proof), applied, tuple(cells), parts, far)
    return msgspec.msgpack.encode(material)


def decode_record(data: bytes) -> StepMaterial:
    """Return the record that `data` encodes; raise `FalseRecord`."""
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise FalseRecord(f"the record of the step cannot be read: {error}") from None


def checked_record(data: bytes, cell: "Cell", size: int, tied: int) -> tuple[StepMaterial, Reduce, Apply | None]:
    """Return the record of a claimed step and the client's orders in it, all signatures and places checked.

    The stage has `size` parameters, of which `tied` are shared with the other end. Raises `FalseRecord`.
    """
    assert cell.claimed is not None
    material, claimed = decode_record(data), cell.claimed
    reduce, apply = _orders(material, cell)
    _check_cells(material, reduce, claimed.claim, claimed.worker)
    manifest, index = cell.manifest, cell.wanted.stage
    others = tuple(peer for peer in sorted(set(reduce.owners)) if peer != claimed.worker)
    if tuple(part.sender for part in material.parts) != others:
        raise FalseRecord("the partial sums are not those of the others who own cells")
    place = (reduce.generation, reduce.step, reduce.attempt)
    partial = Partial(*place, index, (TensorPayload(manifest.wire, (size,), memoryview(b"")),))
    for part in material.parts:
        _check_signed(part, encode_header(partial), cell, "a partial sum")
    end = _other_end(manifest, index)
    if (material.far is None) != (end is None):
        raise FalseRecord("the other end's part of the tied gradient is not there, or should not be")
    if material.far is not None and end is not None:
        if material.far.sender not in reduce.ends:
            raise FalseRecord("the other end's part of the tied gradient is of somebody else")
        there = Tied(*place, end, (TensorPayload(Dtype.FP32, (tied,), memoryview(b"")),))
        _check_signed(material.far, encode_header(there), cell, "the other end's part")
    return material, reduce, apply


def _orders(material: StepMaterial, cell: "Cell") -> tuple[Reduce, Apply | None]:
    manifest, place = cell.manifest, cell.wanted
    reduce = _ordered(material.reduce, cell)
    if not isinstance(reduce, Reduce) or len(reduce.owners) != manifest.microbatches:
        raise FalseRecord("the client's order to add is not one")
    if (material.apply is None) == manifest.is_joint:
        raise FalseRecord("the client's order to apply is not there, or should not be")
    if material.apply is None:
        return reduce, None
    apply = _ordered(material.apply, cell)
    if not isinstance(apply, Apply) or not len(apply.attempts) == len(apply.squares) == manifest.stages:
        raise FalseRecord("the client's order to apply is not one")
    if apply.attempts[place.stage] != reduce.attempt:
        raise FalseRecord("the orders are of different attempts")
    return reduce, apply


def _ordered(order: Order, cell: "Cell") -> object:
    assert cell.claimed is not None
    try:
        message = decode_message(order.header, ())
    except MessageError as error:
        raise FalseRecord(f"an order of the client cannot be read: {error}") from None
    place = (getattr(message, "generation", -1), getattr(message, "step", -1))
    if place != (cell.wanted.generation, cell.wanted.step):
        raise FalseRecord("an order of the client is of another step")
    if not is_proven(cell.wanted.task, cell.claimed.client, order.header, (EMPTY, order.signature)):
        raise FalseRecord("the client has not signed an order")
    return message


def _check_cells(material: StepMaterial, reduce: Reduce, claim: Claim, worker: str) -> None:
    own = tuple(cell for cell, owner in enumerate(reduce.owners) if owner == worker)
    if not tuple(one.cell for one in material.cells) == claim.cells == own:
        raise FalseRecord("the cells added are not the cells claimed")


def _check_signed(given: Input, header: bytes, cell: "Cell", what: str) -> None:
    if not is_proven(cell.wanted.task, given.sender, header, (given.address, given.signature)):
        raise FalseRecord(f"{what} is not signed by its sender")


def _other_end(manifest: TaskManifest, index: int) -> int | None:
    from trainer.joint import other_end

    return other_end(manifest, index)


def _order(message: Reduce | Apply, proof: "Proof") -> Order:
    return Order(encode_header(message), proof[0][1] if proof else UNSIGNED)


def _input(part: "Part") -> Input:
    address, signature = part.proof[0] if part.proof else (address_of(part.message.payload[0].data), UNSIGNED)
    return Input(address, part.sender, signature)
