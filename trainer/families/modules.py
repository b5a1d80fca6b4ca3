"""One stage of a decoder made of `transformers`' own layers, its parameters being views of a flat vector.

Shapes: B sequences, T tokens, D hidden width, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GPT2Config, LlamaConfig, PreTrainedConfig, Qwen2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2Block
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RMSNorm, Qwen2RotaryEmbedding

from trainer.families.dropout import ATTENTION, EMBEDDING_LAYER, Masks, SeededDropout, seed_dropout
from trainer.families.linear import accelerate
from trainer.layout import StageSpec, TensorSpec


@dataclass(frozen=True)
class Parts:
    """What `transformers` makes a family of."""

    config: type[PreTrainedConfig]
    layer: Callable[[Any, int], nn.Module]
    norm: Callable[[Any], nn.Module]
    rotary: Callable[[Any], nn.Module] | None


_PARTS = {
    "llama": Parts(
        LlamaConfig,
        LlamaDecoderLayer,
        lambda config: LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps),
        LlamaRotaryEmbedding,
    ),
    "qwen2": Parts(
        Qwen2Config,
        Qwen2DecoderLayer,
        lambda config: Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps),
        Qwen2RotaryEmbedding,
    ),
    "gpt2": Parts(
        GPT2Config,
        GPT2Block,
        lambda config: nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon),
        None,
    ),
}


class DecoderStage(nn.Module):
    """Embedding (first stage), decoder layers `first … last − 1`, final norm and head (last stage)."""

    def __init__(self, parts: Parts, config: Any, spec: StageSpec) -> None:
        super().__init__()
        self.masks = Masks(0)
        self._spec = spec
        self._rotary = None if parts.rotary is None else parts.rotary(config)
        self._rotations: dict[int, tuple[Tensor, Tensor]] = {}
        with torch.device("meta"):
            if spec.is_first:
                self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
                if parts.rotary is None:
                    self.places = nn.Embedding(config.max_position_embeddings, config.hidden_size)
                self.dropout = SeededDropout(
                    float(getattr(config, "embd_pdrop", 0.0)), self.masks, EMBEDDING_LAYER, "drop"
                )
            self.layers = nn.ModuleDict(
                {str(index): parts.layer(config, index) for index in range(spec.first, spec.last)}
            )
            if spec.is_last:
                self.norm = parts.norm(config)
                self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            accelerate(self)
        for index, layer in self.layers.items():
            seed_dropout(layer, self.masks, int(index))

    def bind(self, paths: dict[str, TensorSpec], flat: Tensor) -> None:
        """Make every parameter a view into `flat`."""
        self._ordered = place(self, paths, flat)
        self.tie(paths)

    def tie(self, paths: dict[str, TensorSpec]) -> None:
        """Let the head be the embedding where a stage holds both as one."""
        if self._spec.is_last and "head.weight" not in paths:
            self.head.weight = self.embed_tokens.weight

    def ordered(self) -> list[nn.Parameter]:
        """Return the parameters in the order of the layout."""
        return self._ordered

    def additions(self) -> list[Tensor]:
        """Return nothing: a decoder has no running statistics."""
        return []

    def forward(self, x: Tensor, labels: Tensor | None, boundaries: list[Tensor]) -> Tensor:
        """Return hidden (B,T,D), or per-token loss (B,T) at the last stage."""
        hidden_BTD = self._embedded(x) if self._spec.is_first else x
        options = {} if self._rotary is None else {"position_embeddings": self._rotation(hidden_BTD)}
        for layer in self.layers.values():
            hidden_BTD = layer(hidden_BTD, **options)
            boundaries.append(hidden_BTD.detach())
        if not self._spec.is_last:
            return cast(Tensor, hidden_BTD)
        logits_BTV = self.head(self.norm(hidden_BTD))
        if labels is None:
            return cast(Tensor, logits_BTV)
        flat = functional.cross_entropy(logits_BTV.flatten(0, 1), labels.flatten(), reduction="none")
        return flat.view(labels.shape)

    def _embedded(self, x: Tensor) -> Tensor:
        hidden_BTD = self.embed_tokens(x)
        if self._rotary is None:
            hidden_BTD = hidden_BTD + self.places(torch.arange(x.shape[1]).unsqueeze(0))
        return cast(Tensor, self.dropout(hidden_BTD))

    def _rotation(self, hidden_BTD: Tensor) -> tuple[Tensor, Tensor]:
        length = hidden_BTD.shape[1]
        if length not in self._rotations:
            positions = torch.arange(length).unsqueeze(0)
            self._rotations[length] = cast(Any, self._rotary)(hidden_BTD, positions)
        return self._rotations[length]


def place(module: nn.Module, paths: dict[str, TensorSpec], flat: Tensor, is_trained: bool = True) -> list[nn.Parameter]:
    """Make the parameters of `module` at `paths` views into `flat`, one after another, and return them."""
    start = 0
    for path, tensor in paths.items():
        owner, _, leaf = path.rpartition(".")
        view = nn.Parameter(flat[start : start + tensor.size].view(tensor.shape), is_trained)
        setattr(module.get_submodule(owner), leaf, view)
        start += tensor.size
    return [module.get_parameter(path) for path in paths]


def build(
    name: str, whole: dict[str, object], spec: StageSpec, paths: dict[str, TensorSpec], flat: Tensor
) -> DecoderStage:
    """Return one stage of the model of family `name` that `whole` (a `config.json`) describes, on views into `flat`."""
    stage = DecoderStage(*parts_of(name, whole), spec)
    stage.bind(paths, flat)
    return stage


def parts_of(name: str, whole: dict[str, object]) -> tuple[Parts, Any]:
    """Return what `transformers` makes a family of, and its config object."""
    parts = _PARTS[name]
    is_dropped = bool(whole.get("attention_dropout") or whole.get("attn_pdrop"))
    attention = ATTENTION if is_dropped else "sdpa"
    return parts, parts.config(**cast(dict[str, Any], {**whole, "attn_implementation": attention}))
