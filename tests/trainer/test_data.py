import json
from pathlib import Path

import numpy as np
import pytest
import torch
from training_samples import small_batches, small_manifest

from trainer.data import Batches, load_batches, read_corpus, standard_library
from trainer.errors import DataError, DataReason
from trainer.tokens import byte_tokenizer


def reason_of(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_corpus(path)
    assert caught.value.sentence.endswith(".")
    return caught.value.reason


def test_a_folder_is_read_in_an_order_of_its_own_and_other_files_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for number in range(6):
        (tmp_path / "deep" / f"{number}.txt").write_text(f"text {number}")
    (tmp_path / "picture.bin").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / ".hidden").write_text("secret")
    corpus = read_corpus(tmp_path)
    assert sorted(corpus.texts) == [f"text {number}" for number in range(6)]
    assert corpus == read_corpus(tmp_path)
    assert corpus.bytes == 36
    part = read_corpus(tmp_path, max_bytes=12)
    assert part.texts == corpus.texts[:2]


def test_json_lines(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in ("one", "two")))
    assert read_corpus(file).texts == ("one", "two")
    file.write_text('{"text": 5}')
    assert reason_of(file) == DataReason.UNREADABLE
    file.write_text("nonsense")
    assert reason_of(file) == DataReason.UNREADABLE


def test_data_that_cannot_be_used_is_refused_by_name(tmp_path: Path) -> None:
    assert reason_of(tmp_path / "absent") == DataReason.MISSING
    assert reason_of(tmp_path) == DataReason.EMPTY
    (tmp_path / "blank.txt").write_text("  \n")
    assert reason_of(tmp_path / "blank.txt") == DataReason.EMPTY
    (tmp_path / "binary").write_bytes(b"a\0b")
    assert reason_of(tmp_path / "binary") == DataReason.NOT_TEXT
    (tmp_path / "latin").write_bytes(b"caf\xe9 au lait")
    assert reason_of(tmp_path / "latin") == DataReason.NOT_TEXT


def test_too_little_text_and_too_small_a_vocabulary_are_refused() -> None:
    manifest = small_manifest()
    with pytest.raises(DataError) as caught:
        Batches(np.zeros(16, np.int32), manifest)
    assert caught.value.reason == DataReason.TOO_SHORT
    with pytest.raises(DataError) as caught:
        Batches(np.full(100, 320, np.int32), manifest)
    assert caught.value.reason == DataReason.VOCABULARY


def test_batches_are_next_token_pairs_that_cover_an_epoch_once() -> None:
    manifest = small_manifest(microbatches=3)
    data = Batches(np.arange(12 * 16 + 1, dtype=np.int32), manifest)
    assert data.windows == 12
    seen: list[int] = []
    for step in (1, 2):
        for microbatch in range(3):
            tokens, labels = data.batch(step, microbatch)
            assert tokens.shape == labels.shape == (2, 16)
            assert tokens.dtype == labels.dtype == torch.int32
            assert torch.equal(tokens + 1, labels)
            seen.extend((tokens[:, 0] // 16).tolist())
    assert seen == [6, 4, 10, 1, 7, 9, 2, 11, 8, 5, 3, 0]
    assert not torch.equal(data.batch(1, 0).tokens, data.batch(3, 0).tokens)


def test_any_step_can_be_resumed_and_the_seed_decides() -> None:
    manifest = small_manifest()
    one, other = small_batches(manifest), small_batches(manifest)
    for step in range(1, 60):
        one.batch(step, 0)
    assert torch.equal(one.batch(60, 1).tokens, other.batch(60, 1).tokens)
    reseeded = small_batches(small_manifest(seed=8))
    assert not torch.equal(reseeded.batch(60, 1).tokens, other.batch(60, 1).tokens)
    for wrong in ((0, 0), (1, 2), (1, -1)):
        with pytest.raises(IndexError):
            one.batch(*wrong)


def test_the_standard_library_is_a_corpus() -> None:
    corpus = read_corpus(standard_library(), max_bytes=200_000)
    assert 200_000 <= corpus.bytes < 210_000
    assert load_batches(corpus, byte_tokenizer(), small_manifest()).windows > 12_000
