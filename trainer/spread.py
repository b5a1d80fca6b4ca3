"""How far a machine's own results of a cell are from each other where the last bits of what it reads differ.

Machines with other kernels round otherwise, which in ordinary training changes little. A model that one wild step has
wrecked makes of rounding something large, and no fixed threshold holds there. Whoever finds a difference therefore
executes the cell again on weights and inputs whose last bits are changed at random: what that changes is what rounding
does to this very cell, seen on one machine and with its own kernels. Nothing of the process is switched over for it:
cells beside it stay as they are, bit for bit.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from trainer.compare import Spread, by_token, chunked, deviation, is_sequence, steers
from trainer.sketch import steady
from trainer.stage import CellResult


def shaken(tensor: Tensor, seed: int) -> Tensor:
    """Return a tensor of which every number is the next one above or below; integers and zeros stay."""
    if not tensor.is_floating_point():
        return tensor
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, tensor.shape, generator=generator, dtype=torch.int8)
    away = torch.where(signs == 0, -math.inf, math.inf).to(tensor.dtype)
    return torch.where(tensor == 0, tensor, torch.nextafter(tensor, away))


def shaken_cell(weights: Tensor, x: Tensor, gy: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return what a cell reads, all of it shaken."""
    return shaken(weights, seed), shaken(x, seed + 1), shaken(gy, seed + 2)


def spread_of(own: CellResult, others: Iterable[CellResult]) -> Spread:
    """Return the largest deviations between one's own results; what is not finite counts for nothing."""
    y = gx = gw = 0.0
    is_steady = True
    for other in others:
        y = max(y, _finite(deviation(by_token(steady(other.y)), by_token(steady(own.y)))))
        gx = max(gx, _finite(deviation(by_token(other.gx), by_token(own.gx))))
        gw = max(gw, _finite(deviation(chunked(other.gw), chunked(own.gw))))
        if is_sequence(own):
            is_steady = is_steady and not steers(other.gw, own.gw) and not steers(own.gw, other.gw)
    return Spread(y, gx, gw, is_steady)


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0
