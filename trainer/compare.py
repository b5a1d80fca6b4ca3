"""Full comparison of two results of a cell: per token of y and gx, per sequence of losses, per chunk of gw.

The measure of a row b against a is |a−b|₂ / max(|b|₂, 0.1·rms), rms being over the rows' norms; the default
thresholds are at least four times the worst honest deviation between fp32 configurations (bench/numerics.py).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from trainer.sketch import steady
from trainer.stage import CellResult

FRAUD_FACTOR = 100.0
_CHUNK = 1024
_FLOOR = 0.1


@dataclass(frozen=True)
class Thresholds:
    """Largest honest deviation of each tensor (τ)."""

    y: float = 2.5e-6
    gx: float = 2.7e-5
    gw: float = 3.5e-5


FP32 = Thresholds()


@dataclass(frozen=True)
class Comparison:
    """Largest deviation of each tensor (infinite for NaN or another shape), and what follows from it."""

    y: float
    gx: float
    gw: float
    is_match: bool
    is_fraud: bool


def compare(claimed: CellResult, own: CellResult, thresholds: Thresholds = FP32) -> Comparison:
    """Return how far `claimed` is from `own`: a match within τ, fraud above 100 τ."""
    y = deviation(_by_token(steady(claimed.y)), _by_token(steady(own.y)))
    gx = deviation(_by_token(claimed.gx), _by_token(own.gx))
    gw = deviation(_by_chunk(claimed.gw), _by_chunk(own.gw))
    worst = max(y / thresholds.y, gx / thresholds.gx, gw / thresholds.gw)
    return Comparison(y, gx, gw, worst <= 1.0, worst > FRAUD_FACTOR)


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


def _by_token(tensor: Tensor) -> Tensor:
    """Return (B,T,D) as (B·T, D); losses (B,T) stay, a row a sequence."""
    return tensor.flatten(0, -2) if tensor.dim() > 1 else tensor.unsqueeze(0)


def _by_chunk(vector: Tensor) -> Tensor:
    flat = vector.reshape(-1)
    return functional.pad(flat, (0, -flat.numel() % _CHUNK)).view(-1, _CHUNK)
