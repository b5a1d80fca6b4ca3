"""A run on images before its first step, and one that goes on: the images, their classes, and the manifest."""

from dataclasses import dataclass
from pathlib import Path

import msgspec

from trainer.adapters import LoraWish
from trainer.checkpoint import Checkpoint, starting_from
from trainer.data import HeldBack, RunData
from trainer.errors import DataError, DataReason, ManifestError, ManifestReason
from trainer.families import family_of
from trainer.image_classes import ImageClasses, open_classes
from trainer.image_data import ImageBatches, ImageSet, divided, shuffled, validation_on
from trainer.image_settings import ImageSettings
from trainer.images import Form, read_images, usual_channels
from trainer.manifest import TaskManifest, complete
from trainer.pretrained import Pretrained, starting_states
from trainer.state import StageState


@dataclass(frozen=True)
class ImageSource:
    """Paths to train on, what to validate on (a share of them, or `other` paths), and where to decode them.

    `size` is the pixels of a side, 0 for what is usual with the model.
    """

    paths: tuple[Path, ...]
    out: Path
    share: float = 0.0
    other: Path | None = None
    size: int = 0


@dataclass(frozen=True)
class ImageRun:
    """A run on images: its states are given where it does not start from the seed."""

    manifest: TaskManifest
    batches: RunData
    classes: ImageClasses
    validation: HeldBack | None
    states: tuple[StageState, ...] = ()


def takes_images(model: Pretrained, wish: LoraWish | None) -> bool:
    """Whether a model is trained on images; raise `ManifestError` if it is and adapters are wished for."""
    is_for_images = family_of(model.family).kind == "images"
    if is_for_images and wish is not None:
        raise ManifestError(
            ManifestReason.BAD_ADAPTERS, f"The {model.family} family takes no adapters.", "Leave out --lora."
        )
    return is_for_images


def begin(model: Pretrained, draft: TaskManifest, source: ImageSource) -> ImageRun:
    """Return a new run of `draft` on images; raise `TrainerError`.

    Without weights the model gets as many classes as the data has, and its channels where its config has none.
    """
    known = open_classes(model.weights[0].parent) if model.weights else None
    size = source.size or (known.size if known is not None else model.image_size)
    if not size:
        raise ManifestError(
            ManifestReason.BAD_IMAGES, "A config does not say the size of its images.", "Give --image-size, in pixels."
        )
    channels = int(model.config.get("num_channels", 0)) or usual_channels(source.paths)
    settings = {"sequence": 1, "images": ImageSettings(size)}
    # before anything is read: what cannot be trained costs no time
    complete(msgspec.structs.replace(draft, config={**model.config, "num_channels": channels}, **settings))
    images = read_images(source.paths, Form(size, channels), source.out)
    classes = ImageClasses.usual(images.names, size, channels) if known is None else known
    config = {**model.config, "num_channels": channels, "num_labels": classes.vocabulary}
    manifest = complete(msgspec.structs.replace(draft, config=config, tokenizer=classes.name, **settings))
    states = starting_states(model, manifest) if model.weights else ()
    manifest = starting_from(manifest, states)
    return _of(manifest, classes, source, images, states)


def go_on(checkpoint: Checkpoint, source: ImageSource) -> ImageRun:
    """Return the run that a checkpoint is of, on the same images; raise `DataError` for others."""
    classes = checkpoint.tokenizer
    assert isinstance(classes, ImageClasses)  # it was opened for a task on images
    images = read_images(source.paths, _form(checkpoint.manifest), source.out)
    run = _of(checkpoint.manifest, classes, source, images, checkpoint.states)
    if checkpoint.data and (checkpoint.data, checkpoint.tokens) != (run.batches.data, run.batches.tokens):
        raise DataError(
            DataReason.CHANGED,
            f"The images are not those that the run in {source.out} was trained on until step {checkpoint.step}.",
            "Give the same --data and --validation as at its start, or start a new run.",
        )
    return run


def _of(
    manifest: TaskManifest,
    classes: ImageClasses,
    source: ImageSource,
    images: ImageSet,
    states: tuple[StageState, ...],
) -> ImageRun:
    rows, kept = divided(images, source.share)
    batches = ImageBatches(images, rows, classes, manifest)
    validation: HeldBack | None = None
    if source.other is not None:
        others = read_images((source.other,), _form(manifest), source.out)
        validation = validation_on(others, shuffled(len(others)), classes, manifest)
    elif source.share:
        validation = validation_on(images, kept, classes, manifest)
    return ImageRun(manifest, batches, classes, validation, states)


def _form(manifest: TaskManifest) -> Form:
    return Form(manifest.example_size, int(manifest.config["num_channels"]))
