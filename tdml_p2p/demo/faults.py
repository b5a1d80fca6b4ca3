"""Misbehaving stages for the demonstration and the attack tests: wrappers around an honest stage.

Nothing here is imported by the production path; a faulty peer is started with one of these as its
stage factory (`tdml_p2p.demo.cheat`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from trainer import worker_compute
from trainer.base_weights import StageBase
from trainer.manifest import TaskManifest
from trainer.reduction import Reduction
from trainer.stage import Backward, CellKey, Forward, Stage, StageLike, build_stage
from trainer.state import StageState
from trainer.step_rule import StepRule


class Faulty:
    """An honest stage whose results are altered from optimiser step `start` on; base of the attacks."""

    def __init__(self, stage: Stage, start: int) -> None:
        self.stage = stage
        self.start = start
        self.spec = stage.spec

    def is_active(self, cell: CellKey) -> bool:
        """Whether the attack has begun at this cell's step."""
        return cell.step >= self.start

    def load_base(self, base: StageBase) -> None:
        """Take the frozen weights."""
        self.stage.load_base(base)

    def load(self, weights: Tensor) -> None:
        """Load honest weights."""
        self.stage.load(weights)

    def alter(self, result: Tensor) -> Tensor:
        """Return what the cheat sends instead of `result`; the honest result here."""
        return result

    def forward(self, cell: CellKey, x: Tensor, labels: Tensor | None) -> Forward:
        """Run the honest forward pass and alter its output."""
        honest = self.stage.forward(cell, x, labels)
        if not self.is_active(cell):
            return honest
        return Forward(self.alter(honest.y), honest.boundaries)

    def backward(self, cell: CellKey, gy: Tensor | None) -> Backward:
        """Run the honest backward pass and alter the input gradient."""
        honest = self.stage.backward(cell, gy)
        if not self.is_active(cell):
            return honest
        return Backward(self.alter(honest.gx), honest.gw)

    def drop(self, cell: CellKey) -> None:
        """Forget an unfinished cell."""
        self.stage.drop(cell)

    def evaluate(self, x: Tensor, labels: Tensor | None) -> Tensor:
        """Run the honest model: what is measured is not paid."""
        return self.stage.evaluate(x, labels)


class SignFlip(Faulty):
    """Sends the negated output and input gradient."""

    def alter(self, result: Tensor) -> Tensor:
        """Return −`result`."""
        return -result


class Noise(Faulty):
    """Adds 1 % relative Gaussian noise."""

    def alter(self, result: Tensor) -> Tensor:
        """Return `result` with noise of 1 % of its root mean square."""
        if result.numel() == 0:
            return result
        return result + torch.randn_like(result) * (0.01 * result.square().mean().sqrt())


class Scale(Faulty):
    """Scales its results by 1.01."""

    def alter(self, result: Tensor) -> Tensor:
        """Return 1.01 × `result`."""
        return result * 1.01


class SkipLayer(Faulty):
    """Saves time by leaving out its last decoder layer."""

    def forward(self, cell: CellKey, x: Tensor, labels: Tensor | None) -> Forward:
        """Run the forward pass, without the last layer once the attack has begun."""
        if not self.is_active(cell):
            return self.stage.forward(cell, x, labels)
        with _skipping(self.stage.module.get_submodule("layers")):
            return self.stage.forward(cell, x, labels)


class Stale(Faulty):
    """Computes with the weights of the step before."""

    def __init__(self, stage: Stage, start: int) -> None:
        super().__init__(stage, start)
        self._older: Tensor | None = None
        self._newest: Tensor | None = None
        self._stale = False

    def load(self, weights: Tensor) -> None:
        """Load the weights given the time before once the attack has begun."""
        self._older, self._newest = self._newest, weights.clone()
        super().load(self._older if self._stale and self._older is not None else weights)

    def forward(self, cell: CellKey, x: Tensor, labels: Tensor | None) -> Forward:
        """Run the forward pass with stale weights once the attack has begun."""
        if self.is_active(cell) and not self._stale:
            self._stale = True
            if self._older is not None:
                super().load(self._older)
        return self.stage.forward(cell, x, labels)


@contextmanager
def _skipping(layers: nn.Module) -> Iterator[None]:
    """Make the last of a stage's decoder layers the identity within the block."""
    name, skipped = list(layers.named_children())[-1]
    setattr(layers, name, _Identity(skipped))
    try:
        yield
    finally:
        setattr(layers, name, skipped)


class _Identity(nn.Module):
    """A decoder layer that returns its input; its parameters get gradients of zero."""

    def __init__(self, skipped: nn.Module) -> None:
        super().__init__()
        self._skipped = [skipped]

    def forward(self, hidden_BTD: Tensor, *_: object, **__: object) -> Tensor:
        """Return `hidden_BTD` unchanged."""
        return hidden_BTD + sum(weight.sum() * 0.0 for weight in self._skipped[0].parameters())


ATTACKS: dict[str, type[Faulty]] = {
    "sign-flip": SignFlip,
    "noise": Noise,
    "scale": Scale,
    "skip-layer": SkipLayer,
    "stale": Stale,
}


def _alter_steps(start: int) -> None:
    """Have this process' workers add a thousandth to their weights in every optimiser's step from `start` on."""

    class FalseRule(StepRule):
        def apply(self, state: StageState, gradient: Tensor, squares: Sequence[float]) -> StageState:
            after = super().apply(state, gradient, squares)
            if after.step < start:
                return after
            return StageState(after.step, after.weights * 1.001, after.m, after.v)

    worker_compute.StepRule = FalseRule  # type: ignore[attr-defined]


def _alter_sums(start: int) -> None:
    """Have this process' workers contribute twice their gradients to every sum from step `start` on."""
    honest = Reduction.own_sum

    def doubled(self: Reduction, gradients: Mapping[int, Tensor]) -> Tensor:
        total = honest(self, gradients)
        return total if self.request.step < start else total.mul_(2.0)

    Reduction.own_sum = doubled  # type: ignore[method-assign]


STEP_ATTACKS: dict[str, Callable[[int], None]] = {"false-step": _alter_steps, "false-sum": _alter_sums}
"""Attacks that leave a worker's cells right: they change the whole process, so they need one of their own."""


def faulty_factory(attack: str, start: int) -> Callable[[TaskManifest, int], StageLike]:
    """Return a stage factory whose stages run `attack` from step `start` on."""
    if attack in STEP_ATTACKS:
        STEP_ATTACKS[attack](start)
        return build_stage
    wrapper = ATTACKS[attack]
    return lambda manifest, index: wrapper(build_stage(manifest, index), start)
