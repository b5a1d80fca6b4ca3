import numpy as np
import pytest
import torch
from training_samples import small_batches, small_manifest

from trainer.data import Batches, Corpus, load_batches, split_off, standard_library
from trainer.errors import DataError, DataReason
from trainer.token_file import TokenData
from trainer.tokens import byte_tokenizer


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
    corpus = Corpus((standard_library(),), limit=200_000)
    assert load_batches(corpus, byte_tokenizer(), small_manifest()).windows > 12_000


def test_what_validates_is_never_trained_on() -> None:
    manifest = small_manifest()
    ids = np.arange(300, dtype=np.int32)
    batches, kept = split_off(TokenData(ids, "hash", 299), 0.3, manifest)
    trained = {int(t) for n in range(batches.windows) for t in batches.batch(1 + n // 4, n % 4 // 2).labels.flatten()}
    held = [kept.batch(index) for index in range(kept.count)]
    assert kept.count == 2
    assert torch.equal(held[0].tokens.flatten(), torch.arange(210, 242, dtype=torch.int32))
    assert all(torch.equal(batch.tokens + 1, batch.labels) for batch in held)
    assert max(trained) < 210
    again = split_off(TokenData(ids, "hash", 299), 0.3, manifest)[1]
    assert torch.equal(again.batch(1).labels, kept.batch(1).labels)


@pytest.mark.parametrize(("share", "reason"), [(0.0, "bad-split"), (1.5, "bad-split"), (0.05, "data-too-short")])
def test_a_split_that_makes_no_sense_is_refused(share: float, reason: str) -> None:
    with pytest.raises(DataError) as caught:
        split_off(TokenData(np.zeros(400, np.int32), "", 0), share, small_manifest())
    assert caught.value.reason == reason
