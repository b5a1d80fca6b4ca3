"""Precision profiles: in which arithmetic a cell's matrix products run.

`fp32` is IEEE single precision: results differ between kernels by rounding, and are audited within tight thresholds.
`bf16` computes matrix products in bfloat16 with fp32 sums, and everything else (weights, residuals, norms, losses,
gradients of weights, the optimiser) in fp32, as automatic mixed precision does (Micikevicius et al. 2018; Kalamkar et
al. 2019). Its results are exact inside one kernel class only (`trainer.kernel`).
"""

from contextlib import AbstractContextManager

FP32 = "fp32"
BF16 = "bf16"


def computing_in(precision: str) -> AbstractContextManager[object]:
    """Return the context in which a stage of this precision computes forward."""
    import torch

    return torch.autocast("cpu", torch.bfloat16, enabled=precision == BF16)
