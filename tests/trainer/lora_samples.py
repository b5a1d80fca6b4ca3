"""Small models with frozen weights, and manifests of adapters on them."""

from typing import Any

import msgspec
import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from trainer.adapters import LoraWish
from trainer.base_weights import StageBase, stage_base, whole_base
from trainer.families import family_of
from trainer.manifest import TaskManifest, complete
from trainer.stage import Stage, build_stage
from trainer.state import StageState

torch.set_num_threads(1)

_ROTARY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
}
_LEARNED: dict[str, Any] = {"vocab_size": 64, "n_embd": 16, "n_layer": 4, "n_head": 2, "n_positions": 32}
_DROPS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
MODELS: dict[str, tuple[type[Any], type[Any], dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, _ROTARY),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {**_ROTARY, "tie_word_embeddings": True}),
    "gpt2": (GPT2LMHeadModel, GPT2Config, _LEARNED | dict.fromkeys(_DROPS, 0.0)),
}


def pretrained(family: str) -> Any:
    """Return a model of `transformers` with weights of some size in every tensor."""
    model, config, settings = MODELS[family]
    torch.manual_seed(11)
    made = model(config(**settings, bos_token_id=None, eos_token_id=None, pad_token_id=None))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return made.eval()


def adapted(family: str, wish: LoraWish, model: Any = None, **changes: object) -> tuple[TaskManifest, StageBase]:
    """Return the manifest of adapters on a model, and the model's weights."""
    known = family_of(family)
    config = known.complete(MODELS[family][2])
    base = whole_base(family, config, (model or pretrained(family)).state_dict())
    lora = wish.settings(known, config, base.addresses)
    draft = TaskManifest(family, config, seed=5, stages=2, batch=2, microbatches=4, sequence=8, steps=4, lora=lora)
    return complete(msgspec.structs.replace(draft, **changes)), base


def stages_of(manifest: TaskManifest, base: StageBase, states: tuple[StageState, ...]) -> list[Stage]:
    """Return the stages of a manifest with frozen weights and adapters loaded."""
    stages = [build_stage(manifest, index) for index in range(manifest.stages)]
    for index, stage in enumerate(stages):
        stage.load_base(stage_base(base, manifest, index))
        stage.load(states[index].weights)
    return stages


def random_states(manifest: TaskManifest) -> tuple[StageState, ...]:
    """Return adapters that change the model's output, unlike those at the start."""
    generator = torch.Generator().manual_seed(2)
    sizes = [manifest.trained_layout(manifest.stage(index)).total for index in range(manifest.stages)]
    vectors = [torch.randn(size, generator=generator) * 0.1 for size in sizes]
    return tuple(StageState(3, vector, torch.zeros_like(vector), torch.zeros_like(vector)) for vector in vectors)


def tokens_of(length: int = 8, rows: int = 2) -> torch.Tensor:
    numbers = np.arange(rows * length)
    return torch.from_numpy((numbers * numbers % 61).astype(np.int32)).view(rows, length)


def with_peft(model: Any, manifest: TaskManifest) -> PeftModel:
    """Return a model with peft's own adapters."""
    lora = manifest.lora
    assert lora is not None
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=list(lora.targets),
        fan_in_fan_out=manifest.family == "gpt2",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)
