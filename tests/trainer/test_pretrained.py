"""Model folders to train on from: what is taken, and what is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_samples import CONFIG, small_manifest
from transformers import LlamaConfig, LlamaForCausalLM

from trainer.checkpoint import whole_tensors
from trainer.errors import ManifestError, ManifestReason, ModelError, ModelReason
from trainer.pretrained import read_pretrained, starting_states
from trainer.tokens import byte_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(2)
    LlamaForCausalLM(LlamaConfig(**CONFIG)).save_pretrained(tmp_path, max_shard_size="100KB")
    for name, data in byte_tokenizer().files(64).items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def test_a_folder_of_transformers_gives_its_weights_to_the_stages(folder: Path) -> None:
    model = read_pretrained(folder)
    assert len(model.weights) > 1
    assert (model.family, model.tokenizer) == ("llama", folder)
    manifest = small_manifest(2, config=model.config)
    assert manifest.config == small_manifest(2).config
    tensors = whole_tensors(manifest, starting_states(model, manifest))
    expected = LlamaForCausalLM.from_pretrained(folder).state_dict()
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_a_config_alone_gives_the_architecture(folder: Path) -> None:
    model = read_pretrained(folder / "config.json")
    assert (model.weights, model.tokenizer) == ((), None)
    assert small_manifest(config=model.config) == small_manifest()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}},
            ManifestReason.BAD_CONFIG,
        ),
        ({"rope_parameters": {"rope_type": "linear"}}, ManifestReason.BAD_CONFIG),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, ManifestReason.UNKNOWN_SETTING),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "beta": 1}}, ManifestReason.UNKNOWN_SETTING),
        ({"rope_parameters": 3}, ManifestReason.UNKNOWN_SETTING),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ManifestReason.UNKNOWN_SETTING),
        ({"attention_dropout": 1.0}, ManifestReason.BAD_CONFIG),
        ({"quantization_config": {"bits": 4}}, ManifestReason.UNKNOWN_SETTING),
        ({"hidden_size": [64]}, ManifestReason.BAD_CONFIG),
        ({"model_type": "mamba"}, ManifestReason.UNKNOWN_FAMILY),
    ],
)
def test_settings_that_would_make_another_model_are_refused(
    change: dict[str, object], reason: ManifestReason, folder: Path
) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ManifestError) as caught:
        small_manifest(config=read_pretrained(file).config)
    assert caught.value.reason == reason


def test_settings_of_older_configs_are_read(tmp_path: Path) -> None:
    old = {
        **CONFIG,
        "model_type": "llama",
        "rope_theta": 5e5,
        "rope_scaling": None,
        "head_dim": None,
        "pretraining_tp": 1,
    }
    (tmp_path / "config.json").write_text(json.dumps(old))
    config = small_manifest(config=read_pretrained(tmp_path).config).config
    assert (config["rope_theta"], config["head_dim"]) == (5e5, 16)


def without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def only_pickles(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


def cut(folder: Path) -> None:
    file = min(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-8])


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def odd_config(folder: Path) -> None:
    (folder / "config.json").write_text("[1]")


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (without_tokenizer, ModelReason.NO_TOKENIZER),
        (only_pickles, ModelReason.NOT_SAFETENSORS),
        (cut, ModelReason.UNREADABLE),
        (no_config, ModelReason.UNREADABLE),
        (odd_config, ModelReason.UNREADABLE),
    ],
)
def test_folders_that_cannot_be_trained_on_from_are_refused(
    harm: Callable[[Path], None], reason: ModelReason, folder: Path
) -> None:
    harm(folder)
    with pytest.raises(ModelError) as caught:
        starting_states(read_pretrained(folder), small_manifest(2))
    assert caught.value.reason == reason
    assert caught.value.hint


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("model.layers.9.mlp.up_proj.weight", torch.zeros(96, 64)),
        ("model.norm.weight", torch.ones(32)),
        ("model.norm.weight", torch.full((64,), float("nan"))),
        ("model.norm.weight", None),
    ],
)
def test_weights_that_do_not_fit_are_refused(name: str, tensor: torch.Tensor | None, folder: Path) -> None:
    tensors = {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}
    for file in folder.glob("*.safetensors"):
        file.unlink()
    tensors.pop(name, None)
    save_file(tensors if tensor is None else {**tensors, name: tensor}, folder / "model.safetensors")
    with pytest.raises(ModelError) as caught:
        starting_states(read_pretrained(folder), small_manifest(2))
    assert caught.value.reason == ModelReason.WRONG_TENSORS


def test_a_derived_tensor_of_old_checkpoints_is_passed_over(folder: Path) -> None:
    save_file({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}, folder / "old.safetensors")
    assert len(starting_states(read_pretrained(folder), small_manifest(2))) == 2
