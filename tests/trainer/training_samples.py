"""A small model and inputs that the trainer's tests share."""

import msgspec
import torch
from torch import Tensor

from trainer.data import Batches
from trainer.manifest import TaskManifest, complete
from trainer.stage import CellKey, CellResult, Stage, build_stage
from trainer.state import initial_state

torch.set_num_threads(1)

CONFIG: dict[str, int | float | bool | str] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
KEY = CellKey(0, 1, 0)


def small_manifest(stages: int = 1, **changes: object) -> TaskManifest:
    draft = TaskManifest("llama", dict(CONFIG), seed=7, stages=stages, batch=2, microbatches=2, sequence=16)
    return complete(msgspec.structs.replace(draft, **changes))


def small_batches(manifest: TaskManifest) -> Batches:
    generator = torch.Generator().manual_seed(3)
    return Batches(torch.randint(320, (2000,), generator=generator, dtype=torch.int32).numpy(), manifest)


def loaded_stages(manifest: TaskManifest) -> list[Stage]:
    stages = [build_stage(manifest, index) for index in range(manifest.stages)]
    for index, stage in enumerate(stages):
        stage.load(initial_state(manifest, index).weights)
    return stages


def run_cell(stages: list[Stage], tokens: Tensor, labels: Tensor, key: CellKey = KEY) -> list[CellResult]:
    """Return every stage's result of one micro-batch."""
    x, outputs = tokens, []
    for stage in stages:
        outputs.append(stage.forward(key, x, labels if stage.spec.is_last else None))
        x = outputs[-1].y
    results: list[CellResult] = []
    gy: Tensor | None = None
    for stage, output in zip(reversed(stages), reversed(outputs), strict=True):
        gy, gw = stage.backward(key, gy)
        results.insert(0, CellResult(output.y, gy, gw, output.boundaries))
    return results
