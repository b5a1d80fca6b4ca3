"""Images to train on: scikit-learn's digits by name, folders with a folder for each class, saved data sets.

Each is decoded once, one after another, into a file without a name that is mapped: memory stays small. Every image
becomes bytes of one size and number of channels, squeezed to a square where it is none.
"""

import errno
import io
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from trainer.documents import data_set_files, load_pyarrow
from trainer.errors import DataError, DataReason
from trainer.image_data import ImageSet

DIGITS = "digits"
_HINT = f"Give {DIGITS}, a folder with a folder of images for each class, or a saved `datasets` folder."
_VISION = "Install it: pip install 'tdml[vision]'."
_ROWS = 64
Shades = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Form:
    """What images are made to be: pixels of a side, and 1 channel (grey) or 3 (red, green, blue)."""

    size: int
    channels: int

    @property
    def mode(self) -> str:
        """Pillow's word for the channels."""
        return "L" if self.channels == 1 else "RGB"


@dataclass(frozen=True)
class _Picture:
    """Where an image is: a file, the bytes of one, or its shades."""

    name: str
    source: Path | bytes | Shades
    label: int


@dataclass(frozen=True)
class _Source:
    """Names of the classes, and pictures, each labelled with the number of its class."""

    names: tuple[str, ...]
    pictures: Iterator[_Picture]


def is_digits(path: Path) -> bool:
    """Whether a path is the name of scikit-learn's digits and not a file or folder of that name."""
    return str(path) == DIGITS and not path.exists()


def usual_channels(paths: tuple[Path, ...]) -> int:
    """Return the channels of images of these paths, if the model does not say: digits are grey."""
    return 1 if all(map(is_digits, paths)) else 3


def read_images(paths: tuple[Path, ...], form: Form, folder: Path) -> ImageSet:
    """Return all images of `paths`, decoded into a file in `folder` that has no name; raise `DataError`."""
    if form.channels not in (1, 3):
        raise DataError(
            DataReason.NOT_IMAGE,
            f"Images have 1 or 3 channels, the model takes {form.channels}.",
            "Use a model with num_channels 1 or 3.",
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder) as stream:
            return _decoded(paths, form, stream)
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise DataError(
            DataReason.DISK,
            f"The disk of {folder} is full." if is_full else f"{folder} cannot be written: {error.strerror}.",
            "Free some space: an image takes a byte for each pixel and channel.",
        ) from None


def _decoded(paths: tuple[Path, ...], form: Form, stream: BinaryIO) -> ImageSet:
    names: dict[str, int] = {}
    labels: list[int] = []
    hasher = blake3(derive_key_context="tdml 1 images")
    for path in paths:
        source = _source(path)
        numbers = [names.setdefault(name, len(names)) for name in source.names]
        for picture in source.pictures:
            data = _fitted(picture, form)
            labels.append(numbers[picture.label])
            hasher.update(labels[-1].to_bytes(4, "big") + data)
            stream.write(data)
    if not labels:
        raise DataError(DataReason.EMPTY, "There is no image in the data.", _HINT)
    hasher.update(json.dumps([list(names), form.size, form.channels]).encode())
    stream.flush()
    shape = (len(labels), form.channels, form.size, form.size)
    pixels = np.memmap(stream, np.uint8, "r", shape=shape)
    return ImageSet(pixels, np.asarray(labels, np.int32), tuple(names), hasher.hexdigest())


def _source(path: Path) -> _Source:
    if is_digits(path):
        return _digits()
    if not path.exists():
        raise DataError(DataReason.MISSING, f"There is no file or folder {path}.", _HINT)
    files = data_set_files(path) if path.is_dir() else []
    return _data_set(files) if files else _class_folders(path)


def _digits() -> _Source:
    """Return the 1797 digits of scikit-learn, 8 × 8 pixels of 17 shades."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError(
            DataReason.LIBRARY, "The digits come with scikit-learn, which is not installed.", _VISION
        ) from None
    found = load_digits()
    shades = np.round(found.images * (255 / 16)).astype(np.uint8)
    pictures = (_Picture("a digit", shade, int(label)) for shade, label in zip(shades, found.target, strict=True))
    return _Source(tuple(str(name) for name in found.target_names), pictures)


def _class_folders(path: Path) -> _Source:
    """Return the images of a folder in which each class has a folder, in the order of their names."""
    try:
        classes = sorted(each for each in path.iterdir() if each.is_dir() and not each.name.startswith("."))
    except OSError as error:
        raise DataError(DataReason.UNREADABLE, f"{path} cannot be read: {error.strerror}.", _HINT) from None
    if not classes:
        raise DataError(DataReason.NOT_IMAGE, f"{path} has no folder for any class.", _HINT)
    return _Source(tuple(each.name for each in classes), _files_of(classes))


def _files_of(classes: list[Path]) -> Iterator[_Picture]:
    known = _pillow().registered_extensions()
    for label, folder in enumerate(classes):
        for file in sorted(folder.rglob("*")):
            if file.suffix.lower() in known and file.is_file() and not file.name.startswith("."):
                yield _Picture(str(file), file, label)


def _data_set(files: list[Path]) -> _Source:
    """Return the images of a folder that `datasets` saved, found by the kinds of its columns."""
    try:
        features = json.loads((files[0].parent / "dataset_info.json").read_bytes())["features"]
        column = next(name for name, kind in features.items() if kind.get("_type") == "Image")
        answer = next(name for name, kind in features.items() if kind.get("_type") == "ClassLabel")
        names = tuple(map(str, features[answer]["names"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration):
        raise DataError(
            DataReason.FIELD,
            f"{files[0].parent} has no column of images with one of class labels.",
            "Save a data set whose features are Image and ClassLabel.",
        ) from None
    return _Source(names, _rows_of(files, column, answer, len(names)))


def _rows_of(files: list[Path], column: str, answer: str, classes: int) -> Iterator[_Picture]:
    arrow = load_pyarrow()
    for file in files:
        try:
            with arrow.memory_map(str(file)) as source, arrow.ipc.open_stream(source) as batches:
                for batch in batches:
                    for start in range(0, batch.num_rows, _ROWS):
                        rows = batch.slice(start, _ROWS)
                        found = zip(rows.column(column).to_pylist(), rows.column(answer).to_pylist(), strict=True)
                        for stored, label in found:
                            _check_label(label, classes, file)
                            data = stored.get("bytes") if isinstance(stored, dict) else None
                            yield _Picture(f"An image in {file}", data or b"", int(label))
        except (arrow.ArrowException, KeyError) as error:
            raise DataError(DataReason.UNREADABLE, f"{file} cannot be read: {str(error)[:200]}.", _HINT) from None


def _check_label(label: object, classes: int, file: Path) -> None:
    if not isinstance(label, int) or not 0 <= label < classes:
        raise DataError(
            DataReason.LABEL,
            f"An image in {file} has the label {label}; there are {classes} classes, numbered from 0.",
            "Leave out images without a class.",
        )


def _fitted(picture: _Picture, form: Form) -> bytes:
    """Return a picture as bytes (C, H, W); raise `DataError` for a damaged one, or one that would fill the memory."""
    image = _pillow()
    bombs = (image.DecompressionBombError, image.DecompressionBombWarning)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", image.DecompressionBombWarning)
            with _opened(picture.source) as found:
                fitted = found.convert(form.mode).resize((form.size, form.size), image.Resampling.BILINEAR)
    except (OSError, ValueError, SyntaxError, *bombs) as error:
        raise DataError(
            DataReason.NOT_IMAGE,
            f"{picture.name} cannot be read as an image: {str(error)[:150]}.",
            "Take it out of the data, or mend it.",
        ) from None
    array = np.asarray(fitted, np.uint8).reshape(form.size, form.size, form.channels)
    return np.ascontiguousarray(array.transpose(2, 0, 1)).tobytes()


def _opened(source: Path | bytes | Shades) -> Any:
    image = _pillow()
    if isinstance(source, np.ndarray):
        return image.fromarray(source)
    return image.open(io.BytesIO(source) if isinstance(source, bytes) else source)


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise DataError(DataReason.LIBRARY, "Images need Pillow, which is not installed.", _VISION) from None
    return Image
