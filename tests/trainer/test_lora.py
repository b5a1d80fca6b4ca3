"""Adapters on frozen weights: the arithmetic of peft, whatever the cut; the base is never touched."""

from dataclasses import replace
from typing import Any

import msgspec
import pytest
import torch
from lora_samples import MODELS, adapted, pretrained, random_states, stages_of, tokens_of, with_peft
from peft import PeftModel
from swarm_kit import Kit, batches_of, relative, trained
from training_samples import KEY, run_cell

from tests.trainer.tolerances import FP32
from trainer.adapters import ALL, LoraSettings, LoraWish
from trainer.base_weights import empty_base, stage_base
from trainer.checkpoint import whole_tensors
from trainer.compare import compare
from trainer.data import Batches
from trainer.errors import ManifestError, ManifestReason, StageError
from trainer.families.linear import FastLinear
from trainer.joint import clip_scale, squared_norm
from trainer.local import train_locally, whole
from trainer.manifest import MAX_MANIFEST_BYTES, TaskManifest, complete, decode_manifest, encode_manifest
from trainer.optimizer import build_optimizer
from trainer.stage import CellResult, build_stage, execute, stage_layout
from trainer.state import StageState, initial_state

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # in peft

WISH = LoraWish(4, 8, (ALL,))
FAMILIES = sorted(MODELS)


def fill(model: PeftModel, tensors: dict[str, torch.Tensor]) -> None:
    """Put adapters by the names of this project into a model of peft."""
    with torch.no_grad():
        for name, tensor in tensors.items():
            owner = name.removesuffix(".weight")
            model.get_submodule(f"base_model.model.{owner}.default").weight.copy_(tensor)


def gradients(model: PeftModel, names: list[str]) -> torch.Tensor:
    modules = [model.get_submodule(f"base_model.model.{name.removesuffix('.weight')}.default") for name in names]
    return torch.cat([module.weight.grad.flatten() for module in modules])


def peft_trained(manifest: TaskManifest, model: Any, data: Batches) -> StageState:
    """Return what a plain loop over peft's model makes of the run, its optimiser step being ours."""
    uncut = whole(manifest)
    layout, optimizer, state = stage_layout(uncut, 0), build_optimizer(uncut, 0), initial_state(uncut, 0)
    wrapped = with_peft(model, manifest)
    names = [tensor.name for tensor in layout.tensors]
    for step in range(1, manifest.steps + 1):
        fill(wrapped, whole_tensors(uncut, (state,)))
        wrapped.zero_grad()
        for cell in range(manifest.microbatches):
            batch = data.batch(step, cell)
            logits = wrapped(batch.tokens.long()).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.long().flatten())
            (loss / manifest.microbatches).backward()
        gradient = gradients(wrapped, names)
        state = optimizer.apply(state, gradient, clip_scale(manifest.optimizer.clip, [squared_norm(gradient)]))
    return state


@pytest.mark.parametrize("family", FAMILIES)
def test_stages_with_adapters_give_the_logits_of_peft(family: str) -> None:
    model = pretrained(family)
    manifest, base = adapted(family, WISH, model)
    states = random_states(manifest)
    x = tokens_of()
    plain = model(x.long()).logits.detach()
    expected = with_peft(model, manifest)
    fill(expected, whole_tensors(manifest, states))
    for stage in stages_of(manifest, base, states):
        x = stage.logits(x)
    with torch.no_grad():
        assert relative(x, expected(tokens_of().long()).logits) < 1e-5
    assert relative(x, plain) > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_start_as_those_of_peft(family: str) -> None:
    manifest, _ = adapted(family, WISH)
    tensors = whole_tensors(manifest, [initial_state(manifest, index) for index in range(2)])
    named = {
        name.removeprefix("base_model.model.").replace(".default", ""): tensor
        for name, tensor in with_peft(pretrained(family), manifest).named_parameters()
        if tensor.requires_grad
    }
    assert {name: tensor.shape for name, tensor in tensors.items()} == {n: t.shape for n, t in named.items()}
    for name, tensor in tensors.items():
        bound = tensor.shape[1] ** -0.5
        assert tensor.abs().max() <= bound * (".lora_A." in name)
        assert tensor.abs().max() >= 0.8 * bound * (".lora_A." in name)


@pytest.mark.parametrize(("family", "replicas"), [("llama", 2), ("gpt2", 1), ("qwen2", 1)])
def test_a_swarm_trains_the_adapters_that_peft_does(family: str, replicas: int) -> None:
    model = pretrained(family)
    manifest, base = adapted(family, LoraWish(4), model)
    before = base.weights.clone()
    kits = [Kit(manifest, replicas, base=base) for _ in range(2)]
    states, again = (trained(kit) for kit in kits)
    assert [state.root for state in states] == [state.root for state in again]
    assert torch.equal(base.weights.view(torch.int32), before.view(torch.int32))
    data = batches_of(manifest)
    expected = whole_tensors(whole(manifest), (peft_trained(manifest, model, data),))
    found = whole_tensors(manifest, states)
    start = whole_tensors(manifest, [initial_state(manifest, index) for index in range(2)])
    for name, tensor in found.items():
        assert relative(tensor, expected[name]) < 1e-5
        assert not torch.equal(tensor, start[name])
    alone = whole_tensors(whole(manifest), (train_locally(manifest, data, manifest.steps, base=base),))
    assert all(relative(tensor, alone[name]) < 1e-5 for name, tensor in found.items())


def test_frozen_weights_stay_and_have_no_gradient() -> None:
    manifest, base = adapted("llama", WISH)
    states = random_states(manifest)
    stages = stages_of(manifest, base, states)
    results = run_cell(stages, tokens_of(), tokens_of())
    for index, (stage, result) in enumerate(zip(stages, results, strict=True)):
        assert result.gw.shape == states[index].weights.shape
        held = stage_base(base, manifest, index).weights
        assert all(torch.equal(held[p.start : p.stop], base.weights[q.start : q.stop]) for p, q in _pairs(index))
        frozen = [p for p in stage.module.parameters() if not p.requires_grad]  # type: ignore[attr-defined]
        assert sum(p.numel() for p in frozen) == held.numel()


def _pairs(index: int) -> Any:
    manifest, base = adapted("llama", WISH)
    whole_places = {place.address: place for place in base.places}
    return [(place, whole_places[place.address]) for place in empty_base(manifest, index).places]


def test_a_frozen_layer_computes_no_gradient_of_its_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: torch.Tensor) -> torch.Tensor:
        raise AssertionError("nobody needs this gradient")

    monkeypatch.setattr("trainer.families.linear._weight_gradient", refuse)
    layer = FastLinear(8, 8, bias=False).requires_grad_(False)
    x = torch.ones(2, 8, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_cell_executed_again_is_the_same_to_the_bit_and_a_false_one_is_found(dropout: float) -> None:
    manifest, base = adapted("llama", replace(WISH, dropout=dropout))
    states = random_states(manifest)
    first, again = (stages_of(manifest, base, states) for _ in range(2))
    results = run_cell(first, tokens_of(), tokens_of())
    gy = results[1].gx
    other = execute(again[0], tokens_of(), None, gy, KEY)
    for one, two in zip(results[0][:3], other[:3], strict=True):
        assert torch.equal(one, two)
    assert not compare(other, results[0], FP32).is_fraud
    flipped = CellResult(-other.y, other.gx, other.gw, other.boundaries)
    assert compare(flipped, results[0], FP32).is_fraud
    flipped = CellResult(other.y, other.gx, -other.gw, other.boundaries)
    assert compare(flipped, results[0], FP32).is_fraud
    moved = execute(again[0], tokens_of(), None, gy, KEY._replace(cell=1))
    assert torch.equal(moved.gw, other.gw) == (not dropout)


def test_other_frozen_weights_are_refused() -> None:
    manifest, base = adapted("llama", WISH)
    cut = empty_base(manifest, 0)
    with pytest.raises(StageError, match="not the one that is named"):
        cut.fill(cut.places[0], bytes(4 * (cut.places[0].stop - cut.places[0].start)))
    with pytest.raises(StageError, match="not the one that is named"):
        cut.fill(cut.places[0], b"")
    stage = build_stage(manifest, 0)
    with pytest.raises(StageError, match="no frozen weights"):
        stage.load(initial_state(manifest, 0).weights)
    with pytest.raises(StageError, match="does not take"):
        stage.load_base(base)  # those of the uncut model
    other, _ = adapted("llama", WISH, model=_changed())
    with pytest.raises(StageError, match="not those"):
        stage_base(base, other, 0)


def _changed() -> Any:
    model = pretrained("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    return model


def test_a_manifest_names_adapters_and_base_however_the_model_is_cut() -> None:
    manifest, base = adapted("llama", WISH)
    data = encode_manifest(manifest)
    assert decode_manifest(data) == manifest
    assert len(data) < MAX_MANIFEST_BYTES
    uncut, _ = adapted("llama", WISH, stages=1)
    assert manifest.lora == uncut.lora
    assert len(base.places) == 4 + 3  # layers, embedding, norm and head
    tied, tied_base = adapted("gpt2", WISH)
    assert len(tied_base.places) == 4 + 3  # layers, embedding, positions and norm
    assert (tied.tied, tied.parameters) == ("", tied_base.weights.numel())
    ends = [{place.address for place in empty_base(tied, index).places} for index in range(2)]
    assert len(ends[0] & ends[1]) == 1


LORA = adapted("llama", LoraWish(4))[0].lora
assert LORA is not None


@pytest.mark.parametrize(
    ("changes", "reason", "said"),
    [
        ({"rank": 0}, ManifestReason.BAD_ADAPTERS, "rank is 0"),
        ({"rank": 5000}, ManifestReason.BAD_ADAPTERS, "rank is 5000"),
        ({"alpha": 0}, ManifestReason.BAD_ADAPTERS, "alpha is 0"),
        ({"dropout": 1.0}, ManifestReason.BAD_ADAPTERS, "dropout"),
        ({"dropout": float("nan")}, ManifestReason.BAD_ADAPTERS, "dropout"),
        ({"targets": ("q_proj", "query")}, ManifestReason.UNKNOWN_TARGET, "no 'query'"),
        ({"targets": ("c_attn",)}, ManifestReason.UNKNOWN_TARGET, "no 'c_attn'"),
        ({"targets": ("proj",)}, ManifestReason.UNKNOWN_TARGET, "no 'proj'"),
        ({"targets": ()}, ManifestReason.UNKNOWN_TARGET, "need a target"),
        ({"base": LORA.base[1:]}, ManifestReason.BAD_ADDRESS, "7 64-digit"),
        ({"base": ("ab", *LORA.base[1:])}, ManifestReason.BAD_ADDRESS, "7 64-digit"),
    ],
)
def test_wrong_adapters_are_refused_by_name(changes: dict[str, Any], reason: ManifestReason, said: str) -> None:
    manifest, _ = adapted("llama", LoraWish(4))
    settings: LoraSettings = msgspec.structs.replace(LORA, **changes)
    with pytest.raises(ManifestError, match=said) as caught:
        complete(msgspec.structs.replace(manifest, lora=settings))
    assert caught.value.reason == reason
    if reason is ManifestReason.UNKNOWN_TARGET:
        assert "q_proj" in caught.value.hint
    with pytest.raises(ManifestError):
        decode_manifest(encode_manifest(msgspec.structs.replace(manifest, lora=settings)))


def test_targets_have_one_order() -> None:
    manifest, _ = adapted("llama", LoraWish(4, targets=("v_proj,q_proj", "q_proj")))
    assert manifest.lora is not None
    assert manifest.lora.targets == ("q_proj", "v_proj")
    assert manifest == adapted("llama", LoraWish(4))[0]
    swapped = msgspec.structs.replace(manifest.lora, targets=("v_proj", "q_proj"))
    with pytest.raises(ManifestError) as caught:
        decode_manifest(encode_manifest(msgspec.structs.replace(manifest, lora=swapped)))
    assert caught.value.reason == ManifestReason.NOT_CANONICAL


def test_a_stage_that_keeps_no_activations_computes_the_same_bits() -> None:
    manifest, base = adapted("qwen2", replace(WISH, dropout=0.2))
    states = random_states(manifest)
    kept = stages_of(manifest, base, states)
    spare = build_stage(manifest, 0, recompute=True)
    spare.load_base(stage_base(base, manifest, 0))
    spare.load(states[0].weights)
    expected = run_cell(kept, tokens_of(), tokens_of())
    found = run_cell([spare, kept[1]], tokens_of(), tokens_of())
    for one, two in zip(expected, found, strict=True):
        assert torch.equal(one.gw, two.gw)
        assert one.gw.any()
