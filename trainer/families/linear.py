"""Linear layers without bias on oneDNN's fp32 kernels, about twice as fast as MKL's on AMD CPUs.

torch sends fp32 products to MKL, which takes its slow paths on CPUs that Intel did not make; oneDNN generates
AVX-512 code on all of them. Both are IEEE fp32 and differ in the order of sums only (bench/numerics.py).
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x (rows, in) times weight (out, in) transposed, either of them in any strides."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        # of a frozen weight there is no gradient to compute
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return _product(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        gy = gradients[0]
        gx = _product(gy, weight.t()) if ctx.needs_input_grad[0] else None
        gw = None if x is None else _weight_gradient(gy.flatten(0, -2), x.flatten(0, -2))
        return gx, gw


def _weight_gradient(gy_NO: Tensor, x_NI: Tensor) -> Tensor:
    # the operator copies its first argument if that is transposed: give it the narrower one
    if gy_NO.shape[1] <= x_NI.shape[1]:
        return _product(gy_NO.t(), x_NI.t())
    return _product(x_NI.t(), gy_NO.t()).t()


class FastLinear(nn.Linear):
    """An `nn.Linear` without bias whose three products run on oneDNN."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x (…, in) times the transposed weight: (…, out); in bf16 under `trainer.precision`."""
        if torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        return _Linear.apply(x, self.weight)


@cache
def is_available() -> bool:
    """Whether this build of torch has oneDNN's linear operator and it works on this CPU."""
    if not torch.backends.mkldnn.is_available():
        return False
    x, weight = torch.ones(2, 16, device="cpu"), torch.ones(4, 16, device="cpu")
    try:
        return bool((_product(x, weight) == 16.0).all())
    except (AttributeError, RuntimeError):
        return False


def linear(width: int, out: int) -> nn.Linear:
    """Return a linear layer without bias, the fast one where it works."""
    return (FastLinear if is_available() else nn.Linear)(width, out, bias=False)


def accelerate(module: nn.Module) -> None:
    """Put a `FastLinear` in the place of every bias-free linear layer below `module`."""
    if not is_available():
        return
    for owner in list(module.modules()):
        for name, child in list(owner.named_children()):
            if type(child) is nn.Linear and child.bias is None:
                setattr(owner, name, FastLinear(child.in_features, child.out_features, bias=False))
