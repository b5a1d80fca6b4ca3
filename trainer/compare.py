"""Full comparison of two results of a cell: per token of y and gx, per sequence of losses, per chunk of gw.

The measure of a row b against a is |a−b|₂ / max(|b|₂, 0.1·rms), rms being over the rows' norms. The thresholds are
the network's (`bench/numerics.py` measures what honest configurations of fp32 differ by).

Where nothing of a cell reaches a parameter its gradient is exactly zero, on every machine: rows of an embedding whose
tokens do not occur. AdamW divides by the size of past gradients, so there the smallest gradient moves a weight by the
whole learning rate, and no relative measure sees it. Such stretches of gw are therefore compared with nothing.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from trainer.sketch import steady
from trainer.stage import CellResult

_CHUNK = 1024
_FLOOR = 0.1
_STRETCH = 16
_NOTHING = 1e-10
"""A hundredth of AdamW's epsilon: a gradient of this size moves a weight by a hundredth of the learning rate."""


@dataclass(frozen=True)
class Thresholds:
    """Largest honest deviation of each tensor (τ), and the multiple above which a deviation is fraud."""

    y: float
    gx: float
    gw: float
    fraud_factor: float


@dataclass(frozen=True)
class Comparison:
    """Largest deviation of each tensor (infinite for NaN or another shape), and what follows from it."""

    y: float
    gx: float
    gw: float
    is_match: bool
    is_fraud: bool


def compare(claimed: CellResult, own: CellResult, thresholds: Thresholds) -> Comparison:
    """Return how far `claimed` is from `own`: a match within τ, fraud above the fraud factor times τ."""
    y = deviation(by_token(steady(claimed.y)), by_token(steady(own.y)))
    gx = deviation(by_token(claimed.gx), by_token(own.gx))
    gw = deviation(_by_chunk(claimed.gw), _by_chunk(own.gw))
    if own.y.dim() in (2, 3) and gw > 0 and steers(claimed.gw, own.gw):
        gw = math.inf
    worst = max(y / thresholds.y, gx / thresholds.gx, gw / thresholds.gw)
    return Comparison(y, gx, gw, worst <= 1.0, worst > thresholds.fraud_factor)


def deviation(claimed: Tensor, own: Tensor) -> float:
    """Return the largest deviation over rows of two (rows, width) tensors."""
    if claimed.shape != own.shape or claimed.dtype != own.dtype:
        return math.inf
    if not own.numel() or torch.equal(claimed, own):
        return 0.0
    gap = torch.linalg.vector_norm(claimed - own, dim=1, dtype=torch.float64)
    norm = torch.linalg.vector_norm(own, dim=1, dtype=torch.float64)
    floor = _FLOOR * norm.square().mean().sqrt()
    scaled = torch.where(gap == 0, 0.0, gap / torch.maximum(norm, floor))
    worst = float(scaled.max())
    return math.inf if math.isnan(worst) else worst


def steers(claimed: Tensor, own: Tensor) -> bool:
    """Whether a flat gradient is something where the own one is exactly zero over a whole stretch.

    Only of sequences (`compare`): where an image's convolution ends in ReLU, rounding decides whether a unit is dead.
    """
    if claimed.shape != own.shape:
        return False
    pad = -own.numel() % _STRETCH
    dead = functional.pad(own, (0, pad)).view(-1, _STRETCH).abs().amax(1) == 0
    told = functional.pad(claimed, (0, pad)).view(-1, _STRETCH).abs().amax(1)
    return bool((told[dead] > _NOTHING).any())


def by_token(tensor: Tensor) -> Tensor:
    """Return (B,T,D) as (B·T, D) and (B,C,H,W) as a row an image; losses (B,T) stay, (B) is one row."""
    if tensor.dim() == 4:
        return tensor.flatten(1)
    return tensor.flatten(0, -2) if tensor.dim() > 1 else tensor.unsqueeze(0)


def _by_chunk(vector: Tensor) -> Tensor:
    flat = vector.reshape(-1)
    return functional.pad(flat, (0, -flat.numel() % _CHUNK)).view(-1, _CHUNK)
