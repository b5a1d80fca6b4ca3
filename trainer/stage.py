"""One stage of the model: forward and backward of cells on a flat fp32 weight vector.

Shapes: B sequences, T tokens, D hidden width. Several cells may be in flight (1F1B), each with its own graph.
A cell's results are bit-equal in every process of one kernel class (`trainer.kernel`) with one torch thread.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from trainer.content import address_of
from trainer.errors import StageError, StageReason
from trainer.families import Family, family_of
from trainer.layout import Layout, StageSpec
from trainer.manifest import TaskManifest
from trainer.tensors import aligned, buffer_of, empty

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
    """Gradient of a cell's input (B,T,D), empty at the first stage, and of the weights, flat fp32."""

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


@dataclass(frozen=True)
class _Graph:
    x: Tensor
    y: Tensor


class Stage:
    """A stage whose parameters are views into one flat fp32 vector."""

    def __init__(self, family: Family, manifest: TaskManifest, spec: StageSpec) -> None:
        self.spec = spec
        self.layout: Layout = family.layout(manifest.config, spec)
        self._flat = torch.empty(self.layout.total, dtype=torch.float32)
        self.module = family.build(manifest.config, spec, self._flat)
        self._parameters = self.module.ordered()
        self._vocabulary = family.vocabulary(manifest.config)
        self._width = family.hidden(manifest.config)
        self._context = family.context(manifest.config)
        self._is_loaded = False
        self._graphs: dict[CellKey, _Graph] = {}

    def load(self, weights: Tensor) -> None:
        """Copy a flat fp32 vector into the parameters; cells in flight are dropped."""
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

        `x` is int32 tokens (B,T) at the first stage, else fp32 hidden (B,T,D); `labels` int32 (B,T) go to the
        last stage only.
        """
        if not self._is_loaded:
            raise StageError(StageReason.WRONG_STATE, "The stage has no weights yet.")
        if cell in self._graphs:
            raise StageError(StageReason.REPEATED_CELL, f"Cell {cell} is already in flight.")
        self._check(x, labels)
        x = aligned(x.detach())
        if not self.spec.is_first:
            x.requires_grad_()
        layers: list[Tensor] = []
        with torch.enable_grad():
            y = self.module(x, None if labels is None else labels.long(), layers)
        self._graphs[cell] = _Graph(x, y)
        return Forward(y.detach(), tuple(address_of(buffer_of(layer)) for layer in layers))

    def backward(self, cell: CellKey, gy: Tensor | None) -> Backward:
        """Compute a cell's gradients and free its graph; raise `StageError`.

        `gy` is fp32 (B,T,D), or nothing (None or empty) at the last stage, whose loss is the mean of y.
        """
        graph = self._graphs.get(cell)
        if graph is None:
            raise StageError(StageReason.UNKNOWN_CELL, f"Cell {cell} is not in flight.")
        seed = self._seed(graph.y, gy)
        del self._graphs[cell]
        inputs = self._parameters if self.spec.is_first else [graph.x, *self._parameters]
        gradients = list(torch.autograd.grad(graph.y, inputs, seed))
        gx = empty() if self.spec.is_first else gradients.pop(0).contiguous()
        gw = torch.empty(self.layout.total, dtype=torch.float32)
        for gradient, (start, stop) in zip(gradients, self.layout.ranges, strict=True):
            gw[start:stop].view(gradient.shape).copy_(gradient)
        return Backward(gx, gw)

    def drop(self, cell: CellKey) -> None:
        """Forget a cell in flight, if it is there."""
        self._graphs.pop(cell, None)

    def logits(self, x: Tensor) -> Tensor:
        """Return hidden (B,T,D), or logits (B,T,V) at the last stage, without keeping a graph."""
        with torch.no_grad():
            return self.module(aligned(x), None, [])

    def _seed(self, y: Tensor, gy: Tensor | None) -> Tensor:
        if self.spec.is_last:
            if gy is not None and gy.numel():
                raise StageError(StageReason.BAD_SHAPE, "The last stage takes no gradient of its output.")
            return torch.full_like(y, 1.0 / y.numel())
        if gy is None or gy.shape != y.shape or gy.dtype != torch.float32:
            raise StageError(StageReason.BAD_SHAPE, f"The gradient of the output must be fp32 {tuple(y.shape)}.")
        return aligned(gy.detach())

    def _check(self, x: Tensor, labels: Tensor | None) -> None:
        if self.spec.is_first:
            self._check_tokens("tokens", x)
        elif x.dtype != torch.float32 or x.dim() != 3 or x.shape[2] != self._width:
            raise StageError(StageReason.BAD_SHAPE, f"The input must be fp32 (B, T, {self._width}).")
        if not 0 < x.shape[1] <= self._context or not x.shape[0]:
            raise StageError(StageReason.BAD_SHAPE, f"Sequences must have 1 to {self._context} tokens.")
        if self.spec.is_last != (labels is not None):
            raise StageError(StageReason.BAD_SHAPE, "Labels belong to the last stage, and it needs them.")
        if labels is not None:
            self._check_tokens("labels", labels)
            if labels.shape != x.shape[:2]:
                raise StageError(StageReason.BAD_SHAPE, "The labels do not have the shape of the input.")

    def _check_tokens(self, name: str, tokens: Tensor) -> None:
        if tokens.dtype not in (torch.int32, torch.int64):
            raise StageError(StageReason.BAD_TYPE, f"The {name} must be 32- or 64-bit integers.")
        if tokens.dim() != 2 or not tokens.numel():
            raise StageError(StageReason.BAD_SHAPE, f"The {name} must have the shape (B, T).")
        low, high = (int(value) for value in tokens.aminmax())
        if low < 0 or high >= self._vocabulary:
            raise StageError(StageReason.BAD_TOKEN, f"The {name} must be from 0 to {self._vocabulary - 1}.")


_AUDITED = CellKey(-1, -1, -1)


def execute(stage: StageLike, x: Tensor, labels: Tensor | None, gy: Tensor | None) -> CellResult:
    """Re-execute one cell on the weights that `stage` holds; raise `StageError` for inputs it refuses."""
    try:
        y, boundaries = stage.forward(_AUDITED, x, labels)
        gx, gw = stage.backward(_AUDITED, gy)
    finally:
        stage.drop(_AUDITED)
    return CellResult(y, gx, gw, boundaries)


def build_stage(manifest: TaskManifest, index: int) -> Stage:
    """Return stage `index` of a complete manifest, its weights still to be loaded."""
    return Stage(family_of(manifest.family), manifest, manifest.stage(index))


def stage_layout(manifest: TaskManifest, index: int) -> Layout:
    """Return the parameters of stage `index` in the order of its flat vector."""
    return family_of(manifest.family).layout(manifest.config, manifest.stage(index))
