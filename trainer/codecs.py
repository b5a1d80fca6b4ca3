"""Lossy encodings of fp32 tensors for the wire, elementwise and therefore bit-equal on every machine.

`bf16` rounds to the nearest even. `int8` scales each block of 256 values, in row-major order, by its largest
magnitude over 127 and rounds to the nearest even: an error of at most half a scale, 1/254 of that magnitude (plus
rounding). Infinities and NaN make their block NaN, so that they show in the loss as they would uncompressed.
"""

import torch
from torch import Tensor

from trainer.payloads import INT8_BLOCK as BLOCK

_LEVELS = 127.0


def encode_bf16(tensor: Tensor) -> Tensor:
    """Return the values as bfloat16, flat."""
    return tensor.detach().reshape(-1).to(torch.bfloat16)


def decode_bf16(data: Tensor) -> Tensor:
    """Return the flat fp32 values of encoded bytes (uint8)."""
    return data.view(torch.bfloat16).to(torch.float32)


def encode_int8(tensor: Tensor) -> Tensor:
    """Return bytes (uint8): one fp32 scale per block, then one signed byte per value."""
    flat = tensor.detach().reshape(-1)
    count, blocks = flat.numel(), -(-flat.numel() // BLOCK)
    values = torch.nn.functional.pad(flat, (0, blocks * BLOCK - count)).view(blocks, BLOCK)
    largest = values.abs().amax(dim=1)
    scales = torch.where(torch.isfinite(largest), largest, torch.nan).div_(_LEVELS)
    # a block of zeros, or of nothing but values too small for a scale, is zeros
    divisors = torch.where(scales > 0, scales, torch.inf)
    steps = values.div(divisors.unsqueeze(1)).round_().to(torch.int8)
    return torch.cat((scales.view(torch.uint8), steps.view(-1)[:count].view(torch.uint8)))


def decode_int8(data: Tensor, count: int) -> Tensor:
    """Return the flat fp32 values, `count` of them, of encoded bytes (uint8)."""
    blocks = -(-count // BLOCK)
    scales = data[: 4 * blocks].view(torch.float32)
    steps = torch.nn.functional.pad(data[4 * blocks :].view(torch.int8), (0, blocks * BLOCK - count))
    return steps.view(blocks, BLOCK).to(torch.float32).mul_(scales.unsqueeze(1)).view(-1)[:count]
