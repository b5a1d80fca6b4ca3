"""Re-execution of an optimiser's step from its worker's record: sums, norms, the state after it, bit for bit.

Whether the claimed state follows is a matter of equality: all of this arithmetic is portable. A record that is false by
itself, or a state that does not follow, is a contradiction; material that cannot be had is not.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from chain.commitment import claim_root, leaf
from chain.transactions import Opening
from tdml_p2p.swarm.inputs import Input, Inputs, InputsRefused, decode_descriptor, encode
from tdml_p2p.swarm.material import Buffer, Fetch, Unavailable
from tdml_p2p.swarm.step_material import (
    EMPTY,
    MAX_RECORD_BYTES,
    UNSIGNED,
    FalseRecord,
    StepMaterial,
    checked_record,
)
from trainer.errors import StageError
from trainer.manifest import encode_manifest
from trainer.messages import Apply, Reduce
from trainer.payloads import Dtype, TensorPayload, pack, unpack
from trainer.trace import span
from trainer.worker_ports import Compute, StateUnavailable

if TYPE_CHECKING:
    import torch

    from tdml_p2p.swarm.reexecution import Cell, Execution
    from trainer.stage import CellResult
    from trainer.state import StageState

Blobs = Mapping[bytes, Buffer]


@dataclass(frozen=True, slots=True)
class Found:
    """What a record leads to: the state after the step, or what is false in it."""

    state: "StageState | None"
    contradiction: str = ""


class StepAuditor:
    """Executes claimed optimiser's steps of any task again."""

    def __init__(self, fetch: Fetch, ask: Callable[[str, bytes], Awaitable[bytes]], compute: Compute) -> None:
        self._fetch = fetch
        self._ask = ask
        self._compute = compute

    async def run(self, cell: "Cell", record: bytes | None = None) -> "tuple[Execution, tuple[Buffer, ...]]":
        """Return the execution and all that it rests on; raise `Unavailable`.

        The record is the one of this address, else the one that the worker has opened, else what it now says.
        """
        from tdml_p2p.swarm.reexecution import Execution

        assert cell.claimed is not None
        opened = cell.claimed.opened
        address = record or (opened.trace.x if opened is not None else await self._named(cell))
        data = bytes(await self._fetch(address, cell.holders))
        size, tied = await self._compute(partial(_sizes, cell))
        inputs = Inputs(Input(address, cell.claimed.worker, UNSIGNED), Input(EMPTY, cell.claimed.worker, UNSIGNED))
        try:
            if len(data) > MAX_RECORD_BYTES:
                raise FalseRecord("the record of the step is too long")
            material, reduce, apply = checked_record(data, cell, size, tied)
        except FalseRecord as error:
            return Execution(inputs, _nothing(size), contradiction=str(error)), (data,)
        step = cell.wanted.step
        with span("fetch state", step):
            before = await self._state(cell, size)
        with span("fetch parts", step):
            blobs = {name: await self._fetch(name, cell.holders) for name in _addresses(material)}
        with span("repeat step", step):
            found = await self._compute(partial(_repeat, cell, before, material, (reduce, apply), blobs))
        result = _nothing(size) if found.state is None else _result(found.state)
        kept = (encode_manifest(cell.manifest), before.manifest.encode(), *before.buffers(), data, *blobs.values())
        return Execution(inputs, result, material.leaves, found.contradiction), kept

    async def _named(self, cell: "Cell") -> bytes:
        """Return the address of the record that the worker names before it has opened anything."""
        assert cell.claimed is not None
        try:
            told = decode_descriptor(await self._ask(cell.claimed.worker, encode(cell.wanted)))
        except InputsRefused as error:
            raise Unavailable(str(error)) from None
        if told.x is None:
            raise Unavailable("the worker names no record of the step")
        return told.x.address

    async def _state(self, cell: "Cell", size: int) -> "StageState":
        from tdml_p2p.swarm.states import fetch_state

        try:
            return await fetch_state(self._fetch, cell.state, cell.holders, size)
        except StateUnavailable as error:
            raise Unavailable(f"the state before the step: {error}") from None


def contradicts(execution: "Execution", cell: "Cell", opening: Opening) -> bool:
    """Whether an opened step is false: by its record, by the claim's root, or by the state that it leads to."""
    from tdml_p2p.swarm.contradictions import disputed_results, has_other_inputs

    assert cell.claimed is not None
    if execution.contradiction or has_other_inputs(execution, opening.trace):
        return True
    leaves = (*execution.leaves, leaf(opening.salt, opening.trace))
    return claim_root(leaves) != cell.claimed.claim.root or bool(disputed_results(execution, opening.trace))


def _addresses(material: StepMaterial) -> tuple[bytes, ...]:
    far = () if material.far is None else (material.far.address,)
    named = (*(one.trace.gw for one in material.cells), *(part.address for part in material.parts), *far)
    return tuple(dict.fromkeys(named))


def _sizes(cell: "Cell") -> tuple[int, int]:
    from trainer.joint import tied_part
    from trainer.stage import stage_layout

    tied = tied_part(cell.manifest, cell.wanted.stage)
    return stage_layout(cell.manifest, cell.wanted.stage).total, tied.stop - tied.start


def _repeat(
    cell: "Cell",
    before: "StageState",
    material: StepMaterial,
    orders: tuple[Reduce, Apply | None],
    blobs: Blobs,
) -> Found:
    from trainer.joint import is_finite
    from trainer.step_rule import StepRule

    assert cell.claimed is not None
    size, claim, (reduce, apply) = before.weights.numel(), cell.claimed.claim, orders
    if before.step != cell.wanted.step - 1 or not _is_beginning(cell, before):
        return Found(None, "the step did not start from the state before it")
    rule = StepRule(cell.manifest, cell.wanted.stage)
    try:
        gradient = _mean(cell, material, reduce, blobs, size)
        far = None if material.far is None else _vector(blobs[material.far.address], rule.tied.stop - rule.tied.start)
    except ValueError as error:
        return Found(None, f"a part of the sum is no such tensor: {error}")
    squares = rule.join(gradient, far)[0] if apply is not None else 0.0
    if apply is not None and squares != apply.squares[cell.wanted.stage]:
        return Found(None, "the worker told the client another norm")
    if not is_finite(gradient):
        return Found(None, "the sum is not finite")
    after = rule.apply(before, gradient, () if apply is None else apply.squares)
    return Found(after, "" if after.root == claim.state_after else "the state claimed is not the one that follows")


def _is_beginning(cell: "Cell", before: "StageState") -> bool:
    """Whether a first step starts from the state that the manifest begins with."""
    from trainer.state import initial_state

    manifest, index = cell.manifest, cell.wanted.stage
    if before.step:
        return True
    if manifest.initial:
        return before.root.hex() == manifest.initial[index]
    try:
        return before.root == initial_state(manifest, index).root
    except StageError:
        return False


def _mean(cell: "Cell", material: StepMaterial, reduce: Reduce, blobs: Blobs, size: int) -> "torch.Tensor":
    """Return the stage's mean gradient as the worker must have found it; raise `ValueError`."""
    from trainer.reduction import ordered_sum

    assert cell.claimed is not None
    wire = cell.manifest.wire
    partials = {}
    if material.cells:  # a worker without any adds what the others have sent
        own = ordered_sum(_vector(blobs[one.trace.gw], size) for one in material.cells)
        payload = pack(own, wire)
        partials[cell.claimed.worker] = unpack(payload) if payload[0].is_encoded else own
    for part in material.parts:
        partials[part.sender] = _decoded(blobs[part.address], wire, size)
    return ordered_sum(partials[peer] for peer in sorted(partials)).div_(len(reduce.owners))


def _decoded(data: Buffer, wire: Dtype, size: int) -> "torch.Tensor":
    payload = TensorPayload(wire, (size,), memoryview(bytes(data)))
    if payload.nbytes != len(data):
        raise ValueError(f"{len(data)} bytes, not {payload.nbytes}")
    return unpack((payload,))


def _vector(data: Buffer, size: int) -> "torch.Tensor":
    from trainer.tensors import view_of

    return view_of(data, size)


def _result(state: "StageState") -> "CellResult":
    """Return a state in the places of a cell's results: weights, m and v for y, gx and gw."""
    from trainer.stage import CellResult

    return CellResult(state.weights.reshape(1, 1, -1), state.m.reshape(1, 1, -1), state.v, ())


def _nothing(size: int) -> "CellResult":
    """Return what stands for a state that cannot be found because the record is false."""
    import torch

    from trainer.state import StageState

    return _result(StageState(0, *(torch.zeros(size) for _ in range(3))))
