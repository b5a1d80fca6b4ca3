"""One stage of a Llama made of `transformers`' own layers, its parameters being views of a flat vector.

Shapes: B sequences, T tokens, D hidden width, V vocabulary.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

from trainer.families.linear import accelerate
from trainer.layout import Layout, StageSpec


class LlamaStage(nn.Module):
    """Embedding (first stage), decoder layers `first … last − 1`, final norm and head (last stage)."""

    def __init__(self, config: LlamaConfig, spec: StageSpec) -> None:
        super().__init__()
        self._spec = spec
        self._rotary = LlamaRotaryEmbedding(config)
        self._positions: dict[int, tuple[Tensor, Tensor]] = {}
        with torch.device("meta"):
            if spec.is_first:
                self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
            self.layers = nn.ModuleDict(
                {str(index): LlamaDecoderLayer(config, index) for index in range(spec.first, spec.last)}
            )
            if spec.is_last:
                self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
                self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            accelerate(self)

    def bind(self, layout: Layout, flat: Tensor) -> None:
        """Make every parameter a view into `flat`."""
        for tensor, (start, stop) in zip(layout.tensors, layout.ranges, strict=True):
            owner, _, leaf = tensor.name.removeprefix("model.").rpartition(".")
            view = nn.Parameter(flat[start:stop].view(tensor.shape))
            setattr(self.get_submodule(owner), leaf, view)
        self._ordered = [self.get_parameter(tensor.name.removeprefix("model.")) for tensor in layout.tensors]

    def ordered(self) -> list[nn.Parameter]:
        """Return the parameters in the order of the layout."""
        return self._ordered

    def forward(self, x: Tensor, labels: Tensor | None, boundaries: list[Tensor]) -> Tensor:
        """Return hidden (B,T,D), or per-token loss (B,T) at the last stage."""
        hidden_BTD = self.embed_tokens(x) if self._spec.is_first else x
        positions = self._rotation(hidden_BTD)
        for layer in self.layers.values():
            hidden_BTD = layer(hidden_BTD, position_embeddings=positions)
            boundaries.append(hidden_BTD.detach())
        if not self._spec.is_last:
            return cast(Tensor, hidden_BTD)
        logits_BTV = self.lm_head(self.norm(hidden_BTD))
        if labels is None:
            return cast(Tensor, logits_BTV)
        flat = functional.cross_entropy(logits_BTV.flatten(0, 1), labels.flatten(), reduction="none")
        return flat.view(labels.shape)

    def _rotation(self, hidden_BTD: Tensor) -> tuple[Tensor, Tensor]:
        length = hidden_BTD.shape[1]
        if length not in self._positions:
            self._positions[length] = self._rotary(hidden_BTD, torch.arange(length).unsqueeze(0))
        return self._positions[length]


def build(whole: dict[str, object], spec: StageSpec, layout: Layout, flat: Tensor) -> LlamaStage:
    """Return one stage of the model that `whole` (a `config.json`) describes, on views into `flat`."""
    config = LlamaConfig(**cast(dict[str, Any], {**whole, "attn_implementation": "sdpa"}))
    stage = LlamaStage(config, spec)
    stage.bind(layout, flat)
    return stage
