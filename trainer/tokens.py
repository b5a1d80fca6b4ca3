"""Tokenizers that `transformers.AutoTokenizer` opens: raw bytes, or byte-level BPE trained on the corpus."""

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from trainer.content import address_of
from trainer.errors import DataError, DataReason

END = "<|endoftext|>"
MIN_VOCABULARY = 257  # all bytes and the end of a document
_SMALL_VOCABULARY = 512
MAX_TRAINING_BYTES = 2_000_000
FILES = ("tokenizer.json", "tokenizer_config.json")

Tokens = npt.NDArray[np.int32]


class Tokenizer:
    """Text to token ids and back, over a `tokenizers` backend; `end_token` ends a document."""

    def __init__(self, backend: Backend, end_token: str = END) -> None:
        self._backend = backend
        end = backend.token_to_id(end_token)
        if end is None:
            raise DataError(
                DataReason.VOCABULARY,
                f"The tokenizer has no {end_token[:64]} token.",
                "Name the token that ends a document as eos_token in tokenizer_config.json.",
            )
        self.end: int = end
        self._end_token = end_token
        self.is_bytes = backend.get_vocab_size() == MIN_VOCABULARY and (end, end_token) == (256, END)

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return int(self._backend.get_vocab_size())

    @cached_property
    def json(self) -> bytes:
        """The content of `tokenizer.json`."""
        return self._backend.to_str().encode()

    @property
    def name(self) -> str:
        """What a manifest's `tokenizer` says: `bytes`, or the hex address of `tokenizer.json`."""
        return "bytes" if self.is_bytes else address_of(self.json).hex()

    def encode(self, texts: Sequence[str]) -> Tokens:
        """Return the ids of all texts in one stream, each followed by the end token."""
        pieces: list[npt.ArrayLike] = []
        end = [self.end]
        for ids in self.ids(texts):
            pieces.extend((ids, end))
        return np.concatenate([np.asarray(piece, dtype=np.int32) for piece in pieces] or [np.empty(0, np.int32)])

    def ids(self, texts: Sequence[str]) -> Iterable[npt.ArrayLike]:
        """Return the ids of each text, without end tokens."""
        if self.is_bytes:
            return (np.frombuffer(text.encode(errors="replace"), np.uint8) for text in texts)
        batch = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return (encoding.ids for encoding in batch)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids."""
        return str(self._backend.decode(list(ids)))

    def files(self, context: int) -> dict[str, bytes]:
        """Return the files, by name, that `AutoTokenizer.from_pretrained` needs beside a model."""
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self._end_token,
            "clean_up_tokenization_spaces": False,
            "model_max_length": context,
        }
        return dict(zip(FILES, (self.json, json.dumps(settings, indent=2).encode()), strict=True))


def byte_tokenizer() -> Tokenizer:
    """Return the tokenizer whose ids 0 … 255 are bytes and 256 is the end of a document."""
    letters = {letter: byte for byte, letter in enumerate(_byte_letters())}
    return _with_end(Backend(models.BPE(vocab=letters, merges=[])))


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Return byte-level BPE of exactly `vocabulary` ids at most, trained on the first 2 MB of `texts`."""
    if vocabulary < MIN_VOCABULARY:
        raise DataError(
            DataReason.VOCABULARY,
            f"A vocabulary of {vocabulary} cannot hold all bytes.",
            f"Use a model with a vocabulary of at least {MIN_VOCABULARY}.",
        )
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer: Any = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(_first(texts, MAX_TRAINING_BYTES), trainer)
    return _with_end(backend)


def load_tokenizer(data: bytes, end_token: str = END) -> Tokenizer:
    """Return the tokenizer of a `tokenizer.json`; raise `DataError`."""
    try:
        backend = Backend.from_str(data.decode())
    except Exception as error:  # noqa: BLE001  the library raises bare Exception for every malformed file
        raise DataError(DataReason.UNREADABLE, f"The tokenizer cannot be read: {str(error)[:200]}.") from None
    return Tokenizer(backend, end_token)


def open_tokenizer(folder: Path) -> Tokenizer:
    """Return the tokenizer of a model folder; raise `DataError`."""
    try:
        return load_tokenizer((folder / FILES[0]).read_bytes(), _end_token(folder / FILES[1]))
    except OSError as error:
        raise DataError(DataReason.UNREADABLE, f"The tokenizer of {folder} cannot be read: {error.strerror}.") from None


def tokenizer_for(folder: Path | None, vocabulary: int, texts: Iterable[str]) -> Tokenizer:
    """Return the tokenizer of a model folder; else bytes for a small vocabulary, or one trained on `texts`."""
    if folder is not None:
        return open_tokenizer(folder)
    return byte_tokenizer() if vocabulary <= _SMALL_VOCABULARY else train_tokenizer(texts, vocabulary)


def _end_token(settings: Path) -> str:
    """Return the `eos_token` of a tokenizer_config.json, text or an object with its content; by default ours."""
    try:
        token = json.loads(settings.read_text()).get("eos_token")
    except FileNotFoundError:
        return END
    except (ValueError, AttributeError, RecursionError):
        raise DataError(DataReason.UNREADABLE, f"{settings} is not a tokenizer's settings.") from None
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else END


def _with_end(backend: Backend) -> Tokenizer:
    backend.add_special_tokens([AddedToken(END, special=True)])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend)


def _byte_letters() -> list[str]:
    """Return GPT-2's printable stand-in of each byte, in the order of bytes (Radford et al. 2019)."""
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    spare = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


def _first(texts: Iterable[str], limit: int) -> Iterable[str]:
    for text in texts:
        yield text[:limit]
        limit -= len(text)
        if limit <= 0:
            return
