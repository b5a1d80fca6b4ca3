import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from trainer import documents, token_file
from trainer.documents import Corpus, Piece
from trainer.errors import DataError, DataReason
from trainer.token_file import data_hash, tokenized
from trainer.tokens import byte_tokenizer, train_tokenizer

TEXTS = ["one\n", "two é", "three"]


def texts_of(path: Path, **more: Any) -> list[str]:
    return list(Corpus((path,), **more).texts())


def refusal_of(path: Path, **more: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        texts_of(path, **more)
    assert caught.value.sentence.endswith(".")
    assert caught.value.hint
    return caught.value


def save_data_set(folder: Path, texts: list[str], column: str = "text") -> None:
    """Write what `Dataset.save_to_disk` writes: arrow streams and a state.json that lists them."""
    folder.mkdir(parents=True)
    names = [f"data-{part:05d}-of-00002.arrow" for part in range(2)]
    for name, part in zip(names, (texts[:2], texts[2:]), strict=True):
        table = pyarrow.table({"id": list(range(len(part))), column: part})
        with pyarrow.OSFile(str(folder / name), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "f", "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")


def written(folder: Path, kind: str) -> Path:
    """Write TEXTS in one of the formats and return its path."""
    path = folder / kind
    if kind == "data.jsonl":
        path.write_text("\n\n".join(json.dumps({"text": text, "id": 1}) for text in TEXTS))
    elif kind == "data.parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": [*TEXTS, None], "id": [1, 2, 3, 4]}), path)
    elif kind == "set":
        save_data_set(path, TEXTS)
    else:
        save_data_set(path / "train", TEXTS)
        save_data_set(path / "test", ["other", "texts"])
        (path / "dataset_dict.json").write_text('{"splits": ["test", "train"]}')
    return path


FORMATS = ["data.jsonl", "data.parquet", "set", "dict"]


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same_documents_and_the_same_hash(kind: str, tmp_path: Path) -> None:
    corpus = Corpus((written(tmp_path, kind),))
    assert list(corpus.pieces()) == [Piece(text, is_end=True) for text in TEXTS]
    assert data_hash(corpus.pieces()) == data_hash(Piece(text, is_end=True) for text in TEXTS)
    assert data_hash(corpus.pieces()) != data_hash([Piece("".join(TEXTS), is_end=True)])


def test_another_field_can_hold_the_text(tmp_path: Path) -> None:
    lines, table, folder = tmp_path / "a.jsonl", tmp_path / "a.parquet", tmp_path / "set"
    lines.write_text('{"body": "words"}')
    pyarrow.parquet.write_table(pyarrow.table({"body": pyarrow.array(["words"], pyarrow.large_string())}), table)
    save_data_set(folder, ["words"], "body")
    for path in (lines, table, folder):
        assert texts_of(path, field="body") == ["words"]
        said = refusal_of(path)
        assert said.reason in (DataReason.FIELD, DataReason.UNREADABLE)
        assert "--text-field" in said.hint


def test_a_folder_is_read_in_an_order_of_its_own_and_other_files_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for number in range(6):
        (tmp_path / "deep" / f"{number}.txt").write_text(f"text {number}")
    (tmp_path / "picture.bin").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / ".hidden").write_text("secret")
    texts = texts_of(tmp_path)
    assert sorted(texts) == [f"text {number}" for number in range(6)]
    assert texts == texts_of(tmp_path)
    assert texts_of(tmp_path, limit=12) == texts[:2]


@pytest.mark.parametrize("newlines", [True, False])
def test_a_long_file_comes_in_pieces_that_its_content_alone_fixes(
    newlines: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "_PIECE_BYTES", 64)
    file = tmp_path / "long.txt"
    drawn = random.Random(5)
    file.write_text("".join(drawn.choice("aé€😀" + "\n" * newlines) for _ in range(900)), newline="")
    pieces = list(Corpus((file,)).pieces())
    assert "".join(piece.text for piece in pieces) == file.read_bytes().decode()
    assert [piece.is_end for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert max(len(piece.text.encode()) for piece in pieces) <= 128
    if newlines:
        assert all(piece.text.endswith("\n") for piece in pieces[:-1])
    part = list(Corpus((file,), limit=200).pieces())
    assert part[:-1] == pieces[: len(part) - 1]
    assert part[-1].is_end
    assert 197 <= sum(len(piece.text.encode()) for piece in part) <= 200


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, DataReason.MISSING),
        (b"", DataReason.EMPTY),
        (b"  \n", DataReason.EMPTY),
        (b"a\0b", DataReason.NOT_TEXT),
        (b"caf\xe9 au lait", DataReason.NOT_TEXT),
        (b"line\n" * 300_000 + b"\xff", DataReason.NOT_TEXT),
    ],
)
def test_text_that_cannot_be_used_is_refused_by_name(content: bytes | None, reason: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "data.txt").write_bytes(content)
    assert refusal_of(tmp_path / "data.txt").reason == reason


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
@pytest.mark.parametrize("content", [b"nonsense", b'{"text": 5}', b"PAR1", b"[" * 100_000])
def test_damaged_records_are_refused_by_name(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert refusal_of(tmp_path / name).reason == DataReason.UNREADABLE


def test_damaged_data_sets_and_columns_of_numbers_are_refused_by_name(tmp_path: Path) -> None:
    folder = written(tmp_path, "set")
    next(folder.glob("*.arrow")).write_bytes(b"nonsense")
    assert refusal_of(folder).reason == DataReason.UNREADABLE
    (folder / "state.json").write_text("{}")
    assert refusal_of(folder).reason == DataReason.UNREADABLE
    assert refusal_of(written(tmp_path, "data.parquet"), field="id").reason == DataReason.FIELD


def test_tokens_are_cached_by_content_and_mapped(tmp_path: Path) -> None:
    corpus, cache = Corpus((written(tmp_path, "data.jsonl"),)), tmp_path / "cache"
    for tokenizer in (byte_tokenizer(), train_tokenizer(TEXTS * 50, 300)):
        found = tokenized(corpus, tokenizer, cache)
        assert found.ids.tolist() == tokenizer.encode(TEXTS).tolist()
        assert found.ids.dtype == np.uint16
        assert isinstance(found.ids, np.memmap)
        assert found.highest == max(found.ids)
        assert tokenized(corpus, tokenizer).ids.tolist() == found.ids.tolist()
    files = {file: file.stat().st_mtime_ns for file in cache.iterdir()}
    tokenized(corpus, byte_tokenizer(), cache)
    assert {file: file.stat().st_mtime_ns for file in cache.iterdir()} == files
    assert sorted(file.suffix for file in files) == [".json", ".json", ".tokens", ".tokens"]


def test_a_token_file_that_was_tampered_with_is_made_again(tmp_path: Path) -> None:
    corpus, cache = Corpus((written(tmp_path, "data.jsonl"),)), tmp_path / "cache"
    wanted = tokenized(corpus, byte_tokenizer(), cache).ids.tolist()
    (file,) = cache.glob("*.tokens")
    for damage in (file.read_bytes()[:-2], b"\1" + file.read_bytes()[1:]):
        file.write_bytes(damage)
        assert tokenized(corpus, byte_tokenizer(), cache).ids.tolist() == wanted


def test_a_document_in_pieces_is_one_document_and_memory_stays_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "_PIECE_BYTES", 64)
    monkeypatch.setattr(token_file, "_BATCH_BYTES", 256)
    file = tmp_path / "long.txt"
    file.write_text("".join(f"line {n}\n" for n in range(500)))
    sizes = [sum(len(p.text) for p in batch) for batch in token_file._batched(Corpus((file,)).pieces())]
    assert max(sizes) < 256 + 64
    assert sum(sizes) == file.stat().st_size
    assert tokenized(Corpus((file,)), byte_tokenizer()).ids.tolist() == [*file.read_bytes(), 256]


def test_text_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "data.txt"
    file.write_text("text")
    monkeypatch.setattr(token_file, "data_hash", lambda pieces: data_hash([Piece("other", is_end=True)]))
    with pytest.raises(DataError) as caught:
        tokenized(Corpus((file,)), byte_tokenizer(), tmp_path / "cache")
    assert caught.value.reason == DataReason.CHANGED
    assert not list((tmp_path / "cache").iterdir())


def test_a_disk_without_room_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(token_file.os, "fsync", full)
    (tmp_path / "data.txt").write_text("text")
    with pytest.raises(DataError) as caught:
        tokenized(Corpus((tmp_path / "data.txt",)), byte_tokenizer(), tmp_path / "cache")
    assert caught.value.reason == DataReason.DISK
    assert "full" in caught.value.sentence
    assert not list((tmp_path / "cache").iterdir())
