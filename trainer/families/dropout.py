"""Dropout whose masks follow from the task's seed, the step, the cell, the layer and the place in it.

So a mask is the same whichever peer draws it, however the model is cut, and when a cell is executed again.
"""

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from blake3 import blake3
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

ATTENTION = "tdml_seeded"
_CONTEXT = "tdml 1 dropout masks"
EMBEDDING_LAYER = 2**32 - 1


@dataclass
class Masks:
    """Source of the masks of one cell at a time; without a cell nothing is dropped."""

    seed: int
    cell: tuple[int, int] | None = field(default=None)
    """Step of the whole training and micro-batch, while the forward half of a cell runs."""

    def draw(self, layer: int, place: str, shape: torch.Size, rate: float) -> Tensor:
        """Return a mask of zeros, `rate` of them, and of 1/(1 − rate)."""
        if self.cell is None:
            raise ValueError("masks belong to a cell")
        numbers = b"".join(number.to_bytes(8, "big") for number in (self.seed, *self.cell, layer))
        name = blake3(numbers + place.encode(), derive_key_context=_CONTEXT).digest(8)
        generator = torch.Generator().manual_seed(int.from_bytes(name, "big") >> 1)
        # uniform numbers do not differ between CPU models
        kept = torch.rand(shape, generator=generator) >= rate
        return kept.to(torch.float32).mul_(1.0 / (1.0 - rate))

    def apply(self, x: Tensor, layer: int, place: str, rate: float) -> Tensor:
        """Return `x` with `rate` of its elements dropped, or unchanged without a cell."""
        return x if self.cell is None or not rate else x * self.draw(layer, place, x.shape, rate)


class SeededDropout(nn.Module):
    """Takes the place of an `nn.Dropout` of rate `p`."""

    def __init__(self, p: float, masks: Masks, layer: int, place: str) -> None:
        super().__init__()
        self.p = p
        self._masks, self._layer, self._place = masks, layer, place

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` with the cell's mask applied in training."""
        return self._masks.apply(x, self._layer, self._place, self.p) if self.training else x


def seed_dropout(module: nn.Module, masks: Masks, layer: int) -> None:
    """Let every dropout below `module`, a decoder layer or an embedding's dropout holder, use `masks`."""
    for path, owner in list(module.named_modules()):
        for name, child in list(owner.named_children()):
            if isinstance(child, nn.Dropout):
                setattr(owner, name, SeededDropout(child.p, masks, layer, f"{path}.{name}"))
        if hasattr(owner, "layer_idx") and hasattr(owner, "scaling"):
            cast(Any, owner).tdml_masks = masks


def _seeded_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Return attention (B,T,H,K) of queries (B,H,T,K), its weights dropped by the cell's mask."""
    rate, masks = float(options.pop("dropout", 0.0) or 0.0), module.tdml_masks
    if not rate or masks.cell is None:
        return cast(tuple[Tensor, None], sdpa_attention_forward(module, query, key, value, attention_mask, **options))
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * options["scaling"]
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu_(1)
    weights = scores.masked_fill(future, float("-inf")).softmax(-1)
    weights = masks.apply(weights, module.layer_idx, "attention", rate)
    return (weights @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, _seeded_attention)
