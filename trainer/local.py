"""The same training in one process: the reference that a swarm of any shape must reproduce."""

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import msgspec
import torch
from torch import Tensor

from trainer.data import Batches
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
    return msgspec.structs.replace(manifest, stages=1, cuts=(manifest.layers,), replicas=1, audit=audit)


def train_locally(
    manifest: TaskManifest,
    data: Batches,
    steps: int,
    on_step: Callable[[LocalStep], None] = lambda step: None,
    state: StageState | None = None,
) -> StageState:
    """Return the whole model's state after `steps` steps, from the start or from `state`."""
    uncut = whole(manifest)
    stage, optimizer = build_stage(uncut, 0), build_optimizer(uncut, 0)
    state = state or initial_state(uncut, 0)
    for step in range(state.step + 1, steps + 1):
        started = perf_counter()
        stage.load(state.weights)
        losses: list[float] = []
        total: Tensor | None = None
        for cell in range(manifest.microbatches):
            key, batch = CellKey(0, step, cell), data.batch(step, cell)
            losses.append(float(stage.forward(key, *batch).y.mean()))
            gradient = stage.backward(key, None).gw
            total = gradient if total is None else total.add_(gradient)
        assert total is not None  # a manifest has at least one micro-batch
        state = optimizer.apply(state, torch.div(total, manifest.microbatches, out=total))
        on_step(LocalStep(step, sum(losses) / len(losses), perf_counter() - started))
    return state
