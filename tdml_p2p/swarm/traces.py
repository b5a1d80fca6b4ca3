"""What this peer keeps of its committed cells until they settle: for claims, openings and auditors.

One `TraceBook` per task. Tensors are found by content address, so neighbours of a cell are a second
source of its inputs without keeping anything twice.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from chain.commitment import claim_root, leaf, prove
from chain.hashing import digest
from chain.transactions import Claim, Opening, Trace
from trainer.content import address_of
from trainer.sketch import cell_sketch
from trainer.state import StageState
from trainer.tensors import buffer_of
from trainer.worker_step import CellRecord, StepRecord

if TYPE_CHECKING:
    from torch import Tensor

EMPTY = address_of(b"")


@dataclass(frozen=True, slots=True)
class KeptCell:
    """A finished cell with its trace and the salt of its leaf."""

    record: CellRecord
    trace: Trace
    salt: bytes


@dataclass(frozen=True, slots=True)
class KeptStep:
    """A committed step of this worker and the claim made of it."""

    claim: Claim
    cells: dict[int, KeptCell]
    leaves: tuple[bytes, ...]


class TraceBook:
    """The committed steps of one task at this worker, by (generation, step)."""

    def __init__(self, task: bytes, secret: bytes) -> None:
        self._task = task
        self._secret = secret
        self._steps: dict[tuple[int, int], KeptStep] = {}
        self._tensors: dict[bytes, memoryview] = {}
        self._states: dict[bytes, tuple[int, tuple[bytes, ...]]] = {}

    def add(self, record: StepRecord, before: bytes) -> Claim | None:
        """Keep a committed step and return its claim, or None if no cell is ours. Hashes tensors: slow."""
        if not record.cells:
            return None
        cells = {cell.cell: self._kept(record, cell, before) for cell in record.cells}
        leaves = tuple(leaf(kept.salt, kept.trace) for kept in cells.values())
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
        self._steps[record.generation, record.step] = KeptStep(claim, cells, leaves)
        for kept in cells.values():
            self._tensors.update(_tensors(kept))
        return claim

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

    def blob(self, address: bytes) -> memoryview | None:
        """Return the kept tensor or state with this content address."""
        return self._tensors.get(address)

    def opening(self, claim: tuple[int, int, int], audit: bytes, key: bytes) -> Opening | None:
        """Return the opening of (generation, step, cell) with its results sketched under `key`. Slow."""
        generation, step, cell = claim
        kept = self._steps.get((generation, step))
        if kept is None or cell not in kept.cells:
            return None
        chosen = kept.cells[cell]
        return Opening(
            audit=audit,
            salt=chosen.salt,
            trace=chosen.trace,
            proof=prove(kept.leaves, list(kept.cells).index(cell)),
            sketch=cell_sketch(chosen.record.y, chosen.record.gx, chosen.record.gw, key),
        )

    def forget(self, settled: int, generation: int) -> None:
        """Drop steps that have settled or belong to an ended generation; states are kept from `settled` on."""
        gone: set[bytes] = set()
        for key in list(self._steps):  # a copy: another thread may be adding a step
            if key[1] <= settled or key[0] < generation - 1:
                gone |= _named(self._steps.pop(key))
        for root in [root for root, (step, _) in self._states.items() if step < settled]:
            gone.update(self._states.pop(root)[1])
        if not gone:
            return
        gone.difference_update(*(addresses for _, addresses in self._states.values()))
        gone.difference_update(*(_named(kept) for kept in list(self._steps.values())))  # equal tensors
        for address in gone:
            self._tensors.pop(address, None)

    def _kept(self, record: StepRecord, cell: CellRecord, before: bytes) -> KeptCell:
        name = b"".join(n.to_bytes(8, "big") for n in (record.generation, record.step, cell.cell))
        trace = Trace(
            x=_address(cell.x),
            y=_address(cell.y),
            gy=_address(cell.labels if cell.labels is not None else cell.gy),
            gx=_address(cell.gx),
            gw=_address(cell.gw),
            boundaries=digest("boundaries", *cell.boundaries),
            state=before,
        )
        return KeptCell(cell, trace, digest("salt", self._secret, self._task, name))


def _address(tensor: "Tensor | None") -> bytes:
    """Return the content address of a tensor's raw bytes; of no bytes for no tensor."""
    return EMPTY if tensor is None else address_of(buffer_of(tensor))


def _tensors(kept: KeptCell) -> dict[bytes, memoryview]:
    """Return the tensors of a cell by address; at the last stage the labels stand where gy does elsewhere."""
    record, trace = kept.record, kept.trace
    gy = record.labels if record.labels is not None else record.gy
    pairs = (
        (trace.x, record.x),
        (trace.y, record.y),
        (trace.gy, gy),
        (trace.gx, record.gx),
        (trace.gw, record.gw),
    )
    return {address: buffer_of(tensor) for address, tensor in pairs if tensor is not None}


def _named(step: KeptStep) -> set[bytes]:
    """Return the addresses of a step's tensors."""
    return {address for kept in step.cells.values() for address in _tensors(kept)}
