"""AdamW over flat fp32 vectors made of mul, add, div and sqrt only, so that replicas agree bit for bit.

Fused kernels (addcmul, lerp, torch's own AdamW) may contract to fused multiply-adds and differ between CPU
models; IEEE mul, add, div and sqrt, one at a time, cannot. Scalars are computed by the same four operations.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.errors import StageError, StageReason
from trainer.layout import Layout
from trainer.manifest import OptimizerSettings, TaskManifest
from trainer.stage import stage_layout
from trainer.state import StageState
from trainer.statistics import gain, power

_CHUNK = 1 << 15  # elements; temporaries stay in the core's cache
_PI = 3.141592653589793
_SERIES_TERMS = 16


@dataclass(frozen=True)
class _Scalars:
    """Constants of one step."""

    beta1: float
    beta2: float
    eps: float
    rate: float
    correction1: float
    correction2: float
    decay: float


class _Views(NamedTuple):
    """One chunk of a state's vectors."""

    weights: Tensor
    m: Tensor
    v: Tensor


def _views(state: StageState, part: slice) -> _Views:
    return _Views(state.weights[part], state.m[part], state.v[part])


class AdamW:
    """The optimiser of one stage: `apply` makes the next state and leaves the given one untouched.

    `steps` are those of the whole training, of which `start` were done before the state of step 0. Each has so many
    `cells`, which running statistics follow one after another.
    """

    def __init__(self, settings: OptimizerSettings, layout: Layout, steps: int, start: int = 0, cells: int = 1) -> None:
        self._settings = settings
        self._layout = layout
        self._steps = steps
        self._start = start
        self._cells = cells

    def apply(self, state: StageState, gradient: Tensor, scale: float = 1.0) -> StageState:
        """Return the state after one more step with `scale` times `gradient` (flat fp32, already averaged)."""
        if gradient.dtype != torch.float32 or gradient.shape != state.weights.shape:
            raise StageError(StageReason.BAD_SHAPE, "The gradient does not have the shape of the weights.")
        step = state.step + 1
        after = StageState(step, *(torch.empty_like(state.weights) for _ in range(3)))
        scalars = self._scalars(self._start + step)
        scratch, scaled = (torch.empty(min(_CHUNK, max(gradient.numel(), 1))) for _ in range(2))
        with torch.no_grad():
            for segment in self._layout.segments:
                rule = scalars if segment.is_decayed else replace(scalars, decay=1.0)
                for start in range(segment.start, segment.stop, _CHUNK):
                    part = slice(start, min(start + _CHUNK, segment.stop))
                    given, spare = gradient[part], scratch[: part.stop - start]
                    if segment.kept is not None:
                        self._follow(_views(state, part), _views(after, part), given, segment.kept)
                        continue
                    if scale != 1.0:
                        given = torch.mul(given, scale, out=scaled[: part.stop - start])
                    _update(_views(state, part), _views(after, part), given, spare, rule)
        return after

    def _follow(self, before: _Views, after: _Views, mean: Tensor, kept: float) -> None:
        """Add what the cells have measured to running statistics, which have no moments."""
        torch.mul(before.weights, power(kept, self._cells), out=after.weights)
        after.weights.add_(mean * gain(self._cells))
        after.m.zero_()
        after.v.zero_()

    def _scalars(self, step: int) -> _Scalars:
        settings, rate = self._settings, learning_rate(self._settings, step, self._steps)
        return _Scalars(
            settings.beta1,
            settings.beta2,
            settings.eps,
            rate,
            1.0 - power(settings.beta1, step),
            1.0 - power(settings.beta2, step),
            1.0 - rate * settings.weight_decay,
        )


def build_optimizer(manifest: TaskManifest, index: int) -> AdamW:
    """Return the optimiser of stage `index`."""
    layout = stage_layout(manifest, index)
    return AdamW(manifest.optimizer, layout, manifest.total_steps, manifest.start, manifest.microbatches)


def learning_rate(settings: OptimizerSettings, step: int, steps: int) -> float:
    """Return the learning rate of `step` (from 1) of a run of `steps`."""
    warmup = settings.warmup_steps
    if step <= warmup:
        return settings.learning_rate * step / warmup
    if settings.schedule == "constant":
        return settings.learning_rate
    progress = min((step - warmup) / max(steps - warmup, 1), 1.0)
    share = 0.5 * (1.0 + _cosine(_PI * progress))
    return settings.learning_rate * (settings.min_ratio + (1.0 - settings.min_ratio) * share)


def _update(before: _Views, after: _Views, gradient: Tensor, spare: Tensor, scalars: _Scalars) -> None:
    torch.mul(before.m, scalars.beta1, out=after.m)
    torch.mul(gradient, 1.0 - scalars.beta1, out=spare)
    after.m.add_(spare)
    torch.mul(before.v, scalars.beta2, out=after.v)
    torch.mul(gradient, gradient, out=spare)
    spare.mul_(1.0 - scalars.beta2)
    after.v.add_(spare)
    torch.div(after.v, scalars.correction2, out=spare)
    spare.sqrt_().add_(scalars.eps)
    torch.div(after.m, spare, out=spare)
    spare.mul_(-scalars.rate / scalars.correction1)
    torch.mul(before.weights, scalars.decay, out=after.weights)
    after.weights.add_(spare)


def _cosine(angle: float) -> float:
    """Return cos of an angle in [0, π] by its Taylor series (libm's cos differs between machines)."""
    result = term = 1.0
    for k in range(1, _SERIES_TERMS):
        term *= -angle * angle / ((2 * k - 1) * (2 * k))
        result += term
    return result
