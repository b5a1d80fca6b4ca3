"""A Llama of `transformers` cut into stages, and random batches: what every rival trains; as JSON on a command line."""

import json
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True)
class Job:
    """A model by its config, decoder layers per stage, the shape of a step, and steps before and while measuring."""

    config: dict[str, Any]
    cuts: tuple[int, ...]
    batch: int
    microbatches: int
    sequence: int
    warm_up: int
    steps: int

    def encode(self) -> str:
        """Return the JSON text of the job."""
        return json.dumps(asdict(self))

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch * self.microbatches * self.sequence

    def batches(self) -> tuple[Tensor, Tensor]:
        """Return tokens and labels, int64 (microbatches × batch, sequence), the same in every process."""
        shape = (self.microbatches * self.batch, self.sequence + 1)
        drawn = torch.randint(self.config["vocab_size"], shape, generator=torch.Generator().manual_seed(0))
        return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()

    def model(self) -> LlamaForCausalLM:
        """Return the whole model."""
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**self.config, max_position_embeddings=self.sequence))

    def part(self, index: int) -> "Part":
        """Return stage `index` of the model."""
        return Part(self.model(), sum(self.cuts[:index]), self.cuts[index], index, len(self.cuts))


def decode_job(text: str) -> Job:
    """Return the job that `Job.encode` wrote."""
    values = json.loads(text)
    return Job(**{**values, "cuts": tuple(values["cuts"])})


class Part(nn.Module):
    """Embedding or not, some decoder layers, norm and head or not; the last one returns logits."""

    def __init__(self, whole: LlamaForCausalLM, first: int, held: int, index: int, count: int) -> None:
        super().__init__()
        self.embedding = whole.model.embed_tokens if index == 0 else None
        self.layers = whole.model.layers[first : first + held]
        self.rotary = whole.model.rotary_emb
        is_last = index == count - 1
        self.norm, self.head = (whole.model.norm, whole.lm_head) if is_last else (None, None)

    def forward(self, x: Tensor) -> Tensor:
        """Return hidden (B,T,D) or logits (B,T,V) of tokens (B,T) or hidden."""
        hidden: Tensor = x if self.embedding is None else self.embedding(x)
        places = self.rotary(hidden, torch.arange(hidden.shape[1]).unsqueeze(0))
        for layer in self.layers:
            hidden = layer(hidden, position_embeddings=places)
        if self.norm is None or self.head is None:
            return hidden
        logits: Tensor = self.head(self.norm(hidden))
        return logits


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy."""
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
