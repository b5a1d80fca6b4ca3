"""What this peer keeps of its committed cells until they settle: for claims, openings and auditors.

One `TraceBook` per task. Tensors are found by content address, so neighbours of a cell are a second
source of its inputs without keeping anything twice.
"""

from collections.abc import Container
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from chain.commitment import claim_root, leaf, prove
from chain.hashing import digest
from chain.transactions import Claim, Opening, Trace
from tdml_p2p.swarm.step_material import EMPTY, Leaf, record_of
from trainer.content import address_of
from trainer.payloads import Dtype, pack
from trainer.sketch import cell_sketch
from trainer.state import StageState, StateManifest
from trainer.tensors import buffer_of, vector_of
from trainer.worker_ports import DEFAULT_MEMORY_LIMIT
from trainer.worker_step import CellRecord, StepRecord

if TYPE_CHECKING:
    from torch import Tensor

_TRANSITION = 2**63
"""Stands for a cell's number in the salt of a step's leaf."""


@dataclass(frozen=True, slots=True)
class KeptCell:
    """A finished cell with its trace and the salt of its leaf."""

    generation: int
    step: int
    record: CellRecord
    trace: Trace
    salt: bytes


@dataclass(frozen=True, slots=True)
class KeptTransition:
    """The optimiser's step after the cells: its leaf, this worker's record of it, and what others added, by address."""

    trace: Trace
    salt: bytes
    blobs: dict[bytes, memoryview]


@dataclass(frozen=True, slots=True)
class KeptStep:
    """A committed step of this worker and the claim made of it."""

    claim: Claim
    cells: dict[int, KeptCell]
    leaves: tuple[bytes, ...]
    transition: KeptTransition


class TraceBook:
    """The committed steps of one task at this worker, by (generation, step).

    Weight gradients, as large as the stage each, are kept until it is drawn which of them are audited, and while they
    take no more than `room` bytes; what is asked for of the others must be computed again.
    """

    def __init__(self, task: bytes, secret: bytes, wire: Dtype = Dtype.FP32, room: int = DEFAULT_MEMORY_LIMIT) -> None:
        self._task = task
        self._secret = secret
        self._wire = wire
        self._room = room
        self._sent: dict[tuple[int, int], set[bytes]] = {}
        self._steps: dict[tuple[int, int], KeptStep] = {}
        self._tensors: dict[bytes, memoryview] = {}
        self._states: dict[bytes, tuple[int, tuple[bytes, ...]]] = {}
        self._released: set[tuple[int, int]] = set()
        """Steps of which only the gradients that audits were drawn for are kept."""

    def add(self, record: StepRecord, before: bytes, after: StateManifest) -> Claim:
        """Keep a committed step and return its claim. Hashes tensors: slow.

        A step in which no cell is ours is claimed too: who claims nothing where cells are missing loses its seat. One
        that a client has done again in a generation stays as it was claimed, which is what its audits ask for.
        """
        if (known := self._steps.get((record.generation, record.step))) is not None:
            return known.claim
        cells = {cell.cell: self._kept(record, cell, before) for cell in record.cells}
        transition = self._transition(record, cells, before, after)
        own = tuple(leaf(kept.salt, kept.trace) for kept in cells.values())
        leaves = (*own, leaf(transition.salt, transition.trace))
        claim = Claim(
            task=self._task,
            generation=record.generation,
            step=record.step,
            stage=record.stage,
            cells=tuple(cells),
            root=claim_root(leaves),
            state_before=before,
            state_after=record.root,
        )
        for index, kept in cells.items():
            if kept.record.gw is not None and self._room < kept.record.gw.nbytes:
                cells[index] = replace(kept, record=replace(kept.record, gw=None))
            self._hold(cells[index])
        self._steps[record.generation, record.step] = KeptStep(claim, cells, leaves, transition)
        self._tensors.update(transition.blobs)
        return claim

    def restore(self, place: tuple[int, int, int], gradient: "Tensor") -> bool:
        """Keep a gradient, computed again, of (generation, step, cell); return whether it is the claimed one."""
        generation, step, cell = place
        kept = self.cell(generation, step, cell)
        if kept is None or _address(gradient) != kept.trace.gw:
            return False
        if kept.record.gw is None:
            kept = replace(kept, record=replace(kept.record, gw=gradient))
            self._steps[generation, step].cells[cell] = kept
            self._hold(kept)
        return True

    def provide_state(self, state: StageState) -> None:
        """Serve a state of the stage, by its root and the addresses it names, until its step has settled."""
        manifest = state.manifest
        blobs = {manifest.root(): memoryview(manifest.encode())}
        blobs |= zip((manifest.weights, manifest.m, manifest.v), state.buffers(), strict=True)
        self._tensors.update(blobs)
        self._states[manifest.root()] = (state.step, tuple(blobs))

    def cell(self, generation: int, step: int, cell: int) -> KeptCell | None:
        """Return a kept cell of this worker's stage."""
        kept = self._steps.get((generation, step))
        return kept.cells.get(cell) if kept else None

    def step_record(self, generation: int, step: int) -> bytes | None:
        """Return the address of this worker's record of an optimiser's step."""
        kept = self._steps.get((generation, step))
        return None if kept is None else kept.transition.trace.x

    def without_gradient(self, generation: int, step: int) -> tuple[KeptCell, ...]:
        """Return the cells of a step whose weight gradients there was no room to keep."""
        kept = self._steps.get((generation, step))
        return () if kept is None else tuple(cell for cell in kept.cells.values() if cell.record.gw is None)

    def sent(self, kept: KeptCell, tensor: "Tensor", address: bytes) -> bytes:
        """Return the address of the bytes in which a result of a kept cell, of this address, went to a neighbour."""
        if self._wire is Dtype.FP32:
            return address
        data = pack(tensor, self._wire)[0].data
        encoded = address_of(data)
        self._tensors[encoded] = data
        self._sent.setdefault((kept.generation, kept.step), set()).add(encoded)
        return encoded

    def blob(self, address: bytes) -> memoryview | None:
        """Return the kept tensor or state with this content address."""
        return self._tensors.get(address)

    def gradients(self, address: bytes) -> list[tuple[Claim, int]]:
        """Return the claims and cells whose weight gradient has this address; none for any other tensor.

        What is done again after a rollback leads to the same gradients as before.
        """
        cells = ((step.claim, kept) for step in list(self._steps.values()) for kept in step.cells.values())
        return [(claim, kept.record.cell) for claim, kept in cells if kept.trace.gw == address]

    def opening(self, claim: tuple[int, int, int], audit: bytes, key: bytes) -> Opening | None:
        """Return the opening of (generation, step, cell) with its results sketched under `key`. Slow."""
        generation, step, cell = claim
        kept = self._steps.get((generation, step))
        if kept is not None and cell not in kept.cells:
            return self._opening_of_step(kept, audit, key)
        if kept is None:
            return None
        chosen = kept.cells[cell]
        gradient = chosen.record.gw
        if gradient is None:
            return None
        return Opening(
            audit=audit,
            salt=chosen.salt,
            trace=chosen.trace,
            proof=prove(kept.leaves, list(kept.cells).index(cell)),
            sketch=cell_sketch(chosen.record.y, chosen.record.gx, gradient, key),
        )

    def _opening_of_step(self, kept: KeptStep, audit: bytes, key: bytes) -> Opening | None:
        trace = kept.transition.trace
        vectors = [self._tensors.get(address) for address in (trace.y, trace.gx, trace.gw)]
        weights, m, v = (None if data is None else vector_of(data, len(data) // 4) for data in vectors)
        if weights is None or m is None or v is None:
            return None
        sketch = cell_sketch(weights.reshape(1, 1, -1), m, v, key)
        return Opening(audit, kept.transition.salt, trace, prove(kept.leaves, len(kept.cells)), sketch)

    def forget(self, settled: int, generation: int) -> None:
        """Drop steps that have settled or belong to an ended generation; states are kept from `settled` on."""
        gone: set[bytes] = set()
        for key in list(self._steps):  # a copy: another thread may be adding a step
            if key[1] <= settled or key[0] < generation - 1:
                step = self._steps.pop(key)
                gone |= _named(step) | self._sent.pop(key, set())
                self._room += sum(_gradient_bytes(kept) for kept in step.cells.values())
        for root in [root for root, (step, _) in self._states.items() if step < settled]:
            gone.update(self._states.pop(root)[1])
        self._let_go(gone)
        self._released = {key for key in self._released if key in self._steps}

    def unreleased(self) -> list[Claim]:
        """Return the claims all of whose gradients are still kept, as far as there was room."""
        return [kept.claim for key, kept in list(self._steps.items()) if key not in self._released]

    def release(self, claim: Claim, audited: Container[int]) -> None:
        """Drop the gradients of cells that no audit was drawn for; who asks for one after all has it restored."""
        place = (claim.generation, claim.step)
        kept = self._steps.get(place)
        if kept is None:
            return
        self._released.add(place)
        gone: set[bytes] = set()
        for number, cell in kept.cells.items():
            if number not in audited and cell.record.gw is not None:
                self._room += _gradient_bytes(cell)
                gone.add(cell.trace.gw)
                kept.cells[number] = replace(cell, record=replace(cell.record, gw=None))
        self._let_go(gone)

    def _let_go(self, gone: set[bytes]) -> None:
        """Drop tensors that no kept state or cell has any more."""
        if not gone:
            return
        gone.difference_update(*(addresses for _, addresses in self._states.values()))
        gone.difference_update(*(_named(kept) for kept in list(self._steps.values())))  # equal tensors
        for address in gone:
            self._tensors.pop(address, None)

    def _hold(self, kept: KeptCell) -> None:
        self._tensors.update(_tensors(kept))
        self._room -= _gradient_bytes(kept)

    def _transition(
        self, record: StepRecord, cells: dict[int, KeptCell], before: bytes, after: StateManifest
    ) -> KeptTransition:
        own = [Leaf(index, kept.salt, kept.trace) for index, kept in cells.items()]
        data = record_of(record, own)
        parts = (*record.parts, *([] if record.far is None else [record.far]))
        blobs = {address_of(data): memoryview(data)}
        blobs |= {address_of(sent): sent for sent in (part.message.payload[0].data for part in parts)}
        trace = Trace(
            x=address_of(data), y=after.weights, gy=EMPTY, gx=after.m, gw=after.v, boundaries=EMPTY, state=before
        )
        return KeptTransition(trace, self._salt(record, _TRANSITION), blobs)

    def _salt(self, record: StepRecord, cell: int) -> bytes:
        name = b"".join(n.to_bytes(8, "big") for n in (record.generation, record.step, cell))
        return digest("salt", self._secret, self._task, name)

    def _kept(self, record: StepRecord, cell: CellRecord, before: bytes) -> KeptCell:
        trace = Trace(
            x=_address(cell.x) if cell.x_sent is None else address_of(cell.x_sent),
            y=_address(cell.y),
            gy=_address(_gradient_of(cell)) if cell.gy_sent is None else address_of(cell.gy_sent),
            gx=_address(cell.gx),
            gw=_address(cell.gw),
            boundaries=digest("boundaries", *cell.boundaries),
            state=before,
        )
        return KeptCell(record.generation, record.step, cell, trace, self._salt(record, cell.cell))


def _address(tensor: "Tensor | None") -> bytes:
    """Return the content address of a tensor's raw bytes; of no bytes for no tensor."""
    return EMPTY if tensor is None else address_of(buffer_of(tensor))


def _tensors(kept: KeptCell) -> dict[bytes, memoryview]:
    """Return the tensors of a cell by address; at the last stage the labels stand where gy does elsewhere."""
    record, trace = kept.record, kept.trace
    pairs = (
        (trace.x, record.x if record.x_sent is None else record.x_sent),
        (trace.y, record.y),
        (trace.gy, _gradient_of(record) if record.gy_sent is None else record.gy_sent),
        (trace.gx, record.gx),
        (trace.gw, record.gw),
    )
    return {
        address: given if isinstance(given, memoryview) else buffer_of(given)
        for address, given in pairs
        if given is not None
    }


def _gradient_bytes(kept: KeptCell) -> int:
    return 0 if kept.record.gw is None else kept.record.gw.nbytes


def _gradient_of(record: CellRecord) -> "Tensor | None":
    """Return the gradient of a cell's output or, at the last stage, the labels that stand in its place."""
    return record.labels if record.labels is not None else record.gy


def _named(step: KeptStep) -> set[bytes]:
    """Return the addresses of a step's tensors."""
    return {address for kept in step.cells.values() for address in _tensors(kept)} | set(step.transition.blobs)
