"""Keyed sketches: 32 random-sign projections of a tensor, by which two results are compared in 128 bytes.

The flat vector, padded with zeros, is a stack of blocks V of shape (rows, 512). Projection k of a block is
Σ_ij a_i b_jk v_ij with signs a, b drawn from a BLAKE3 stream under the key (b anew for each block), so each
projection is a sum of ±v whose square estimates |v|² without bias (Alon, Matias and Szegedy 1996), and nobody
can prepare for it without the key. Sums of y, whose threshold is the narrowest, are in float64: processes with
other kernels agree to the last bits. Those of gx and gw, the largest by far, are in float32 along a row and in
float64 over the rows: off by some 2e-7 of the norm, a hundredth of their thresholds, in half the time.
"""

import math

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

PROJECTIONS = 32
SKETCH_BYTES = 4 * PROJECTIONS
CELL_SKETCH_BYTES = 3 * SKETCH_BYTES
_COLUMNS = 512
_ROWS = 512  # of a block: 1 MiB of fp32, 2 MiB of float64, in the core's own cache
_BLOCK = _ROWS * _COLUMNS


def sketch(tensor: Tensor, key: bytes, sums: torch.dtype = torch.float64) -> bytes:
    """Return the 32 projections of an fp32 tensor under a 32-byte key: float32, little-endian, 128 bytes.

    `sums` is what a row is added up in. Raises `ValueError` for a key of another length.
    """
    if len(key) != 32:
        raise ValueError("a sketch key has 32 bytes")
    values = tensor.detach().reshape(-1)
    total = torch.zeros(PROJECTIONS, dtype=torch.float64)
    for number in range(math.ceil(values.numel() / _BLOCK)):
        block = values[number * _BLOCK : (number + 1) * _BLOCK]
        part = _block(block, key, number, sums)
        if sums is not torch.float64 and not part.isfinite().all():  # what overflows depends on the order of a sum
            part = _block(block, key, number, torch.float64)
        total += part
    total[total.isnan()] = math.nan  # one bit pattern for every NaN
    narrow: bytes = total.to(torch.float32).numpy().astype("<f4").tobytes()
    return narrow


def cell_sketch(y: Tensor, gx: Tensor, gw: Tensor, key: bytes) -> bytes:
    """Return the sketches of a cell's output, input gradient and weight gradient: 384 bytes."""
    exact, rough = torch.float64, torch.float32
    labelled = (("y", steady(y), exact), ("gx", gx, rough), ("gw", gw, rough))
    return b"".join(sketch(tensor, _tensor_key(key, name), sums) for name, tensor, sums in labelled)


def steady(y: Tensor) -> Tensor:
    """Return a cell's output as it is compared: hidden (B,T,D) itself, losses (B,T) or (B) plus one.

    The rounding of a loss follows the size of the logits that cancel in it, not its own: near zero it would
    look like a deviation.
    """
    return y + 1.0 if y.dim() <= 2 else y


def _tensor_key(key: bytes, name: str) -> bytes:
    return blake3(name.encode(), key=key).digest()


def _block(values: Tensor, key: bytes, number: int, sums: torch.dtype) -> Tensor:
    """Return the projections (32,) of a block's values, in float64."""
    rows = math.ceil(values.numel() / _COLUMNS)
    wide = values.to(sums)
    if values.numel() != rows * _COLUMNS:
        wide = torch.zeros(rows * _COLUMNS, dtype=sums)
        wide[: values.numel()] = values
    signs = _signs(key, number, (_COLUMNS + rows) * PROJECTIONS).to(sums).view(-1, PROJECTIONS)
    projected = wide.view(rows, _COLUMNS) @ signs[:_COLUMNS]
    return projected.mul_(signs[_COLUMNS:]).sum(0, dtype=torch.float64)


def _signs(key: bytes, number: int, count: int) -> Tensor:
    stream = blake3(number.to_bytes(8, "big"), key=key).digest(count // 8)
    bits = np.unpackbits(np.frombuffer(stream, np.uint8))
    return torch.from_numpy(bits).to(torch.float32).mul_(2.0).sub_(1.0)
