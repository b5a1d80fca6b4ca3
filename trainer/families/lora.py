"""A decoder stage whose weights are frozen, with low-rank adapters beside them that are trained."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trainer.adapters import LoraSettings, adapted_modules, adapter_layout
from trainer.families.base import Config
from trainer.families.decoder import Decoder
from trainer.families.dropout import SeededDropout
from trainer.families.linear import linear
from trainer.families.modules import DecoderStage, parts_of, place
from trainer.layout import StageSpec, TensorSpec


class AdaptedStage(DecoderStage):
    """A stage that trains its adapters only; it computes once its frozen weights are loaded."""

    frozen: dict[str, TensorSpec]
    """The frozen weights in the order of their layout, by their place in the module."""

    def adapt(self, modules: dict[str, tuple[int, int]], lora: LoraSettings) -> None:
        """Put an adapter beside each of `modules` in every layer."""
        for index, layer in self.layers.items():
            for path, (width, out) in modules.items():
                target = layer.get_submodule(path)
                with torch.device("meta"):
                    target.lora_A, target.lora_B = linear(width, lora.rank), linear(lora.rank, out)
                target.lora_dropout = SeededDropout(lora.dropout, self.masks, int(index), f"{path}.lora_dropout")
                target.register_forward_hook(_addition(lora.scaling))

    def bind(self, paths: dict[str, TensorSpec], flat: Tensor) -> None:
        """Make the adapters views into `flat`; they are the stage's parameters."""
        self._ordered = place(self, paths, flat)

    def freeze(self, base: Tensor) -> None:
        """Make every frozen weight a constant view into `base`, which has them one after another."""
        place(self, self.frozen, base, is_trained=False)
        self.tie(self.frozen)


def build(decoder: Decoder, config: Config, spec: StageSpec, lora: LoraSettings, flat: Tensor) -> AdaptedStage:
    """Return one stage with its adapters on views into `flat`, its frozen weights not there yet."""
    stage = AdaptedStage(*parts_of(decoder.name, decoder.whole_config(config)), spec)
    stage.frozen = decoder.paths(config, spec)
    stage.adapt(adapted_modules(lora, decoder, config), lora)
    tensors = adapter_layout(lora, decoder, config, spec).tensors
    stage.bind({f"layers{tensor.name.removeprefix(decoder.names.layer)}": tensor for tensor in tensors}, flat)
    return stage


def _addition(scaling: float) -> Callable[[Any, tuple[Tensor, ...], Tensor], Tensor]:
    """Return a hook that adds the adapter's share to a module's output."""

    def add(target: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + target.lora_B(target.lora_A(target.lora_dropout(inputs[0]))) * scaling

    return add
