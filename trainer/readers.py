"""What makes examples of a run's data: a tokenizer for text, the classes for images."""

from pathlib import Path
from typing import TypeAlias

from trainer.image_classes import ImageClasses, open_classes
from trainer.manifest import TaskManifest
from trainer.tokens import Tokenizer, open_tokenizer

Reader: TypeAlias = Tokenizer | ImageClasses


def open_reader(folder: Path, manifest: TaskManifest) -> Reader:
    """Return what a task's folder says of its examples; raise `DataError`."""
    return open_tokenizer(folder) if manifest.images is None else open_classes(folder)
