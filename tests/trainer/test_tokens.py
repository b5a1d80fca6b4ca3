import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

from trainer.errors import DataError, DataReason
from trainer.tokens import byte_tokenizer, load_tokenizer, open_tokenizer, train_tokenizer

TEXTS = ["def step(self):\n    return self.step + 1\n" * 20, "héllo wörld, naïve café\n" * 20]


@given(st.text(max_size=60))
def test_bytes_are_their_own_ids_and_come_back(text: str) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode([text]).tolist()
    assert ids == [*text.encode(), 256]
    assert tokenizer.decode(ids[:-1]) == text


def test_trained_tokens_come_back_and_are_the_same_each_time() -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    assert tokenizer.vocabulary == 300
    assert tokenizer.json == train_tokenizer(TEXTS, 300).json
    ids = tokenizer.encode(TEXTS).tolist()
    assert len(ids) < sum(len(text) for text in TEXTS)
    assert tokenizer.decode([token for token in ids if token != tokenizer.end]) == "".join(TEXTS)
    assert ids.count(tokenizer.end) == 2
    assert load_tokenizer(tokenizer.json).name == tokenizer.name
    assert len(tokenizer.name) == 64


@pytest.mark.parametrize("kind", ["bytes", "trained"])
def test_transformers_opens_the_folder(kind: str, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer() if kind == "bytes" else train_tokenizer(TEXTS, 300)
    for name, data in tokenizer.files(64).items():
        (tmp_path / name).write_bytes(data)
    opened = AutoTokenizer.from_pretrained(tmp_path)
    text = "self.step + café"
    assert opened(text)["input_ids"] == tokenizer.encode([text]).tolist()[:-1]
    assert opened.decode(opened(text)["input_ids"]) == text
    assert opened.eos_token_id == tokenizer.end
    assert open_tokenizer(tmp_path).name == tokenizer.name


def test_bad_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        train_tokenizer(TEXTS, 256)
    assert caught.value.reason == DataReason.VOCABULARY
    with pytest.raises(DataError) as caught:
        load_tokenizer(b"{}")
    assert caught.value.reason == DataReason.UNREADABLE
    with pytest.raises(DataError):
        open_tokenizer(tmp_path)


@pytest.mark.parametrize("eos_token", ["</s>", {"content": "</s>", "special": True}])
def test_a_folder_names_the_token_that_ends_a_document(eos_token: object, tmp_path: Path) -> None:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "word": 2}, unk_token="<unk>"))
    (tmp_path / "tokenizer.json").write_text(backend.to_str())
    with pytest.raises(DataError, match="endoftext"):
        open_tokenizer(tmp_path)
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps({"eos_token": eos_token}))
    tokenizer = open_tokenizer(tmp_path)
    assert (tokenizer.end, tokenizer.is_bytes) == (1, False)
    assert tokenizer.encode(["word", "word"]).tolist() == [2, 1, 2, 1]
    for name, data in tokenizer.files(16).items():
        (tmp_path / name).write_bytes(data)
    assert open_tokenizer(tmp_path).name == tokenizer.name
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token == "</s>"
    settings.write_text("[")
    with pytest.raises(DataError, match="settings"):
        open_tokenizer(tmp_path)
