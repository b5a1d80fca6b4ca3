"""Every family: a cut model is the whole model of `transformers`, from scratch, saved and loaded."""

from pathlib import Path

import msgspec
import pytest
import torch
from torch.nn import functional
from training_samples import CONFIG, KEY, loaded_stages, run_cell, small_batches
from transformers import AutoConfig, AutoModelForCausalLM

from trainer.checkpoint import Checkpoint, save, whole_tensors
from trainer.errors import ManifestError, ManifestReason
from trainer.families import family_of
from trainer.families.dropout import EMBEDDING_LAYER, Masks, SeededDropout, seed_dropout
from trainer.generate import generate
from trainer.layout import StageSpec
from trainer.manifest import TaskManifest, complete
from trainer.pretrained import read_pretrained, starting_states
from trainer.stage import CellKey, execute
from trainer.state import initial_state
from trainer.tokens import byte_tokenizer

NO_DROPOUT: dict[str, int | float | bool | str] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
GPT2: dict[str, int | float | bool | str] = {
    "vocab_size": 320,
    "n_embd": 64,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 64,
    "tie_word_embeddings": False,
}
LLAMA3: dict[str, int | float | bool | str] = {
    "rope_type": "llama3",
    "rope_factor": 8.0,
    "rope_low_freq_factor": 1.0,
    "rope_high_freq_factor": 4.0,
    "rope_original_max_position_embeddings": 16,
}
MODELS: dict[str, tuple[str, dict[str, int | float | bool | str]]] = {
    "llama": ("llama", CONFIG),
    "llama biases": ("llama", {**CONFIG, "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}),
    "llama rope": ("llama", {**CONFIG, **LLAMA3, "head_dim": 32}),
    "llama linear rope": ("llama", {**CONFIG, "rope_type": "linear", "rope_factor": 2.0}),
    "qwen2": ("qwen2", CONFIG),
    "gpt2": ("gpt2", {**GPT2, **NO_DROPOUT}),
    "gpt2 scaled": ("gpt2", {**GPT2, **NO_DROPOUT, "scale_attn_by_inverse_layer_idx": True, "n_inner": 96}),
    "gpt2 dropout": ("gpt2", {**GPT2, "attn_pdrop": 0.2}),
    "qwen2 dropout": ("qwen2", {**CONFIG, "attention_dropout": 0.3}),
}
TIED = {"gpt2": {**GPT2, **NO_DROPOUT, "tie_word_embeddings": True}, "qwen2": {**CONFIG, "tie_word_embeddings": True}}


def manifest_of(family: str, config: dict[str, int | float | bool | str], stages: int = 1) -> TaskManifest:
    return complete(TaskManifest(family, dict(config), seed=7, stages=stages, batch=2, microbatches=2, sequence=16))


def whole_model(manifest: TaskManifest, cell: CellKey = KEY) -> torch.nn.Module:
    """The uncut model of `transformers`, its dropout drawing the masks of `cell`."""
    family = family_of(manifest.family)
    config = AutoConfig.for_model(**family.whole_config(manifest.config))
    is_dropped = any(manifest.config.get(key) for key in ("attention_dropout", "attn_pdrop"))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="tdml_seeded" if is_dropped else "sdpa")
    masks = Masks(manifest.seed, (cell.step, cell.cell))
    body = model.get_decoder()
    for index, layer in enumerate(body.h if manifest.family == "gpt2" else body.layers):
        seed_dropout(layer, masks, index)
    if manifest.family == "gpt2":
        body.drop = SeededDropout(body.drop.p, masks, EMBEDDING_LAYER, "drop")
    states = [initial_state(manifest, index) for index in range(manifest.stages)]
    tied = {"lm_head.weight"} if family.tied(manifest.config) else set()
    missing, extra = model.load_state_dict(whole_tensors(manifest, states), strict=False)
    assert (set(missing), extra) == (tied, [])
    return model.train()


@pytest.mark.parametrize(("name", "stages"), [(name, stages) for name in MODELS for stages in (1, 2)])
def test_a_cut_model_has_the_whole_models_loss_and_every_gradient(name: str, stages: int) -> None:
    compare_with_whole(manifest_of(*MODELS[name], stages))


@pytest.mark.parametrize("name", TIED)
def test_a_tied_model_on_one_stage_is_the_whole_model(name: str) -> None:
    compare_with_whole(manifest_of(name, TIED[name]))


def compare_with_whole(manifest: TaskManifest) -> None:
    tokens, labels = small_batches(manifest).batch(1, 0)
    stages = loaded_stages(manifest)
    results = run_cell(stages, tokens, labels)
    model = whole_model(manifest)
    loss = functional.cross_entropy(model(input_ids=tokens.long()).logits.flatten(0, 1), labels.flatten().long())
    loss.backward()
    torch.testing.assert_close(results[-1].y.mean(), loss.detach(), rtol=1e-6, atol=0)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for stage, result in zip(stages, results, strict=True):
        for tensor, (start, stop) in zip(stage.layout.tensors, stage.layout.ranges, strict=True):
            expected = gradients.pop(tensor.name)
            gap = torch.linalg.vector_norm(result.gw[start:stop].view(tensor.shape) - expected)
            # softmax takes no notice of a key's bias: its gradient is rounding
            assert float(gap) < 1e-6 * max(float(torch.linalg.vector_norm(expected)), 1e-2), tensor.name
    assert not gradients


def test_dropout_is_drawn_anew_for_each_cell_and_the_same_when_executed_again() -> None:
    manifest = manifest_of(*MODELS["gpt2 dropout"])
    tokens, labels = small_batches(manifest).batch(1, 0)
    (stage,) = loaded_stages(manifest)
    torch.manual_seed(1)
    first = execute(stage, tokens, labels, None, CellKey(0, 3, 1))
    torch.manual_seed(2)
    again = execute(stage, tokens, labels, None, CellKey(5, 3, 1))
    assert all(torch.equal(a, b) for a, b in zip(first[:3], again[:3], strict=True))
    for other in (CellKey(0, 3, 0), CellKey(0, 4, 1)):
        assert not torch.equal(execute(stage, tokens, labels, None, other).y, first.y)
    masked = Masks(7, (3, 1)).draw(0, "attention", torch.Size((100, 100)), 0.25)
    assert masked.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert float((masked == 0).float().mean()) == pytest.approx(0.25, abs=0.02)


def test_a_resumed_run_draws_the_masks_of_its_place_in_the_whole_training() -> None:
    manifest = manifest_of(*MODELS["gpt2 dropout"])
    tokens, labels = small_batches(manifest).batch(1, 0)
    state = initial_state(manifest, 0)
    later = msgspec.structs.replace(manifest, start=10, initial=(state.root.hex(),))
    results = []
    for each, step in ((manifest, 12), (later, 2)):
        (stage,) = loaded_stages(manifest)
        stage = type(stage)(family_of("gpt2"), each, each.stage(0))
        stage.load(state.weights)
        results.append(execute(stage, tokens, labels, None, CellKey(0, step, 0)).y)
    assert torch.equal(*results)


def test_evaluation_drops_nothing() -> None:
    dropped, plain = (manifest_of("gpt2", {**GPT2, **change}) for change in ({"attn_pdrop": 0.5}, NO_DROPOUT))
    batch = small_batches(plain).batch(1, 0)
    losses = [loaded_stages(manifest)[0].evaluate(*batch) for manifest in (dropped, plain)]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["llama rope", "qwen2", "gpt2", "tied gpt2", "tied qwen2"])
def test_a_saved_model_opens_in_transformers_generates_and_can_be_trained_on_from(name: str, tmp_path: Path) -> None:
    family, config = MODELS[name] if name in MODELS else (name.split()[1], TIED[name.split()[1]])
    manifest = manifest_of(family, config, 1 if name.startswith("tied") else 2)
    states = tuple(initial_state(manifest, index) for index in range(manifest.stages))
    save(Checkpoint(manifest, states, byte_tokenizer()), tmp_path)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = whole_model(manifest).eval()
    tokens = torch.arange(12).unsqueeze(0)
    assert torch.equal(model(tokens).logits, expected(tokens).logits)
    assert generate(tmp_path, "ab", 4, temperature=0).startswith("ab")
    model.save_pretrained(tmp_path / "again")
    for file in byte_tokenizer().files(64).items():
        (tmp_path / "again" / file[0]).write_bytes(file[1])
    read = read_pretrained(tmp_path / "again")
    other = manifest_of(read.family, read.config, manifest.stages)
    assert other.config == manifest.config
    for state, start in zip(states, starting_states(read, other), strict=True):
        assert torch.equal(state.weights, start.weights)


def test_weights_named_as_the_first_gpt2_files_are_found() -> None:
    family, config = family_of("gpt2"), complete(TaskManifest("gpt2", dict(TIED["gpt2"]), sequence=16)).config
    assert family.stored_name(config, "h.0.attn.c_attn.weight") == "transformer.h.0.attn.c_attn.weight"
    assert family.stored_name(config, "h.0.attn.bias") == ""
    assert family.stored_name(config, "lm_head.weight") == ""


@pytest.mark.parametrize("name", ["llama biases", "qwen2", "gpt2"])
def test_initial_values_and_decay_are_those_that_transformers_users_expect(name: str) -> None:
    family, config = MODELS[name]
    manifest = manifest_of(family, config)
    layout = family_of(family).layout(manifest.config, StageSpec(0, 1, 0, 4))
    state = initial_state(manifest, 0)
    reference = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**family_of(family).whole_config(manifest.config))
    ).state_dict()
    for tensor, (start, stop) in zip(layout.tensors, layout.ranges, strict=True):
        values, expected = state.weights[start:stop], reference[tensor.name]
        assert tensor.is_decayed == (len(tensor.shape) == 2)
        assert float(values.mean()) == pytest.approx(float(expected.mean()), abs=2e-3)
        assert float(values.std()) == pytest.approx(float(expected.std()), rel=0.15, abs=1e-9), tensor.name


@pytest.mark.parametrize(
    ("family", "change", "reason"),
    [
        ("gpt2", {"n_head": 5}, ManifestReason.BAD_CONFIG),
        ("gpt2", {"resid_pdrop": 1.0}, ManifestReason.BAD_CONFIG),
        ("gpt2", {"rope_theta": 1e4}, ManifestReason.BAD_CONFIG),
        ("gpt2", {"hidden_size": 64}, ManifestReason.UNKNOWN_SETTING),
        ("llama", {"rope_type": "dynamic", "rope_factor": 2.0}, ManifestReason.BAD_CONFIG),
        ("llama", {"rope_type": "llama3"}, ManifestReason.BAD_CONFIG),
        ("llama", {"rope_factor": 2.0}, ManifestReason.UNKNOWN_SETTING),
        ("qwen2", {"attention_bias": True}, ManifestReason.UNKNOWN_SETTING),
    ],
)
def test_what_cannot_be_done_exactly_is_refused(
    family: str, change: dict[str, int | float | bool | str], reason: ManifestReason
) -> None:
    with pytest.raises(ManifestError) as caught:
        manifest_of(family, {**(GPT2 if family == "gpt2" else CONFIG), **change})
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("family", "found"),
    [
        ("gpt2", {"reorder_and_upcast_attn": True}),
        ("gpt2", {"add_cross_attention": True}),
        ("qwen2", {"use_sliding_window": True}),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}),
    ],
)
def test_a_config_of_another_computation_is_refused(family: str, found: dict[str, object]) -> None:
    with pytest.raises(ManifestError) as caught:
        family_of(family).read(found)
    assert caught.value.reason == ManifestReason.UNKNOWN_SETTING
