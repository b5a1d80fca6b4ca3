"""Full comparison of two results of a cell: per token of y and gx, per sequence of losses, per chunk of gw.

The measure of a row b against a is |a−b|₂ / max(|b|₂, 0.1·rms), rms being over the rows' norms. The thresholds are
the network's (`bench/numerics.py` measures what honest configurations of fp32 differ by).

Where nothing of a cell reaches a parameter its gradient is exactly zero, on every machine: rows of an embedding whose
tokens do not occur. AdamW divides by the size of past gradients, so there the smallest gradient moves a weight by the
whole learning rate, and no relative measure sees it. Such stretches of gw are therefore compared with nothing.

What a judge's own results of the cell differ by when their last bits are shaken (`trainer.spread`) widens both limits:
nobody is held to what the judge cannot hold itself.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

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


SPREAD_FACTOR = 10
"""How many times what its own results differ by a judge allows others' to differ from them."""


class Spread(NamedTuple):
    """What one machine's own results of a cell differ by, and whether they are zero in the same stretches."""

    y: float = 0.0
    gx: float = 0.0
    gw: float = 0.0
    has_steady_zeros: bool = True


STEADY = Spread()


@dataclass(frozen=True)
class Thresholds:
    """Largest honest deviation of each tensor (τ), and the multiple above which a deviation is fraud."""

    y: float
    gx: float
    gw: float
    fraud_factor: float
    spread: Spread = STEADY

    def limits(self, factor: float) -> tuple[float, float, float]:
        """Return so many τ of each tensor, or what the judge's own spread allows, if that is more."""
        y, gx, gw, _ = self.spread
        pairs = ((self.y, y), (self.gx, gx), (self.gw, gw))
        a, b, c = (max(factor * tau, SPREAD_FACTOR * own) for tau, own in pairs)
        return a, b, c


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
    gw = deviation(chunked(claimed.gw), chunked(own.gw))
    if is_sequence(own) and thresholds.spread.has_steady_zeros and gw > 0 and steers(claimed.gw, own.gw):
        gw = math.inf
    found = (y, gx, gw)
    is_match = all(value <= limit for value, limit in zip(found, thresholds.limits(1), strict=True))
    gross = thresholds.limits(thresholds.fraud_factor)
    return Comparison(*found, is_match, any(value > limit for value, limit in zip(found, gross, strict=True)))


def is_sequence(result: CellResult) -> bool:
    """Whether a cell is of sequences, and not of images."""
    return result.y.dim() in (2, 3)


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


def chunked(vector: Tensor) -> Tensor:
    """Return a flat gradient in rows of 1024."""
    flat = vector.reshape(-1)
    return functional.pad(flat, (0, -flat.numel() % _CHUNK)).view(-1, _CHUNK)
