"""The same training in one process: the reference that a swarm of any shape must reproduce."""

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from time import perf_counter

import msgspec
import torch
from torch import Tensor

from trainer.base_weights import StageBase
from trainer.data import HeldBack, RunData
from trainer.errors import StageError, StageReason
from trainer.joint import clip_scale, is_finite, squared_norm
from trainer.manifest import TaskManifest
from trainer.optimizer import build_optimizer
from trainer.stage import CellKey, build_stage
from trainer.state import StageState, initial_state


@dataclass(frozen=True)
class LocalStep:
    """One step of the reference: mean loss over its micro-batches, and seconds."""

    step: int
    loss: float
    seconds: float


def whole(manifest: TaskManifest) -> TaskManifest:
    """Return the manifest of the same run with the model uncut on one worker."""
    audit = msgspec.structs.replace(manifest.audit, redundancy=1)
    one = {"stages": 1, "cuts": (manifest.layers,), "replicas": 1, "private": False}
    return msgspec.structs.replace(manifest, **one, audit=audit)


class LocalTrainer:
    """The whole model of a manifest in this process, `state` being that after the last step."""

    def __init__(
        self,
        manifest: TaskManifest,
        data: RunData,
        state: StageState | None = None,
        base: StageBase | None = None,
    ) -> None:
        self.manifest = whole(manifest)
        self.state = state or initial_state(self.manifest, 0)
        self.data = data
        self._stage = build_stage(self.manifest, 0)
        if base is not None:
            self._stage.load_base(base)
        self._optimizer = build_optimizer(self.manifest, 0)

    def advance(self) -> LocalStep:
        """Do one step; raise `StageError`, the state as it was, where loss or gradient are not finite."""
        started, step, cells = perf_counter(), self.state.step + 1, self.manifest.microbatches
        self._stage.load(self.state.weights)
        losses: list[float] = []
        total: Tensor | None = None
        for cell in range(cells):
            key, batch = CellKey(0, step, cell), self.data.batch(step, cell)
            losses.append(float(self._stage.forward(key, *batch).y.mean()))
            gradient = self._stage.backward(key, None).gw
            total = gradient if total is None else total.add_(gradient)
        assert total is not None  # a manifest has at least one micro-batch
        self._apply(torch.div(total, cells, out=total), sum(losses))
        return LocalStep(step, sum(losses) / len(losses), perf_counter() - started)

    def _apply(self, gradient: Tensor, loss: float) -> None:
        if not (isfinite(loss) and is_finite(gradient)):
            raise StageError(
                StageReason.NOT_FINITE,
                f"The loss or the gradient of step {self.state.step + 1} is not finite.",
                "Go on from the last saved state with a lower learning rate.",
            )
        scale = clip_scale(self.manifest.optimizer.clip, [squared_norm(gradient[: self._stage.layout.trained])])
        self.state = self._optimizer.apply(self.state, gradient, scale)

    def evaluate(self, validation: HeldBack) -> float:
        """Return the mean loss of the present state on what is never trained on."""
        self._stage.load(self.state.weights)
        batches = (validation.batch(index) for index in range(validation.count))
        return sum(float(self._stage.evaluate(*batch).mean()) for batch in batches) / validation.count


def train_locally(
    manifest: TaskManifest,
    data: RunData,
    steps: int,
    on_step: Callable[[LocalStep], None] = lambda step: None,
    state: StageState | None = None,
    base: StageBase | None = None,
) -> StageState:
    """Return the whole model's state after `steps` steps, from the start or from `state`.

    A manifest with adapters needs the uncut model's frozen weights in `base`.
    """
    trainer = LocalTrainer(manifest, data, state, base)
    while trainer.state.step < steps:
        on_step(trainer.advance())
    return trainer.state
