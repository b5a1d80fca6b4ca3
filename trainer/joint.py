"""What the stages' optimiser steps have in common: the gradient's norm, its clipping, and the tied tensor.

Squares are added in fp64 by mul and add alone, in an order that only the layout fixes, so that all replicas
of a stage find the same bits.
"""

from collections.abc import Sequence
from math import isfinite, sqrt

import torch
from torch import Tensor

from trainer.errors import StageError, StageReason
from trainer.manifest import TaskManifest
from trainer.stage import stage_layout
from trainer.state import StageState

_CHUNK = 1 << 15  # elements
_SMALL = 1e-6  # what torch.nn.utils.clip_grad_norm_ adds to the norm
_NOWHERE = slice(0, 0)


def tied_part(manifest: TaskManifest, index: int) -> slice:
    """Return where the tied tensor lies in the flat vector of stage `index`, empty if it is not there."""
    layout = stage_layout(manifest, index)
    for tensor, (start, stop) in zip(layout.tensors, layout.ranges, strict=True):
        if tensor.name == manifest.tied:
            return slice(start, stop)
    return _NOWHERE


def other_end(manifest: TaskManifest, index: int) -> int | None:
    """Return the other stage that holds the tied tensor, None if `index` holds none."""
    last = manifest.stages - 1
    return last - index if manifest.tied and index in (0, last) else None


def squared_norm(gradient: Tensor, skipped: slice = _NOWHERE) -> float:
    """Return the sum of the squares of a flat fp32 vector without those in `skipped`."""
    sums = torch.zeros(_CHUNK, dtype=torch.float64)
    for part in (gradient[: skipped.start], gradient[skipped.stop :]):
        for chunk in part.split(_CHUNK):
            wide = chunk.double()
            sums[: len(chunk)].add_(wide.mul_(wide))
    while len(sums) > 1:
        first, second = sums.chunk(2)
        sums = first + second
    return float(sums)


def clip_scale(clip: float, squares: Sequence[float]) -> float:
    """Return what the gradient whose stages have these squared norms is multiplied by; 1 without clipping."""
    total = 0.0
    for square in squares:
        total += square
    return min(clip / (sqrt(total) + _SMALL), 1.0) if clip else 1.0


def is_finite(tensor: Tensor) -> bool:
    """Whether no element of a floating-point tensor is infinite or not a number."""
    # one cheap pass tells in all but the rare case of a sum that overflows
    return isfinite(float(tensor.sum())) or bool(torch.isfinite(tensor).all())


def check_tied(manifest: TaskManifest, states: Sequence[StageState]) -> None:
    """Raise `StageError` unless both ends hold the same bits of the tied tensor and of its moments."""
    if not manifest.tied:
        return
    ends = [(states[index], tied_part(manifest, index)) for index in (0, manifest.stages - 1)]
    first, last = ([vector[part] for vector in (state.weights, state.m, state.v)] for state, part in ends)
    if not all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(first, last, strict=True)):
        raise StageError(StageReason.WRONG_STATE, f"The end stages hold different copies of {manifest.tied}.")
