"""Batches: one token stream cut into windows, in an order that the seed alone fixes, and a part kept to validate."""

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from blake3 import blake3
from torch import Tensor

from trainer.documents import Corpus
from trainer.errors import DataError, DataReason
from trainer.manifest import TaskManifest
from trainer.token_file import Ids, TokenData, tokenized
from trainer.tokens import Tokenizer

__all__ = ["Batch", "Batches", "Corpus", "DataError", "DataReason", "Validation", "load_batches", "standard_library"]


class Batch(NamedTuple):
    """One micro-batch: int32 tokens and next-token labels, both (B, T); or fp32 pixels (B,C,H,W) and labels (B)."""

    tokens: Tensor
    labels: Tensor


def standard_library() -> Path:
    """Return the folder of Python's own standard library: a corpus that every machine has."""
    return Path(os.__file__).parent


class RunData(Protocol):
    """The micro-batches of a run, of text or of images."""

    @property
    def data(self) -> str:
        """Hash of what they are made of."""
        ...

    @property
    def tokens(self) -> int:
        """How many tokens, or images, are trained on."""
        ...

    def batch(self, step: int, microbatch: int) -> Batch:
        """Return a micro-batch of `step` (from 1)."""
        ...

    def continued(self, manifest: TaskManifest) -> "RunData":
        """Return the micro-batches of another run over the same data."""
        ...


class HeldBack(Protocol):
    """Micro-batches that are never trained on."""

    @property
    def count(self) -> int:
        """Number of micro-batches."""
        ...

    def batch(self, index: int) -> Batch:
        """Return one of the micro-batches."""
        ...


class Order:
    """The order in which `count` examples are visited: a new one each epoch, keyed by the seed."""

    def __init__(self, count: int, seed: int) -> None:
        self._count = count
        self._seed = seed
        self._epoch = lru_cache(maxsize=2)(self._shuffled)

    def place(self, number: int) -> int:
        """Return which example is the one that is visited as number `number` (from 0)."""
        epoch, place = divmod(number, self._count)
        return int(self._epoch(epoch)[place])

    def _shuffled(self, epoch: int) -> npt.NDArray[np.int64]:
        # sorting keyed pseudo-random numbers gives an order that no library version can change
        label = self._seed.to_bytes(8, "big") + epoch.to_bytes(8, "big")
        stream = blake3(label, derive_key_context="tdml 1 data order").digest(8 * self._count)
        return np.argsort(np.frombuffer(stream, "<u8"), kind="stable")


class Batches:
    """The micro-batches of a run: any (step, micro-batch) at any time, the same on every machine.

    Windows of T tokens are visited in a new keyed order each epoch; nothing is carried from step to step.
    `data` is the hash of the text that the tokens came from.
    """

    def __init__(self, tokens: Ids, manifest: TaskManifest, data: str = "", highest: int | None = None) -> None:
        self._manifest = manifest
        self._tokens = tokens
        self.data = data
        self.windows = _windows(tokens, manifest)
        lowest = 0 if highest is not None else int(tokens.min())
        self._highest = int(tokens.max()) if highest is None else highest
        if self._highest >= manifest.vocabulary or lowest < 0:
            raise DataError(
                DataReason.VOCABULARY,
                f"The tokenizer's ids exceed the model's vocabulary of {manifest.vocabulary}.",
                "Use a smaller tokenizer or a model with a larger vocabulary.",
            )
        self._order = Order(self.windows, manifest.seed)

    @property
    def tokens(self) -> int:
        """Number of tokens that the windows are cut from."""
        return len(self._tokens)

    def batch(self, step: int, microbatch: int) -> Batch:
        """Return a micro-batch of `step` (from 1); raise `IndexError` outside the run's micro-batches."""
        length = self._manifest.sequence
        starts = [self._order.place(number) * length for number in self._manifest.examples(step, microbatch)]
        return _batch(self._tokens, starts, length)

    def continued(self, manifest: TaskManifest) -> "Batches":
        """Return the batches of another run over the same tokens."""
        return Batches(self._tokens, manifest, self.data, self._highest)


@dataclass(frozen=True)
class Validation:
    """Micro-batches that are never trained on, the same at every evaluation: the first `count` of the kept text."""

    tokens: Ids
    manifest: TaskManifest
    count: int

    def batch(self, index: int) -> Batch:
        """Return one of the micro-batches."""
        rows, length = self.manifest.batch, self.manifest.sequence
        return _batch(self.tokens, [(index * rows + row) * length for row in range(rows)], length)


def load_batches(corpus: Corpus, tokenizer: Tokenizer, manifest: TaskManifest, cache: Path | None = None) -> Batches:
    """Return the batches of a run over `corpus`, its tokens kept in the folder `cache`; raise `DataError`."""
    found = tokenized(corpus, tokenizer, cache)
    return Batches(found.ids, manifest, found.data, found.highest)


def split_off(found: TokenData, share: float, manifest: TaskManifest) -> tuple[Batches, Validation]:
    """Return the batches of a run and, of the end of the text, a `share` that it never sees; raise `DataError`."""
    if not 0 < share < 1:
        raise DataError(
            DataReason.BAD_SPLIT, f"A share of {share} cannot be kept to validate.", "Give a share between 0 and 1."
        )
    kept = round(len(found.ids) * share)
    train, rest = found.ids[: len(found.ids) - kept], found.ids[len(found.ids) - kept :]
    return Batches(train, manifest, found.data, found.highest), validation_of(rest, manifest)


def validation_of(tokens: Ids, manifest: TaskManifest) -> Validation:
    """Return what a run validates on, as many micro-batches as a step has at most; raise `DataError`."""
    count = min(_windows(tokens, manifest) // manifest.batch, manifest.microbatches)
    if not count:
        raise DataError(
            DataReason.TOO_SHORT,
            f"The text to validate on has {len(tokens)} tokens; one batch of the run needs"
            f" {manifest.batch * manifest.sequence + 1}.",
            "Give more text, a larger share, or a smaller batch.",
        )
    return Validation(tokens, manifest, count)


def _windows(tokens: Ids, manifest: TaskManifest) -> int:
    windows = (len(tokens) - 1) // manifest.sequence
    if windows < 1:
        raise DataError(
            DataReason.TOO_SHORT,
            f"The data has {len(tokens)} tokens; one sequence needs {manifest.sequence + 1}.",
            "Give more text or a shorter sequence.",
        )
    return windows


def _batch(tokens: Ids, starts: list[int], length: int) -> Batch:
    rows = np.stack([np.asarray(tokens[start : start + length + 1], np.int32) for start in starts])
    return Batch(_tensor(rows[:, :-1]), _tensor(rows[:, 1:]))


def _tensor(rows: npt.NDArray[np.int32]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(rows))
