"""Batches of images: decoded once to bytes, visited in an order that the seed alone fixes, a part kept to validate."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from blake3 import blake3

from trainer.data import Batch, Order
from trainer.errors import DataError, DataReason
from trainer.image_classes import ImageClasses
from trainer.manifest import TaskManifest

Pixels = npt.NDArray[np.uint8]
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Decoded images (N, C, H, W), their labels (N), what the classes are, and the hash of it all."""

    pixels: Pixels
    labels: npt.NDArray[np.int32]
    names: tuple[str, ...]
    data: str

    def __len__(self) -> int:
        return len(self.labels)


class ImageBatches:
    """The micro-batches of a run over `rows` of a set: any (step, micro-batch) at any time, the same everywhere."""

    def __init__(self, images: ImageSet, rows: Rows, classes: ImageClasses, manifest: TaskManifest) -> None:
        check_fit(images, classes, manifest)
        if not len(rows):
            raise DataError(DataReason.TOO_SHORT, "There is no image to train on.", "Give more images.")
        self._images = images
        self._rows = rows
        self._classes = classes
        self._manifest = manifest
        self._order = Order(len(rows), manifest.seed)

    @property
    def data(self) -> str:
        """Hash of the images, their labels and the names of the classes."""
        return self._images.data

    @property
    def tokens(self) -> int:
        """Number of images that are trained on."""
        return len(self._rows)

    def batch(self, step: int, microbatch: int) -> Batch:
        """Return a micro-batch of `step` (from 1); raise `IndexError` outside the run's micro-batches."""
        places = [self._order.place(number) for number in self._manifest.examples(step, microbatch)]
        return read_batch(self._images, self._rows[places], self._classes)

    def continued(self, manifest: TaskManifest) -> "ImageBatches":
        """Return the batches of another run over the same images."""
        return ImageBatches(self._images, self._rows, self._classes, manifest)


@dataclass(frozen=True, eq=False)
class ImageValidation:
    """Micro-batches that are never trained on, the same at every evaluation."""

    images: ImageSet
    rows: Rows
    classes: ImageClasses
    size: int

    @property
    def count(self) -> int:
        """Number of whole micro-batches."""
        return len(self.rows) // self.size

    def batch(self, index: int) -> Batch:
        """Return one of the micro-batches."""
        return read_batch(self.images, self.rows[index * self.size : (index + 1) * self.size], self.classes)


def shuffled(count: int) -> Rows:
    """Return the order in which a set is divided: keyed by nothing, for every run must keep the same part back."""
    stream = blake3(count.to_bytes(8, "big"), derive_key_context="tdml 1 image order").digest(8 * count)
    return np.argsort(np.frombuffer(stream, "<u8"), kind="stable")


def divided(images: ImageSet, share: float) -> tuple[Rows, Rows]:
    """Return which images are trained on and which, a `share` of all, are not; raise `DataError`."""
    if not 0 <= share < 1:
        raise DataError(
            DataReason.BAD_SPLIT, f"A share of {share} cannot be kept to validate.", "Give a share between 0 and 1."
        )
    order = shuffled(len(images))
    kept = round(len(images) * share)
    return order[kept:], order[:kept]


def validation_on(images: ImageSet, rows: Rows, classes: ImageClasses, manifest: TaskManifest) -> ImageValidation:
    """Return what a run validates on, as many micro-batches as a step has at most; raise `DataError`."""
    check_fit(images, classes, manifest)
    held = ImageValidation(images, rows[: manifest.batch * manifest.microbatches], classes, manifest.batch)
    if not held.count:
        raise DataError(
            DataReason.TOO_SHORT,
            f"There are {len(rows)} images to validate on; one batch of the run needs {manifest.batch}.",
            "Give more images, a larger share, or a smaller batch.",
        )
    return held


def check_fit(images: ImageSet, classes: ImageClasses, manifest: TaskManifest) -> None:
    """Raise `DataError` unless the images have the shape and the classes of the task."""
    wanted = (int(manifest.config["num_channels"]), manifest.example_size, manifest.example_size)
    if images.pixels.shape[1:] != wanted:
        raise DataError(
            DataReason.IMAGE_SIZE,
            f"The images have the shape {images.pixels.shape[1:]}, the task wants {wanted}.",
            "Give --image-size as at the start of the run.",
        )
    strangers = [name for name in images.names if name not in classes.names]
    if strangers:
        raise DataError(
            DataReason.UNKNOWN_CLASS,
            f"The images have a class {strangers[0][:64]!r} that the task has not.",
            f"Classes: {', '.join(classes.names)[:200]}.",
        )
    low, high = int(images.labels.min(initial=0)), int(images.labels.max(initial=0))
    if low < 0 or high >= len(images.names):
        raise DataError(
            DataReason.LABEL,
            f"An image has the label {low if low < 0 else high}; there are {len(images.names)} classes.",
            "Number the classes from 0.",
        )


def read_batch(images: ImageSet, rows: Rows, classes: ImageClasses) -> Batch:
    """Return fp32 pixels (B,C,H,W), normalised, and int32 labels (B) by the task's numbers of the classes."""
    numbers = np.array([classes.names.index(name) for name in images.names], np.int32)
    pixels = classes.normalised(images.pixels[rows])
    return Batch(torch.from_numpy(pixels), torch.from_numpy(numbers[images.labels[rows]]))
