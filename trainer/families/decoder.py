"""What all decoder families share: an embedding, equal layers, a final norm and a head, tied or not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from trainer.errors import ManifestReason
from trainer.families.base import Config, Costs, StageModule
from trainer.families.settings import chance, choice, is_idle, plain, rate, refuse, size, switch
from trainer.layout import Layout, Shape, StageSpec, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.adapters import LoraSettings
    from trainer.families.lora import AdaptedStage

# what elementwise work costs, in multiply-adds of a matrix product: fitted to measured stages of four shapes
_SOFTMAX_COST = 48  # per vocabulary entry: softmax, loss and their gradients
_ELEMENT_COST = 400  # per hidden element of a layer: norms, positions, activation, residuals
_ATTENTION_COST = 7  # per position and query element


@dataclass(frozen=True)
class Names:
    """Names of a family's tensors in the whole model, without `.weight` and `.bias`."""

    prefix: str
    embedding: str
    layer: str
    norm: str
    head: str = "lm_head"
    positions: str = ""


@dataclass(frozen=True)
class Settings:
    """The settings that a family's config has: defaults, and the bounds of each kind."""

    defaults: Config
    sizes: Mapping[str, int]
    rates: Mapping[str, tuple[float, float]]
    chances: tuple[str, ...]
    switches: tuple[str, ...]
    choices: Mapping[str, tuple[str, ...]]
    neutral: Mapping[str, object]
    """Settings of a `config.json` that are taken at this value only."""

    def check(self, config: Config) -> Config:
        """Return the checked settings, in a config that has them all; raise `ManifestError`."""
        checked: Config = {key: size(key, config.get(key), bound) for key, bound in self.sizes.items()}
        checked |= {key: rate(key, config.get(key), *bounds) for key, bounds in self.rates.items()}
        checked |= {key: chance(key, config.get(key)) for key in self.chances}
        checked |= {key: switch(key, config.get(key)) for key in self.switches}
        checked |= {key: choice(key, config.get(key), known) for key, known in self.choices.items()}
        return checked

    def knows(self, key: str) -> bool:
        """Whether a config can have this setting."""
        named = (self.sizes, self.rates, self.chances, self.switches, self.choices)
        return any(key in part for part in named)


class Decoder:
    """Base of the decoder families; each gives its settings, its names and the tensors of a layer."""

    name: str
    kind: Literal["text", "images"] = "text"
    architecture: ClassVar[str]
    settings: ClassVar[Settings]
    names: ClassVar[Names]
    usual_targets: ClassVar[tuple[str, ...]]
    """Where peft puts adapters of this family unless told otherwise."""
    is_transposed: ClassVar[bool] = False
    """Whether matrices are stored (in, out)."""
    derived: ClassVar[tuple[str, ...]] = ()
    """Endings of tensors that old checkpoints hold though they follow from the config."""

    # what each family says of itself

    def fill(self, config: Config) -> Config:
        """Return a config with the settings that follow from others; raise `ManifestError`."""
        return config

    def layer(self, config: Config, index: int) -> tuple[TensorSpec, ...]:
        """Return the tensors of one decoder layer."""
        raise NotImplementedError

    def final_norm(self, config: Config) -> tuple[TensorSpec, ...]:
        """Return the tensors of the norm before the head."""
        return (ones(f"{self.names.norm}.weight", self.hidden(config)),)

    def layers(self, config: Config) -> int:
        """Return the number of decoder layers."""
        return int(config["num_hidden_layers"])

    def hidden(self, config: Config) -> int:
        """Return the width of the hidden activations."""
        return int(config["hidden_size"])

    def context(self, config: Config) -> int:
        """Return the longest sequence."""
        return int(config["max_position_embeddings"])

    def attention_width(self, config: Config) -> int:
        """Return the elements of all heads' queries."""
        return self.hidden(config)

    # what they share

    def vocabulary(self, config: Config) -> int:
        """Return the size of the vocabulary."""
        return int(config["vocab_size"])

    def example(self, config: Config, size: int) -> Shape:
        """Return the shape of the tokens of one sequence."""
        return (size,)

    def boundary(self, config: Config, size: int, layers: int) -> Shape:
        """Return the shape (T, D) of one sequence between any two layers."""
        return size, self.hidden(config)

    def normalised(self, config: Config, size: int) -> int:
        """Return 1: a decoder has no statistics over its batch."""
        return 1

    def complete(self, config: Config) -> Config:
        """Return `config` checked and complete; raise `ManifestError`."""
        unknown = sorted(key for key in config if not self.settings.knows(key) and not key.startswith("rope_"))
        if unknown:
            raise refuse(f"The model setting {unknown[0][:64]!r} is not known.", ManifestReason.UNKNOWN_SETTING)
        return self.fill({**self.settings.defaults, **config})

    def read(self, found: Mapping[str, object]) -> Config:
        """Return the settings in a `config.json`; raise `ManifestError` for one that would change the model."""
        neutral, config = self.settings.neutral, Config()
        for key, value in found.items():
            if self.settings.knows(key) or key == "rope_theta":
                if value is not None:
                    config[key] = plain(key, value)
            elif key in neutral:
                if value != neutral[key]:
                    raise refuse(f"The model's {key} must be {neutral[key]!r}.", ManifestReason.UNKNOWN_SETTING)
            elif not is_idle(key):
                config |= self.read_other(key, value, found)
        return config

    def read_other(self, key: str, value: object, found: Mapping[str, object]) -> Config:
        """Return what a setting of another form says; raise `ManifestError` for an unknown one."""
        raise refuse(f"The model setting {key[:64]!r} is not known.", ManifestReason.UNKNOWN_SETTING)

    def stored_name(self, config: Config, name: str) -> str:
        """Return the name in the model of a tensor in a weights file; empty for one that the model derives."""
        if name.endswith(self.derived) or (name == f"{self.names.head}.weight" and self.is_tied(config)):
            return ""
        is_bare = not name.startswith((f"{self.names.prefix}.", f"{self.names.head}."))
        return f"{self.names.prefix}.{name}" if is_bare else name

    def is_tied(self, config: Config) -> bool:
        """Whether embedding and head are one tensor."""
        return bool(config["tie_word_embeddings"])

    def tied(self, config: Config) -> str:
        """Return the name of the tensor that both end stages hold, empty if there is none."""
        return f"{self.names.embedding}.weight" if self.is_tied(config) else ""

    def costs(self, config: Config, sequence: int) -> Costs:
        """Return multiply-adds per token, elementwise work counted at its measured equivalent."""
        hidden = self.hidden(config)
        matmul = sum(tensor.size for tensor in self.layer(config, 0) if len(tensor.shape) == 2)
        head = self.vocabulary(config) * (hidden + _SOFTMAX_COST)
        layer = matmul + _ATTENTION_COST * sequence * self.attention_width(config) + _ELEMENT_COST * hidden
        return Costs(layer, 2 * hidden, head)

    def projections(self, config: Config) -> dict[str, tuple[int, int]]:
        """Return widths of input and output of a layer's matrices by the path of their module in the layer."""
        widths: dict[str, tuple[int, int]] = {}
        for tensor in self.layer(config, 0):
            if len(tensor.shape) == 2:
                rows, columns = tensor.shape
                path = tensor.name.removeprefix(f"{self.names.layer}.0.").removesuffix(".weight")
                widths[path] = (rows, columns) if self.is_transposed else (columns, rows)
        return widths

    def layout(self, config: Config, spec: StageSpec) -> Layout:
        """Return the parameters of one stage under their names in the whole model."""
        names, hidden, deviation = self.names, self.hidden(config), float(config["initializer_range"])
        table = (self.vocabulary(config), hidden)
        embedding = TensorSpec(f"{names.embedding}.weight", table, True, deviation)
        tensors: list[TensorSpec] = []
        if spec.is_first:
            tensors.append(embedding)
            if names.positions:
                shape = (self.context(config), hidden)
                tensors.append(TensorSpec(f"{names.positions}.weight", shape, True, deviation))
        for index in range(spec.first, spec.last):
            tensors.extend(self.layer(config, index))
        if spec.is_last:
            tensors.extend(self.final_norm(config))
            if not self.is_tied(config):
                tensors.append(TensorSpec(f"{names.head}.weight", table, True, deviation))
            elif not spec.is_first:
                tensors.append(embedding)
        return Layout(tuple(tensors))

    def build(self, config: Config, spec: StageSpec, flat: Tensor) -> StageModule:
        """Return the stage's module on views into `flat`."""
        from trainer.families.modules import build

        return build(self.name, self.whole_config(config), spec, self.paths(config, spec), flat)

    def build_adapted(self, config: Config, spec: StageSpec, lora: LoraSettings, flat: Tensor) -> AdaptedStage:
        """Return the stage's module with adapters on views into `flat`, its frozen weights still to be loaded."""
        from trainer.families.lora import build

        return build(self, config, spec, lora, flat)

    def paths(self, config: Config, spec: StageSpec) -> dict[str, TensorSpec]:
        """Return the stage's tensors in the order of its layout, by their place in its module."""
        names = self.names
        places = {names.embedding: "embed_tokens", names.norm: "norm", names.head: "head", names.positions: "places"}
        paths: dict[str, TensorSpec] = {}
        for tensor in self.layout(config, spec).tensors:
            owner, _, leaf = tensor.name.rpartition(".")
            place = places.get(owner) or f"layers{owner.removeprefix(names.layer)}"
            if owner == names.embedding and not spec.is_first:
                place = "head"
            paths[f"{place}.{leaf}"] = tensor
        return paths

    def whole_config(self, config: Config) -> dict[str, object]:
        """Return the content of `config.json`, read by the family's class in `transformers`."""
        return {
            "architectures": [self.architecture],
            "model_type": self.name,
            "dtype": "float32",
            "use_cache": True,
            # a run's tokenizer decides; the defaults of transformers may lie outside the vocabulary
            **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
            **config,
        }


def ones(name: str, width: int) -> TensorSpec:
    """Return a norm's factor: all ones at first, not decayed."""
    return TensorSpec(name, (width,), False, 0.0)


def zeros(name: str, width: int) -> TensorSpec:
    """Return a bias: all zeros at first, not decayed."""
    return TensorSpec(name, (width,), False, 0.0, 0.0)
