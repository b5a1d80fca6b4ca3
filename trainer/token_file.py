"""Tokens on disk: a corpus tokenised once in bounded memory, and mapped from a file named after its content."""

import errno
import json
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from trainer.documents import Corpus, Piece
from trainer.errors import DataError, DataReason
from trainer.tokens import Tokenizer

_BATCH_BYTES = 2 << 20
_READ_BYTES = 1 << 24
_SMALL = 1 << 16
"""Vocabularies up to this size fit 16-bit ids."""

Ids = npt.NDArray[np.uint16] | npt.NDArray[np.int32]


@dataclass(frozen=True)
class TokenData:
    """The ids of a corpus in one stream, each document followed by the end token; `data` addresses the text."""

    ids: Ids
    data: str
    highest: int


@dataclass(frozen=True)
class _Note:
    count: int
    highest: int
    digest: str


def data_hash(pieces: Iterable[Piece]) -> str:
    """Return the BLAKE3 address, in hex, of text with its document ends, however it was stored."""
    hasher = blake3(derive_key_context="tdml 1 corpus")
    for piece in pieces:
        data = piece.text.encode()
        hasher.update(struct.pack("<Q?", len(data), piece.is_end))
        hasher.update(data)
    return hasher.hexdigest()


def tokenized(corpus: Corpus, tokenizer: Tokenizer, folder: Path | None = None) -> TokenData:
    """Return a corpus as tokens, mapped from a file in `folder` that is made if it is not there yet.

    Raises `DataError`, CHANGED if the text changes while it is read. Without a folder the file is a temporary one.
    """
    data = data_hash(corpus.pieces())
    kind = np.dtype("<u2") if tokenizer.vocabulary <= _SMALL else np.dtype("<i4")
    try:
        if folder is None:
            with TemporaryFile() as stream:
                note = _write(stream, corpus, tokenizer, data, kind)
                return _mapped(stream, note, data, kind)
        return _cached(folder, corpus, tokenizer, data, kind)
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise DataError(
            DataReason.DISK,
            f"The disk of {folder} is full." if is_full else f"{folder} cannot be written: {error.strerror}.",
            "Free some space: the tokens take up to four bytes each." if is_full else "Choose another folder.",
        ) from None


def _cached(folder: Path, corpus: Corpus, tokenizer: Tokenizer, data: str, kind: np.dtype) -> TokenData:
    name = blake3(f"{data} {tokenizer.name} {kind.str}".encode()).hexdigest()[:32]
    file, notes = folder / f"{name}.tokens", folder / f"{name}.json"
    note = _checked(file, notes, kind)
    if note is None:
        folder.mkdir(parents=True, exist_ok=True)
        pending = folder / f"{name}.pending"
        try:
            with pending.open("w+b") as stream:
                note = _write(stream, corpus, tokenizer, data, kind)
                os.fsync(stream.fileno())
            notes.write_text(json.dumps(asdict(note)))
            pending.replace(file)
        finally:
            pending.unlink(missing_ok=True)
    with file.open("rb") as stream:
        return _mapped(stream, note, data, kind)


def _checked(file: Path, notes: Path, kind: np.dtype) -> _Note | None:
    """Return the note of a token file that is as it was written."""
    try:
        note = _Note(**json.loads(notes.read_bytes()))
        hasher = blake3()
        with file.open("rb") as stream:
            while block := stream.read(_READ_BYTES):
                hasher.update(block)
        is_whole = file.stat().st_size == note.count * kind.itemsize and hasher.hexdigest() == note.digest
    except (OSError, ValueError, TypeError):
        return None
    return note if is_whole else None


def _write(stream: BinaryIO, corpus: Corpus, tokenizer: Tokenizer, data: str, kind: np.dtype) -> _Note:
    count, highest, hasher = 0, 0, blake3()
    seen = blake3(derive_key_context="tdml 1 corpus")
    for pieces in _batched(corpus.pieces()):
        for piece, ids in zip(pieces, tokenizer.ids([piece.text for piece in pieces]), strict=True):
            text = piece.text.encode()
            seen.update(struct.pack("<Q?", len(text), piece.is_end) + text)
            array = np.append(np.asarray(ids, np.int64), [tokenizer.end] if piece.is_end else []).astype(kind)
            block = array.tobytes()
            stream.write(block)
            hasher.update(block)
            count += len(array)
            highest = max(highest, int(array.max(initial=0)))
    if seen.hexdigest() != data:
        raise DataError(
            DataReason.CHANGED, "The data changed while it was being read.", "Start again once it is complete."
        )
    stream.flush()
    return _Note(count, highest, hasher.hexdigest())


def _batched(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _mapped(stream: BinaryIO, note: _Note, data: str, kind: np.dtype) -> TokenData:
    ids: Ids = np.memmap(stream, kind, "r", shape=(note.count,)) if note.count else np.empty(0, kind)
    return TokenData(ids, data, note.highest)
