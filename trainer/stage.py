"""One stage of the model: forward and backward of cells on a flat fp32 weight vector.

Shapes: B sequences, T tokens, D hidden width; of images (B,C,H,W) for (B,T,D), and (B) for (B,T). Several cells may
be in flight (1F1B), each with its own graph. A cell's results are bit-equal in every process of one kernel class
(`trainer.kernel`) with one torch thread.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from trainer.base_weights import StageBase, adapted_stage
from trainer.content import address_of
from trainer.errors import StageError, StageReason
from trainer.families import Family, family_of
from trainer.families.base import StageModule
from trainer.layout import Layout, StageSpec
from trainer.manifest import TaskManifest
from trainer.precision import computing_in
from trainer.stage_inputs import inputs_of
from trainer.statistics import share
from trainer.tensors import aligned, buffer_of, empty
from trainer.trace import span

__all__ = [
    "Backward",
    "CellKey",
    "CellResult",
    "Forward",
    "Stage",
    "StageLike",
    "StageSpec",
    "build_stage",
    "execute",
    "stage_layout",
]


class CellKey(NamedTuple):
    """Identity of one cell at a stage: generation of the task, step, micro-batch."""

    generation: int
    step: int
    cell: int


class Forward(NamedTuple):
    """Output of a cell, hidden (B,T,D) or per-token loss (B,T), and the address of each layer's output."""

    y: Tensor
    boundaries: tuple[bytes, ...]


class Backward(NamedTuple):
    """Gradient of a cell's input (B,T,D), empty at the first stage, and of the weights, flat fp32.

    In the places of running statistics stands the cell's share of what the step adds to them (`trainer.statistics`).
    """

    gx: Tensor
    gw: Tensor


class CellResult(NamedTuple):
    """Everything that re-executing one cell yields."""

    y: Tensor
    gx: Tensor
    gw: Tensor
    boundaries: tuple[bytes, ...]


class StageLike(Protocol):
    """A stage, or a wrapper that stands around one."""

    spec: StageSpec

    def load_base(self, base: StageBase) -> None:
        """Take the frozen weights of a stage that trains adapters, which comes before everything else."""
        ...

    def load(self, weights: Tensor) -> None:
        """Copy a flat fp32 vector into the parameters; cells in flight are dropped."""
        ...

    def forward(self, cell: CellKey, x: Tensor, labels: Tensor | None) -> Forward:
        """Compute a cell's output and keep its graph under `cell`."""
        ...

    def backward(self, cell: CellKey, gy: Tensor | None) -> Backward:
        """Compute a cell's gradients and free its graph."""
        ...

    def drop(self, cell: CellKey) -> None:
        """Forget a cell in flight, if it is there."""
        ...

    def evaluate(self, x: Tensor, labels: Tensor | None) -> Tensor:
        """Compute an output without a graph, as the finished model would."""
        ...


@dataclass(frozen=True)
class _Graph:
    x: Tensor
    y: Tensor
    additions: tuple[Tensor, ...]


class Stage:
    """A stage whose parameters are views into one flat fp32 vector.

    With `recompute` cells in flight keep only their inputs, and `backward` computes forward once more: less memory
    for more time, and not one bit else. The last stage, which has one cell in flight, keeps its graph.
    """

    def __init__(self, family: Family, manifest: TaskManifest, spec: StageSpec, recompute: bool = False) -> None:
        self.spec = spec
        self._recompute = recompute and not spec.is_last
        self.layout: Layout = manifest.trained_layout(spec)
        self._flat = torch.empty(self.layout.total, dtype=torch.float32)
        self._base: StageBase | None = None
        self._adapted = adapted_stage(manifest, spec, self._flat)
        self.module: StageModule = self._adapted or family.build(manifest.config, spec, self._flat)
        self.module.masks.seed = manifest.seed
        self._start = manifest.start
        self._precision = manifest.precision
        self._parameters = self.module.ordered()
        self._cells = manifest.microbatches
        self._inputs = inputs_of(manifest, spec)
        self._is_loaded = False
        self._graphs: dict[CellKey, _Graph] = {}

    def load_base(self, base: StageBase) -> None:
        """Take the frozen weights of a stage that trains adapters, without copying them; raise `StageError`."""
        if self._adapted is None or base.spec != self.spec:
            raise StageError(StageReason.WRONG_STATE, f"Stage {self.spec.index} does not take these frozen weights.")
        self._graphs.clear()
        self._adapted.freeze(base.weights)
        self._base = base  # which thereby stays in memory for others

    def load(self, weights: Tensor) -> None:
        """Copy a flat fp32 vector into the parameters; cells in flight are dropped."""
        if self._adapted is not None and self._base is None:
            raise StageError(StageReason.WRONG_STATE, "The stage has no frozen weights yet.")
        if weights.dtype != torch.float32 or weights.shape != self._flat.shape:
            raise StageError(
                StageReason.WRONG_STATE,
                f"Stage {self.spec.index} holds {self.layout.total} fp32 weights, not this tensor.",
            )
        self._graphs.clear()
        self._flat.copy_(weights)
        self._is_loaded = True

    def forward(self, cell: CellKey, x: Tensor, labels: Tensor | None) -> Forward:
        """Compute a cell's output and keep its graph under `cell`; raise `StageError`.

        `x` is int32 tokens (B,T), or fp32 pixels, at the first stage, else fp32 hidden (B,T,D); `labels` int32 (B,T)
        go to the last stage only.
        """
        if not self._is_loaded:
            raise StageError(StageReason.WRONG_STATE, "The stage has no weights yet.")
        if cell in self._graphs:
            raise StageError(StageReason.REPEATED_CELL, f"Cell {cell} is already in flight.")
        self._inputs.check(x, labels)
        x = aligned(x.detach())
        if not self.spec.is_first:
            x.requires_grad_()
        layers: list[Tensor] = []
        y = self._run(cell, x, labels, layers)
        self._graphs[cell] = _Graph(x, y.detach() if self._recompute else y, tuple(self.module.additions()))
        with span("hash layers", cell.step, cell.cell):
            boundaries = tuple(address_of(buffer_of(layer)) for layer in layers)
        return Forward(y.detach(), boundaries)

    def backward(self, cell: CellKey, gy: Tensor | None) -> Backward:
        """Compute a cell's gradients and free its graph; raise `StageError`.

        `gy` is fp32 (B,T,D), or nothing (None or empty) at the last stage, whose loss is the mean of y.
        """
        graph = self._graphs.get(cell)
        if graph is None:
            raise StageError(StageReason.UNKNOWN_CELL, f"Cell {cell} is not in flight.")
        seed = self._seed(graph.y, gy)
        del self._graphs[cell]
        if self._recompute:
            with span("recompute", cell.step, cell.cell):
                graph = _Graph(graph.x, self._run(cell, graph.x, None, []), graph.additions)
        inputs = self._parameters if self.spec.is_first else [graph.x, *self._parameters]
        gradients = list(torch.autograd.grad(graph.y, inputs, seed))
        gx = empty() if self.spec.is_first else gradients.pop(0).contiguous()
        with span("flatten gw", cell.step, cell.cell):
            gw = torch.empty(self.layout.total, dtype=torch.float32)
            parts = (*gradients, *self._shares(cell.cell, graph.additions))
            for part, (start, stop) in zip(parts, self.layout.ranges, strict=True):
                gw[start:stop].view(part.shape).copy_(part)
        return Backward(gx, gw)

    def _shares(self, cell: int, additions: tuple[Tensor, ...]) -> list[Tensor]:
        """Return what a cell contributes to the step's addition to the running statistics."""
        kept = (tensor.kept or 0.0 for tensor in self.layout.statistics)
        return [part * share(rate, self._cells, cell) for rate, part in zip(kept, additions, strict=True)]

    def drop(self, cell: CellKey) -> None:
        """Forget a cell in flight, if it is there."""
        self._graphs.pop(cell, None)

    def evaluate(self, x: Tensor, labels: Tensor | None) -> Tensor:
        """Return hidden (B,T,D), or per-token loss (B,T) at the last stage, as the finished model gives it.

        Training goes on as if this had not been called. Raise `StageError` as `forward` does.
        """
        if not self._is_loaded:
            raise StageError(StageReason.WRONG_STATE, "The stage has no weights yet.")
        self._inputs.check(x, labels)
        return self._used(x, labels)

    def logits(self, x: Tensor) -> Tensor:
        """Return hidden (B,T,D), or logits (B,T,V) at the last stage, as the finished model gives them."""
        return self._used(x, None)

    def _used(self, x: Tensor, labels: Tensor | None) -> Tensor:
        was_training = self.module.training
        self.module.train(False)
        try:
            with torch.no_grad(), computing_in(self._precision):
                return self.module(aligned(x), None if labels is None else labels.long(), []).float()
        finally:
            self.module.train(was_training)

    def _run(self, cell: CellKey, x: Tensor, labels: Tensor | None, layers: list[Tensor]) -> Tensor:
        masks = self.module.masks
        masks.cell = (self._start + cell.step, cell.cell)
        try:
            with torch.enable_grad(), computing_in(self._precision):
                return self.module(x, None if labels is None else labels.long(), layers).float()
        finally:
            masks.cell = None

    def _seed(self, y: Tensor, gy: Tensor | None) -> Tensor:
        if self.spec.is_last:
            if gy is not None and gy.numel():
                raise StageError(StageReason.BAD_SHAPE, "The last stage takes no gradient of its output.")
            return torch.full_like(y, 1.0 / y.numel())
        if gy is None or gy.shape != y.shape or gy.dtype != torch.float32:
            raise StageError(StageReason.BAD_SHAPE, f"The gradient of the output must be fp32 {tuple(y.shape)}.")
        return aligned(gy.detach())


_ANY = CellKey(0, 0, 0)


def execute(stage: StageLike, x: Tensor, labels: Tensor | None, gy: Tensor | None, cell: CellKey = _ANY) -> CellResult:
    """Re-execute one cell on the weights that `stage` holds; raise `StageError` for inputs it refuses.

    Step and micro-batch of `cell` decide what dropout drops.
    """
    try:
        y, boundaries = stage.forward(cell, x, labels)
        gx, gw = stage.backward(cell, gy)
    finally:
        stage.drop(cell)
    return CellResult(y, gx, gw, boundaries)


def build_stage(manifest: TaskManifest, index: int, recompute: bool = False) -> Stage:
    """Return stage `index` of a complete manifest, its weights still to be loaded."""
    return Stage(family_of(manifest.family), manifest, manifest.stage(index), recompute)


def stage_layout(manifest: TaskManifest, index: int) -> Layout:
    """Return what stage `index` trains in the order of its flat vector."""
    return manifest.trained_layout(manifest.stage(index))
