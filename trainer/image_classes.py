"""What stands in an image task for a tokenizer: the names of the classes, and how bytes become pixel values."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from trainer.content import address_of
from trainer.errors import DataError, DataReason

PROCESSOR = "preprocessor_config.json"
_HALF = 0.5


@dataclass(frozen=True)
class ImageClasses:
    """Class names in the order of their labels, the size of an image, and mean and deviation of each channel."""

    names: tuple[str, ...]
    size: int
    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    is_bytes = False

    @classmethod
    def usual(cls, names: tuple[str, ...], size: int, channels: int) -> "ImageClasses":
        """Return classes whose pixel values go from −1 to 1."""
        return cls(names, size, (_HALF,) * channels, (_HALF,) * channels)

    @property
    def vocabulary(self) -> int:
        """Number of classes."""
        return len(self.names)

    @cached_property
    def json(self) -> bytes:
        """Everything of it, in one canonical form."""
        settings = {"classes": self.names, "size": self.size, "mean": self.mean, "deviation": self.deviation}
        return json.dumps(settings, sort_keys=True, separators=(",", ":")).encode()

    @property
    def name(self) -> str:
        """What a manifest's `tokenizer` says: the hex address of `json`."""
        return address_of(self.json).hex()

    @property
    def model_settings(self) -> dict[str, object]:
        """What the model's config.json says of the classes."""
        numbered = {str(label): name for label, name in enumerate(self.names)}
        return {"id2label": numbered, "label2id": {name: label for label, name in enumerate(self.names)}}

    def files(self, context: int) -> dict[str, bytes]:
        """Return the file, by name, that `AutoImageProcessor.from_pretrained` needs beside a model."""
        sides = {"height": self.size, "width": self.size}
        settings = {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": True,
            "size": sides,
            "resample": 2,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": self.mean,
            "image_std": self.deviation,
        }
        return {PROCESSOR: json.dumps(settings, indent=2).encode()}

    @cached_property
    def _table(self) -> npt.NDArray[np.float32]:
        """Pixel value of each byte in each channel (C, 256)."""
        scaled = np.arange(256, dtype=np.float32) * np.float32(1 / 255)
        mean, deviation = (np.asarray(values, np.float32)[:, None] for values in (self.mean, self.deviation))
        return (scaled - mean) / deviation

    def normalised(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Return fp32 pixel values of bytes (N,C,H,W)."""
        table = self._table
        return np.stack([table[channel][pixels[:, channel]] for channel in range(len(table))], axis=1)


def open_classes(folder: Path) -> ImageClasses:
    """Return the classes of a model folder; raise `DataError`."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
        labels = {int(label): str(name) for label, name in config["id2label"].items()}
        settings = json.loads((folder / PROCESSOR).read_bytes())
        size, mean, deviation = (settings[key] for key in ("size", "image_mean", "image_std"))
        side = size if isinstance(size, int) else size.get("height") or size["shortest_edge"]
        names = tuple(labels[label] for label in range(len(labels)))
        return ImageClasses(names, int(side), tuple(map(float, mean)), tuple(map(float, deviation)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise DataError(
            DataReason.UNREADABLE,
            f"{folder} does not say which classes its model tells apart.",
            f"It needs id2label in config.json, and size, image_mean and image_std in {PROCESSOR}.",
        ) from None
