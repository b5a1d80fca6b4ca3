"""A small model trained on the same tokens with each encoding between its two stages and two replicas."""

import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from tdml_p2p.config import TrainConfig
from tdml_p2p.swarm.preparation import Prepared, prepare
from trainer.data import standard_library
from trainer.optimizer import build_optimizer
from trainer.payloads import WIRE, Dtype, pack, unpack
from trainer.reduction import ordered_sum
from trainer.stage import CellKey, build_stage
from trainer.state import initial_state

_LAST = 10


def equal_tokens(steps: int) -> dict[str, Any]:
    """Return, by compression, the mean loss of the last steps, its change, and bytes between stages for a token."""
    train = TrainConfig("llama-tiny", (standard_library(),), steps=steps, batch=4, microbatches=4, sequence=64)
    with tempfile.TemporaryDirectory() as folder:  # for the tokens
        prepared = prepare(replace(train, out=Path(folder)))
        losses = {name: _train(prepared, wire) for name, wire in WIRE.items()}
    exact = statistics.mean(losses["none"][-_LAST:])
    width = prepared.manifest.hidden
    found = {}
    for name, values in losses.items():
        last = statistics.mean(values[-_LAST:])
        # an activation and a gradient of one position
        size = 2 * pack(torch.zeros(64, width), WIRE[name])[0].nbytes / 64
        found[name] = {"loss": last, "worse_by": last - exact, "bytes_per_token": size}
    return found


def _train(prepared: Prepared, wire: Dtype) -> list[float]:
    """Return the loss of each step; two replicas a stage share the cells and the reduction."""
    manifest = msgspec.structs.replace(prepared.manifest, replicas=2)
    stages = [build_stage(manifest, index) for index in range(2)]
    optimizers = [build_optimizer(manifest, index) for index in range(2)]
    states = [initial_state(manifest, index) for index in range(2)]
    losses = []
    for step in range(1, manifest.steps + 1):
        for stage, state in zip(stages, states, strict=True):
            stage.load(state.weights)
        sums: list[list[Tensor]] = [[], []]
        of_step = []
        for cell in range(manifest.microbatches):
            key, batch = CellKey(0, step, cell), prepared.batches.batch(step, cell)
            hidden = stages[0].forward(key, batch.tokens, None).y
            of_step.append(float(stages[1].forward(key, _sent(hidden, wire), batch.labels).y.mean()))
            last = stages[1].backward(key, None)
            sums[1].append(last.gw)
            sums[0].append(stages[0].backward(key, _sent(last.gx, wire)).gw)
        for index, parts in enumerate(sums):
            shares = [_sent(ordered_sum(parts[replica::2]), wire) for replica in range(2)]
            mean = ordered_sum(shares).div_(manifest.microbatches)
            states[index] = optimizers[index].apply(states[index], mean)
        losses.append(statistics.mean(of_step))
    return losses


def _sent(tensor: Tensor, wire: Dtype) -> Tensor:
    return tensor if wire is Dtype.FP32 else unpack(pack(tensor, wire))
