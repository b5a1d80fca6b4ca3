"""Files that are whole or absent: everything is written and synced under other names, then renamed."""

import contextlib
import errno
import json
import os
import shutil
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from trainer.errors import CheckpointError, CheckpointReason
from trainer.tensors import buffer_of

_PENDING = ".pending"
_ASIDE = ".aside"


class Transaction:
    """New files of one folder, put in place together when all of them are safely on disk."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pending = folder / _PENDING
        self._names: list[str] = []

    def write(self, name: str, data: bytes) -> None:
        """Write one file."""
        with self._open(name) as descriptor:
            _write_all(descriptor, data)

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
        """Write fp32 and int64 tensors as safetensors, straight from their memory; equal content gives equal bytes."""
        # the wider ones first: readers want them aligned
        tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
        with self._open(name) as descriptor:
            _write_all(descriptor, _safetensors_header(tensors, metadata))
            for tensor in tensors.values():
                _write_all(descriptor, buffer_of(tensor))

    @contextlib.contextmanager
    def _open(self, name: str) -> Iterator[int]:
        path = self._pending / name
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            yield descriptor
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self._names.append(name.partition("/")[0])

    def commit(self) -> None:
        """Rename everything into place, replacing what has the same name; if that fails, undo what was renamed."""
        done: list[str] = []
        try:
            for name in dict.fromkeys(self._names):
                done.append(name)
                self._set_aside(name)
                os.replace(self._pending / name, self._folder / name)
            _sync_folder(self._folder)
        except OSError:
            for name in reversed(done):
                self._undo(name)
            raise

    def _set_aside(self, name: str) -> None:
        target, aside = self._folder / name, self._pending / _ASIDE / name
        aside.parent.mkdir(exist_ok=True)
        if target.is_dir():
            os.replace(target, aside)
        elif target.exists():
            os.link(target, aside)  # the old file stays in place until the new one takes it

    def _undo(self, name: str) -> None:
        target, aside = self._folder / name, self._pending / _ASIDE / name
        if not (self._pending / name).exists():
            shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
        if aside.exists():
            os.replace(aside, target)


@contextlib.contextmanager
def transaction(folder: Path) -> Iterator[Transaction]:
    """Open a transaction on `folder` (created if needed), committed on leaving; raise `CheckpointError`.

    If the disk fills or anything else fails, what was there before stays whole.
    """
    pending = folder / _PENDING
    try:
        folder.mkdir(parents=True, exist_ok=True)
        recover(folder)
        shutil.rmtree(pending, ignore_errors=True)
        pending.mkdir()
        change = Transaction(folder)
        yield change
        change.commit()
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise CheckpointError(
            CheckpointReason.DISK,
            f"The disk of {folder} is full." if is_full else f"{folder} cannot be written: {error.strerror}.",
            "Free some space; the last checkpoint is untouched." if is_full else "Choose another folder.",
        ) from None
    finally:
        shutil.rmtree(pending, ignore_errors=True)


def recover(folder: Path) -> None:
    """Put back what a process that was killed in the middle of a commit had set aside; raise `OSError`."""
    for aside in (folder / _PENDING / _ASIDE).glob("*"):
        if not (folder / aside.name).exists():
            os.replace(aside, folder / aside.name)


_DTYPES = {torch.float32: "F32", torch.int64: "I64"}


def _safetensors_header(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": metadata}
    start = 0
    for name, tensor in tensors.items():
        stop = start + tensor.element_size() * tensor.numel()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write_all(descriptor: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view[: 1 << 30]) :]


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
