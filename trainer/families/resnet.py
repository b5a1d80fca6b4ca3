"""The `resnet` family: convolutions with batch norm, cut at its blocks, and a linear head that classifies images.

A config has no lists: `depths` and `hidden_sizes` are numbers with commas. Known without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, Literal

from trainer.errors import ManifestReason
from trainer.families.base import Config, Costs, StageModule
from trainer.families.settings import ACTIVATIONS, choice, is_idle, plain, refuse, size, switch
from trainer.layout import Layout, Shape, StageSpec, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

MOMENTUM = 0.1
"""What a cell's statistics count in the running ones: torch's default, which `transformers` does not change."""
_ELEMENT_COST = 20  # batch norm and activation of one element, in multiply-adds
_REDUCTION = 4
_MOST_BLOCKS = 1024
"""As many as the decoders' layers; what is refused is looked at as well, by every peer."""
_PREFIX = "resnet.encoder.stages"
_STEM = "resnet.embedder.embedder"
_DEFAULTS: Config = {
    "num_channels": 3,
    "embedding_size": 64,
    "hidden_sizes": "256,512,1024,2048",
    "depths": "3,4,6,3",
    "layer_type": "bottleneck",
    "hidden_act": "relu",
    "downsample_in_first_stage": False,
    "downsample_in_bottleneck": False,
    "num_labels": 2,
}
_LISTS = ("hidden_sizes", "depths")
# what a config.json says of other uses than to classify, or says twice
_OTHER_USES = frozenset(("out_features", "out_indices", "stage_names", "label2id", "return_dict"))
_NEUTRAL = {"problem_type": "single_label_classification"}


@dataclass(frozen=True)
class _Convolution:
    """A convolution and its batch norm; `size` is the height and width of what it puts out."""

    name: str
    taken: int
    given: int
    kernel: int
    size: int

    @property
    def cost(self) -> int:
        """Multiply-adds for one image."""
        area = self.size * self.size
        return area * self.given * (self.taken * self.kernel * self.kernel + _ELEMENT_COST)

    def weights(self) -> tuple[TensorSpec, ...]:
        """Return what is trained; initial values as He et al. 2015, by the outputs."""
        deviation = sqrt(2.0 / (self.given * self.kernel * self.kernel))
        shape = (self.given, self.taken, self.kernel, self.kernel)
        norm = f"{self.name}.normalization"
        return (
            TensorSpec(f"{self.name}.convolution.weight", shape, True, deviation),
            TensorSpec(f"{norm}.weight", (self.given,), False, 0.0),
            TensorSpec(f"{norm}.bias", (self.given,), False, 0.0, 0.0),
        )

    def statistics(self) -> tuple[TensorSpec, ...]:
        """Return the running statistics."""
        norm, kept = f"{self.name}.normalization", 1.0 - MOMENTUM
        return (
            TensorSpec(f"{norm}.running_mean", (self.given,), False, 0.0, 0.0, kept),
            TensorSpec(f"{norm}.running_var", (self.given,), False, 0.0, 1.0, kept),
            TensorSpec(f"{norm}.num_batches_tracked", (), False, 0.0, 0.0, 1.0),
        )


class ResNet:
    """`ResNetForImageClassification`, its layers being the residual blocks."""

    name = "resnet"
    kind: Literal["text", "images"] = "images"

    def read(self, found: Mapping[str, object]) -> Config:
        """Return the settings in a `config.json`; raise `ManifestError` for what is not supported."""
        config = Config()
        for key, value in found.items():
            if key in _LISTS and isinstance(value, list):
                config[key] = ",".join(str(number) for number in value)
            elif key == "id2label" and isinstance(value, Mapping):
                config["num_labels"] = len(value)
            elif key in _DEFAULTS:
                config[key] = plain(key, value)
            elif value not in (None, _NEUTRAL.get(key)) and key not in _OTHER_USES and not is_idle(key):
                raise refuse(f"The model setting {key[:64]!r} is not known.", ManifestReason.UNKNOWN_SETTING)
        return config

    def complete(self, config: Config) -> Config:
        """Return `config` checked and with every default filled in; raise `ManifestError`."""
        unknown = sorted(key for key in config if key not in _DEFAULTS)
        if unknown:
            raise refuse(f"The model setting {unknown[0][:64]!r} is not known.", ManifestReason.UNKNOWN_SETTING)
        given = {**_DEFAULTS, **config}
        widths, depths = (_numbers(key, given[key]) for key in _LISTS)
        if sum(depths) > _MOST_BLOCKS:
            raise refuse(f"The model has {sum(depths)} blocks; at most {_MOST_BLOCKS} are taken.")
        if len(widths) != len(depths):
            raise refuse("The model's depths and hidden_sizes must be equally many numbers.")
        checked: Config = {
            "num_channels": size("num_channels", given["num_channels"], 4),
            "embedding_size": size("embedding_size", given["embedding_size"], 1 << 14),
            "hidden_sizes": ",".join(map(str, widths)),
            "depths": ",".join(map(str, depths)),
            "layer_type": choice("layer_type", given["layer_type"], ("basic", "bottleneck")),
            "hidden_act": choice("hidden_act", given["hidden_act"], ACTIVATIONS),
            "num_labels": size("num_labels", given["num_labels"], 1 << 20),
        }
        checked |= {key: switch(key, given[key]) for key in _DEFAULTS if key.startswith("downsample_")}
        if checked["layer_type"] == "bottleneck" and min(widths) < _REDUCTION:
            raise refuse(f"The model's hidden_sizes must be {_REDUCTION} or more for bottlenecks.")
        return checked

    def layers(self, config: Config) -> int:
        """Return the number of blocks."""
        return sum(_numbers("depths", config["depths"]))

    def hidden(self, config: Config) -> int:
        """Return the channels that the head takes."""
        return _numbers("hidden_sizes", config["hidden_sizes"])[-1]

    def vocabulary(self, config: Config) -> int:
        """Return the number of classes."""
        return int(config["num_labels"])

    def context(self, config: Config) -> int:
        """Return 1: an image is no sequence."""
        return 1

    def example(self, config: Config, size: int) -> Shape:
        """Return the shape (C, H, W) of one image."""
        return int(config["num_channels"]), size, size

    def boundary(self, config: Config, size: int, layers: int) -> Shape:
        """Return the shape (C, H, W) of one image after so many blocks."""
        side = _half(_half(size))  # the stem's convolution and its pooling
        if not layers:
            return int(config["embedding_size"]), side, side
        last = self._block(config, layers - 1, side)[-1]
        return last.given, last.size, last.size

    def normalised(self, config: Config, size: int) -> int:
        """Return the fewest positions of one image that a batch norm sees."""
        return self.boundary(config, size, self.layers(config))[1] ** 2

    def tied(self, config: Config) -> str:
        """Return nothing: no tensor is at both ends."""
        return ""

    def stored_name(self, config: Config, name: str) -> str:
        """Return the name in the model of a tensor in a weights file."""
        return name

    def costs(self, config: Config, size: int) -> Costs:
        """Return multiply-adds per image."""
        side = _half(_half(size))
        each = tuple(
            sum(convolution.cost for convolution in self._block(config, index, side))
            for index in range(self.layers(config))
        )
        head = self.hidden(config) * self.vocabulary(config)
        return Costs(sum(each) // len(each), self._stem(config, size).cost, head, each)

    def layout(self, config: Config, spec: StageSpec) -> Layout:
        """Return the parameters of one stage under their names in the whole model, statistics last."""
        convolutions = [self._stem(config, 1)] if spec.is_first else []
        for index in range(spec.first, spec.last):
            convolutions.extend(self._block(config, index, 1))
        trained = [tensor for convolution in convolutions for tensor in convolution.weights()]
        if spec.is_last:
            classes, width = self.vocabulary(config), self.hidden(config)
            deviation = 1.0 / sqrt(3 * width)
            trained.append(TensorSpec("classifier.1.weight", (classes, width), True, deviation))
            trained.append(TensorSpec("classifier.1.bias", (classes,), False, deviation))
        statistics = [tensor for convolution in convolutions for tensor in convolution.statistics()]
        return Layout((*trained, *statistics))

    def build(self, config: Config, spec: StageSpec, flat: Tensor) -> StageModule:
        """Return the stage's module on views into `flat`."""
        from trainer.families.resnet_modules import build

        return build(self.whole_config(config), spec, self.layout(config, spec), flat)

    def whole_config(self, config: Config) -> dict[str, object]:
        """Return the content of the Hugging Face `config.json` of the whole model."""
        names = {str(index): f"LABEL_{index}" for index in range(self.vocabulary(config))}
        return {
            "architectures": ["ResNetForImageClassification"],
            "model_type": self.name,
            "dtype": "float32",
            **{key: value for key, value in config.items() if key != "num_labels"},
            **{key: list(_numbers(key, config[key])) for key in _LISTS},
            "id2label": names,
            "label2id": {name: int(index) for index, name in names.items()},
        }

    def _stem(self, config: Config, size: int) -> _Convolution:
        return _Convolution(_STEM, int(config["num_channels"]), int(config["embedding_size"]), 7, _half(size))

    def _block(self, config: Config, index: int, side: int) -> list[_Convolution]:
        """Return the convolutions of a block in the order of its modules; `side` is what the stem puts out."""
        widths, depths = (_numbers(key, config[key]) for key in _LISTS)
        part, place = 0, index
        while place >= depths[part]:
            place, part = place - depths[part], part + 1
        strides = [2 if config["downsample_in_first_stage"] else 1, *(2 for _ in widths[1:])]
        for stride in strides[: part + bool(place)]:
            side = _half(side) if stride == 2 else side
        stride, out = (1 if place else strides[part]), widths[part]
        taken = out if place else (int(config["embedding_size"]), *widths)[part]
        name, after = f"{_PREFIX}.{part}.layers.{place}", _half(side) if stride == 2 else side
        made = [_Convolution(f"{name}.shortcut", taken, out, 1, after)] if taken != out or stride != 1 else []
        if config["layer_type"] == "basic":
            shapes = [(taken, out, 3, after), (out, out, 3, after)]
        else:
            inner, early = out // _REDUCTION, after if config["downsample_in_bottleneck"] else side
            shapes = [(taken, inner, 1, early), (inner, inner, 3, after), (inner, out, 1, after)]
        return [*made, *(_Convolution(f"{name}.layer.{number}", *shape) for number, shape in enumerate(shapes))]


def _half(length: int) -> int:
    return -(-length // 2)


def _numbers(key: str, value: object) -> tuple[int, ...]:
    """Return numbers with commas; raise `ManifestError`."""
    words = str(value).split(",")
    if not all(word.isdecimal() and len(word) < 8 and 0 < int(word) <= 1 << 14 for word in words) or len(words) > 16:
        raise refuse(f"The model's {key} must be 1 to 16 whole numbers from 1 to {1 << 14}, with commas.")
    return tuple(int(word) for word in words)


RESNET = ResNet()
