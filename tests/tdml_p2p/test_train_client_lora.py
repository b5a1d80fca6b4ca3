"""Adapters trained over real sockets: the base is fetched and audited, the folder is one that peft opens."""

import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from train_kit import MODEL, Client, settings, swarm
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from chain.queries import open_reader
from tdml_p2p.config import TrainConfig
from tdml_p2p.errors import USAGE, UserError
from tdml_p2p.swarm.preparation import Prepared, prepare
from trainer.base_weights import stage_base
from trainer.checkpoint import Checkpoint, resume, save, whole_tensors
from trainer.errors import CheckpointError
from trainer.generate import generate
from trainer.local import train_locally, whole
from trainer.stage import build_stage
from trainer.state import StageState, initial_state
from trainer.tokens import byte_tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # in peft
    pytest.mark.filterwarnings("ignore:Exporting aten:UserWarning"),
]

torch.set_num_threads(1)
_LEARNED = {"vocab_size": 257, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
_DROPS = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)


def write_base(folder: Path, family: str = "llama") -> Path:
    """Write a model with weights and a tokenizer, as people have them to adapt."""
    torch.manual_seed(4)
    plain = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    if family == "gpt2":
        GPT2LMHeadModel(GPT2Config(**_LEARNED, **_DROPS, **plain)).save_pretrained(folder)
    else:
        LlamaForCausalLM(LlamaConfig(**MODEL, **plain)).save_pretrained(folder)
    for name, data in byte_tokenizer().files(32).items():
        (folder / name).write_bytes(data)
    return folder


def adapting(folder: Path, **changes: Any) -> TrainConfig:
    """Return the settings of a run that trains adapters."""
    model = changes.pop("model", None) or write_base(folder / "base")
    return settings(folder, **{"model": str(model), "lora": 4, "steps": 4, **changes})


def logits_of(prepared: Prepared, states: tuple[StageState, ...], tokens: torch.Tensor) -> torch.Tensor:
    """Return what the trained stages make of tokens."""
    x = tokens
    assert prepared.frozen is not None
    for index, state in enumerate(states):
        stage = build_stage(prepared.manifest, index)
        stage.load_base(stage_base(prepared.frozen.base, prepared.manifest, index))
        stage.load(state.weights)
        x = stage.logits(x)
    return x


def opens_with_peft(train: TrainConfig, prepared: Prepared) -> None:
    """The out folder is peft's: same logits as the stages, text, and nothing of a whole model."""
    saved = resume(train.out)
    tokens = torch.arange(20, dtype=torch.int32).view(2, 10)
    expected = logits_of(prepared, saved.states, tokens)
    model = AutoPeftModelForCausalLM.from_pretrained(train.out)
    assert isinstance(model, PeftModel)
    with torch.no_grad():
        found = model(tokens.long()).logits
        plain = model.get_base_model()
        with model.disable_adapter():
            unadapted = plain(tokens.long()).logits
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    assert float((unadapted - expected).norm() / expected.norm()) > 1e-4
    tokenizer = AutoTokenizer.from_pretrained(train.out)
    inputs = tokenizer("line 7", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=256)
    text = tokenizer.decode(output[0], skip_special_tokens=True)
    assert generate(train.out, "line 7", 5, temperature=0) == text
    assert not {"config.json", "model.safetensors"} & {file.name for file in train.out.iterdir()}
    card = (train.out / "README.md").read_text()
    assert "library_name: peft" in card
    assert "adapters of rank 4" in card


@pytest.mark.trio
@pytest.mark.slow
async def test_adapters_trained_by_a_swarm_open_with_peft(tmp_path: Path) -> None:
    train = adapting(tmp_path, audit_rate=1.0)
    weights = (tmp_path / "base" / "model.safetensors").read_bytes()
    prepared = prepare(train)
    assert prepared.frozen is not None
    addresses = [place.address for place in prepared.frozen.base.places]
    async with swarm(tmp_path) as (founder, *workers):
        served: set[tuple[bytes, ...]] = set()

        def look(_: Client, event: dict[str, Any]) -> None:
            if event["event"] == "step":
                services = [worker.swarm for worker in workers if worker.swarm is not None]
                served.update(tuple(a for a in addresses if service._local_blob(a)) for service in services)

        client = Client(train, founder.invite, look)
        assert await client.run() == 0
        assert served == {tuple(addresses[:2]), tuple(addresses[2:])}  # each worker its own stage's
        assert client.of("evicted") == []
        assert client.of("step", "faults")[-1] == 0
        assert all(worker.network.blobs.bytes_fetched > 0 for worker in workers)
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == weights
    with closing(open_reader(train.out / "chain.db").store) as store:
        ended = [event.kind for _, event in store.events(1, 1 << 40, ["passed", "disputed"])]
    assert ended
    assert set(ended) == {"passed"}
    uncut = whole(prepared.manifest)
    alone = train_locally(uncut, prepared.batches, train.steps, base=prepared.frozen.base)
    expected = whole_tensors(uncut, (alone,))
    saved = resume(train.out)
    for name, tensor in whole_tensors(saved.manifest, saved.states).items():
        assert float((tensor - expected[name]).norm() / expected[name].norm()) < 1e-5
    opens_with_peft(train, prepared)


def saved_run(train: TrainConfig, steps: int = 2) -> Prepared:
    """Save a run in the middle and return it."""
    prepared = prepare(train)
    assert prepared.frozen is not None
    fresh = [initial_state(prepared.manifest, index) for index in range(prepared.manifest.stages)]
    states = tuple(StageState(steps, state.weights + 0.01, state.m, state.v) for state in fresh)
    of_data = {"data": prepared.batches.data, "tokens": prepared.batches.tokens}
    folder = str(prepared.frozen.folder)
    save(Checkpoint(prepared.manifest, states, prepared.tokenizer, base=folder, **of_data), train.out)
    return prepared


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_is_saved_is_what_peft_opens(family: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", family)
    train = adapting(tmp_path, model=str(base), lora_targets=("all-linear",), lora_alpha=8)
    opens_with_peft(train, saved_run(train))
    config = json.loads((train.out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert config["fan_in_fan_out"] == (family == "gpt2")


def test_a_run_goes_on_on_its_base_only(tmp_path: Path) -> None:
    train = adapting(tmp_path)
    prepared = saved_run(train)
    with pytest.raises(UserError, match="holds adapters, not a model"):
        prepare(replace(train, model=str(train.out), out=tmp_path / "other"))
    resumed = prepare(replace(train, resume=True, model="llama-tiny", lora=None))
    assert resumed.frozen is not None
    assert prepared.frozen is not None
    assert resumed.frozen.base.addresses == prepared.frozen.base.addresses
    assert resumed.over_rest_of(resume(train.out)).frozen is resumed.frozen
    moved = tmp_path / "moved"
    (tmp_path / "base").rename(moved)
    with pytest.raises(UserError, match="base that the adapters were trained on is not there"):
        prepare(replace(train, resume=True))
    assert prepare(replace(train, resume=True, model=str(moved))).frozen is not None
    tensors = load_file(moved / "model.safetensors")
    tensors["model.norm.weight"][3] += 1e-6
    save_file(tensors, moved / "model.safetensors")
    with pytest.raises(UserError, match="not the one that the adapters were trained on") as caught:
        prepare(replace(train, resume=True, model=str(moved)))
    assert (caught.value.exit_code, "--model" in caught.value.hint) == (USAGE, True)


@pytest.mark.parametrize(
    ("changes", "said", "hint"),
    [
        ({"lora": 0}, "rank is 0", "docs/training.md"),
        ({"lora_targets": ("query",)}, "llama family has no 'query'", "q_proj"),
        ({"lora": None, "lora_targets": ("q_proj",)}, "no rank", "--lora RANK"),
        ({"lora": None, "lora_alpha": 4}, "no rank", "--lora RANK"),
        ({"lora_alpha": -1}, "alpha is -1", "docs/training.md"),
        ({"lora_dropout": 1.0}, "dropout", "docs/training.md"),
        ({"private": True, "stages": 1}, "in a private run", "--private"),
        ({"model": "llama-tiny"}, "this one has none", "--model"),
        ({"model": "config.json"}, "this one has none", "--model"),
    ],
)
def test_adapters_that_cannot_be_trained_are_refused(
    changes: dict[str, Any], said: str, hint: str, tmp_path: Path
) -> None:
    train = adapting(tmp_path)
    if changes.get("model") == "config.json":
        changes = {"model": str(tmp_path / "base" / "config.json")}
    with pytest.raises(UserError, match=said) as caught:
        prepare(replace(train, **changes))
    assert caught.value.exit_code == USAGE
    assert hint in caught.value.hint
    assert not (train.out / "state").exists()


def no_base(folder: Path) -> None:
    (folder / "base" / "config.json").unlink()


def cut_weights(folder: Path) -> None:
    file = folder / "out" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def strange_names(folder: Path) -> None:
    file = folder / "out" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name.replace("q_proj", "z_proj"): tensor for name, tensor in tensors.items()}, file)


def odd_config(folder: Path) -> None:
    file = folder / "out" / "adapter_config.json"
    config = json.loads(file.read_text())
    del config["r"]
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (no_base, "There is no model in"),
        (cut_weights, "cannot be opened"),
        (strange_names, "cannot be opened"),
        (odd_config, "cannot be opened"),
    ],
)
def test_adapters_that_cannot_be_opened_are_refused(harm: Callable[[Path], None], said: str, tmp_path: Path) -> None:
    train = adapting(tmp_path)
    saved_run(train)
    harm(tmp_path)
    with pytest.raises(CheckpointError, match=said):
        generate(train.out, "line", 2)


@pytest.mark.trio
@pytest.mark.slow
async def test_a_killed_run_of_adapters_goes_on_from_its_newest_verified_checkpoint(tmp_path: Path) -> None:
    train = adapting(tmp_path, steps=24, save_every=3)
    prepared = prepare(replace(train, out=tmp_path / "plan"))
    assert prepared.frozen is not None

    def kill(client: Client, event: dict[str, Any]) -> None:
        if event["event"] == "saved":
            client.crash()

    async with swarm(tmp_path) as (founder, *_):
        first = Client(train, founder.invite, kill)
        assert await first.run() is None
        (saved,) = first.of("saved")
        second = Client(replace(train, resume=True), founder.invite)
        assert await second.run() == 0
    assert second.of("posted", "task") != first.of("posted", "task")
    assert second.of("step")[0] == saved + 1
    alone = train_locally(prepared.manifest, prepared.batches, 24, base=prepared.frozen.base)
    expected = whole_tensors(whole(prepared.manifest), (alone,))
    checkpoint = resume(train.out)
    for name, tensor in whole_tensors(checkpoint.manifest, checkpoint.states).items():
        assert float((tensor - expected[name]).norm() / expected[name].norm()) < 1e-5
