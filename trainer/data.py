"""Corpora and batches: text to one token stream, cut into windows, in an order that the seed alone fixes."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from blake3 import blake3
from torch import Tensor

from trainer.errors import DataError, DataReason
from trainer.manifest import TaskManifest
from trainer.tokens import Tokenizer, Tokens

__all__ = [
    "Batch",
    "Batches",
    "Corpus",
    "DataError",
    "DataReason",
    "load_batches",
    "read_corpus",
    "standard_library",
]

MAX_CORPUS_BYTES = 64 << 20
_SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "node_modules"}
_PROBE_BYTES = 4096
_HINT = "Give a text file, a JSON-lines file with a `text` field, or a folder of such files."


@dataclass(frozen=True)
class Corpus:
    """Documents in their training order, and the bytes that they take."""

    texts: tuple[str, ...]
    bytes: int


class Batch(NamedTuple):
    """One micro-batch: int32 tokens and next-token labels, both (B, T)."""

    tokens: Tensor
    labels: Tensor


def standard_library() -> Path:
    """Return the folder of Python's own standard library: a corpus that every machine has."""
    return Path(os.__file__).parent


def read_corpus(path: Path, max_bytes: int = MAX_CORPUS_BYTES) -> Corpus:
    """Return the text under `path`, at most about `max_bytes` of it; raise `DataError`.

    Of a folder, files that are not UTF-8 text are skipped; the order is by the hash of their relative paths,
    so that a part of a large folder is a fair sample of it.
    """
    if not path.exists():
        raise DataError(DataReason.MISSING, f"There is no file or folder {path}.", _HINT)
    texts, total = [], 0
    for file in _files(path):
        for text in _documents(file, is_alone=file == path, limit=max_bytes - total):
            texts.append(text)
            total += len(text.encode(errors="replace"))
        if total >= max_bytes:
            break
    if not total:
        raise DataError(DataReason.EMPTY, f"There is no text in {path}.", _HINT)
    return Corpus(tuple(texts), total)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    found: list[Path] = []
    for folder, folders, names in os.walk(path, onerror=_unreadable):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS and not name.startswith(".")]
        found.extend(Path(folder) / name for name in names if not name.startswith("."))
    return sorted(
        (file for file in found if file.is_file()),
        key=lambda file: blake3(file.relative_to(path).as_posix().encode(errors="surrogateescape")).digest(),
    )


def _unreadable(error: OSError) -> None:
    raise DataError(DataReason.UNREADABLE, f"{error.filename} cannot be read: {error.strerror}.", _HINT) from None


def _documents(file: Path, is_alone: bool, limit: int) -> Iterator[str]:
    try:
        with file.open("rb") as stream:
            head = stream.read(_PROBE_BYTES)
            data = b"" if b"\0" in head else head + stream.read(max(limit - len(head), 0))
    except OSError as error:
        _unreadable(error)
    text = _decoded(data, is_whole=len(data) < limit)
    if b"\0" in head or text is None:
        if is_alone:
            raise DataError(DataReason.NOT_TEXT, f"{file} is not UTF-8 text.", _HINT)
        return
    if file.suffix == ".jsonl":
        yield from _json_lines(file, text, is_whole=len(data) < limit)
    elif text.strip():
        yield text


def _decoded(data: bytes, is_whole: bool) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        # a cut at the limit may fall within a character
        is_cut = not is_whole and error.start >= len(data) - 3
        return data[: error.start].decode() if is_cut else None


def _json_lines(file: Path, text: str, is_whole: bool) -> Iterator[str]:
    lines = text.splitlines()
    for number, line in enumerate(lines if is_whole else lines[:-1], 1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError, RecursionError):
            document = None
        if not isinstance(document, str):
            raise DataError(
                DataReason.UNREADABLE,
                f"Line {number} of {file} is not a JSON object with a `text` string.",
                'Each line must look like {"text": "…"}.',
            )
        yield document


class Batches:
    """The micro-batches of a run: any (step, micro-batch) at any time, the same on every machine.

    Windows of T tokens are visited in a new keyed order each epoch; nothing is carried from step to step.
    """

    def __init__(self, tokens: Tokens, manifest: TaskManifest) -> None:
        self._manifest = manifest
        self._tokens = tokens
        self.windows = (len(tokens) - 1) // manifest.sequence
        if self.windows < 1:
            raise DataError(
                DataReason.TOO_SHORT,
                f"The data has {len(tokens)} tokens; one sequence needs {manifest.sequence + 1}.",
                "Give more text or a shorter sequence.",
            )
        if int(tokens.max()) >= manifest.vocabulary or int(tokens.min()) < 0:
            raise DataError(
                DataReason.VOCABULARY,
                f"The tokenizer's ids exceed the model's vocabulary of {manifest.vocabulary}.",
                "Use a smaller tokenizer or a model with a larger vocabulary.",
            )
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def batch(self, step: int, microbatch: int) -> Batch:
        """Return a micro-batch of `step` (from 1); raise `IndexError` outside the run's micro-batches."""
        manifest = self._manifest
        if step < 1 or not 0 <= microbatch < manifest.microbatches:
            raise IndexError(f"no micro-batch {microbatch} in step {step}")
        first = ((manifest.start + step - 1) * manifest.microbatches + microbatch) * manifest.batch
        starts = [self._start(first + row) for row in range(manifest.batch)]
        rows = np.stack([self._tokens[start : start + manifest.sequence + 1] for start in starts])
        return Batch(_tensor(rows[:, :-1]), _tensor(rows[:, 1:]))

    def continued(self, manifest: TaskManifest) -> "Batches":
        """Return the batches of another run over the same tokens."""
        return Batches(self._tokens, manifest)

    def _start(self, number: int) -> int:
        epoch, place = divmod(number, self.windows)
        return int(self._order(epoch)[place]) * self._manifest.sequence

    def _shuffled(self, epoch: int) -> npt.NDArray[np.int64]:
        # sorting keyed pseudo-random numbers gives an order that no library version can change
        label = self._manifest.seed.to_bytes(8, "big") + epoch.to_bytes(8, "big")
        stream = blake3(label, derive_key_context="tdml 1 data order").digest(8 * self.windows)
        return np.argsort(np.frombuffer(stream, "<u8"), kind="stable")


def _tensor(rows: npt.NDArray[np.int32]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(rows, dtype=np.int32))


def load_batches(corpus: Corpus, tokenizer: Tokenizer, manifest: TaskManifest) -> Batches:
    """Return the batches of a run over `corpus`; raise `DataError`."""
    return Batches(tokenizer.encode(corpus.texts), manifest)
