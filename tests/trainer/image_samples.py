"""A small ResNet, images of noise about a picture of each class, and the loop of one process that swarms must equal."""

from collections.abc import Callable

import msgspec
import numpy as np
import torch
from torch import Tensor
from transformers import ResNetConfig, ResNetForImageClassification

from trainer.checkpoint import whole_tensors
from trainer.data import RunData
from trainer.families import family_of
from trainer.image_classes import ImageClasses
from trainer.image_data import ImageBatches, ImageSet
from trainer.image_settings import ImageSettings
from trainer.manifest import TaskManifest, complete
from trainer.optimizer import learning_rate
from trainer.state import initial_state

torch.set_num_threads(1)

RESNET: dict[str, int | float | bool | str] = {
    "num_channels": 1,
    "embedding_size": 8,
    "hidden_sizes": "8,16",
    "depths": "2,2",
    "layer_type": "basic",
    "num_labels": 5,
}
CLASSES = 5


def resnet_manifest(stages: int = 2, steps: int = 4, **changes: object) -> TaskManifest:
    """Return a task on images of 16 × 16 pixels."""
    draft = TaskManifest(
        "resnet",
        dict(RESNET),
        seed=5,
        stages=stages,
        batch=4,
        microbatches=4,
        sequence=1,
        steps=steps,
        images=ImageSettings(16),
    )
    return complete(msgspec.structs.replace(draft, **changes))


def image_set(manifest: TaskManifest, count: int = 60, seed: int = 1) -> ImageSet:
    """Return images of a manifest's shape."""
    family, draw = family_of(manifest.family), np.random.default_rng(seed)
    shape = family.example(manifest.config, manifest.example_size)
    pictures = np.random.default_rng(0).integers(0, 200, (CLASSES, *shape))
    labels = draw.integers(0, CLASSES, count).astype(np.int32)
    pixels = (pictures[labels] + draw.integers(0, 56, (count, *shape))).astype(np.uint8)
    return ImageSet(pixels, labels, tuple("abcde"), "0" * 64)


def image_batches(manifest: TaskManifest, count: int = 60) -> ImageBatches:
    """Return the micro-batches of a run on such images."""
    images = image_set(manifest, count)
    return ImageBatches(images, np.arange(count), classes_of(manifest), manifest)


def classes_of(manifest: TaskManifest) -> ImageClasses:
    """Return the classes of the sample images."""
    return ImageClasses.usual(tuple("abcde"), manifest.example_size, int(manifest.config["num_channels"]))


def uncut(manifest: TaskManifest) -> ResNetForImageClassification:
    """Return the whole model of `transformers` with the initial weights of the task."""
    config = ResNetConfig(**family_of("resnet").whole_config(manifest.config))
    model = ResNetForImageClassification(config)
    states = [initial_state(manifest, index) for index in range(manifest.stages)]
    model.load_state_dict(whole_tensors(manifest, states))
    return model.train()


def plain_loop(
    manifest: TaskManifest, data: RunData, steps: int, on_step: Callable[[float], None] = lambda loss: None
) -> dict[str, Tensor]:
    """Return the state dict after training as anybody would: gradients accumulated, clipped, torch's own AdamW."""
    model, settings = uncut(manifest), manifest.optimizer
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(settings.beta1, settings.beta2), eps=settings.eps)
    for step in range(1, steps + 1):
        total = 0.0
        for cell in range(manifest.microbatches):
            pixels, labels = data.batch(step, cell)
            loss = model(pixel_values=pixels, labels=labels.long()).loss
            (loss / manifest.microbatches).backward()
            total += float(loss.detach())
        if settings.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step, manifest.total_steps)
        optimizer.step()
        optimizer.zero_grad()
        on_step(total / manifest.microbatches)
    return model.state_dict()
