"""Low-rank adapters (Hu et al. 2021) on frozen weights: their settings in a manifest, targets and layout.

Beside a target's weight W, whose input has the width I and whose output O, stand A (rank, I) and B (O, rank): the
target's output is x·W + x·Aᵀ·Bᵀ·alpha/rank. Names are those of peft without its prefix.
"""

from dataclasses import dataclass
from math import sqrt
from typing import Annotated

import msgspec
from msgspec import Meta

from trainer.errors import ManifestError, ManifestReason
from trainer.families.base import Config, Family
from trainer.families.decoder import Decoder
from trainer.layout import Layout, StageSpec, TensorSpec

MAX_RANK = 4096
MAX_ALPHA = 1 << 20
ALL = "all-linear"
"""Stands for every target in what a user gives, as in peft; a manifest names them."""

_Text = Annotated[str, Meta(max_length=64)]


class LoraSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Adapters of every module whose path ends in one of `targets`, as peft matches them, on frozen weights.

    `base` has the hex content address of every part of the frozen weights, in the order of `parts` over the uncut
    model, so that it is the same however the model is cut. `dropout` is that of the adapters' inputs.
    """

    rank: Annotated[int, Meta(ge=0, le=2**31)]
    alpha: Annotated[int, Meta(ge=0, le=2**31)]
    targets: Annotated[tuple[_Text, ...], Meta(max_length=64)]
    base: Annotated[tuple[_Text, ...], Meta(max_length=2048)]
    dropout: float = 0.0

    @property
    def scaling(self) -> float:
        """What an adapter's output is multiplied by."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class Part:
    """Tensors that travel as one blob, a decoder layer or one of the model's ends: their range in a flat vector."""

    name: str
    start: int
    stop: int


def parts(layout: Layout) -> tuple[Part, ...]:
    """Return the parts of a layout of whole weights in its order."""
    found: list[Part] = []
    for tensor, (start, stop) in zip(layout.tensors, layout.ranges, strict=True):
        name = _part_of(tensor.name)
        if found and found[-1].name == name:
            found[-1] = Part(name, found[-1].start, stop)
        else:
            found.append(Part(name, start, stop))
    return tuple(found)


@dataclass(frozen=True)
class LoraWish:
    """Adapters as a user asks for them: alpha 0 is the rank, no targets are those that are usual in peft."""

    rank: int
    alpha: int = 0
    targets: tuple[str, ...] = ()
    dropout: float = 0.0

    def settings(self, family: Family, config: Config, base: tuple[str, ...]) -> LoraSettings:
        """Return the settings on a base; raise `ManifestError` for a family without adapters."""
        decoder = _decoder(family)
        named = [name for given in self.targets for name in given.split(",") if name]
        if named == [ALL]:
            named = [path.rpartition(".")[2] for path in decoder.projections(config)]
        return LoraSettings(
            self.rank, self.alpha or self.rank, tuple(named or decoder.usual_targets), base, self.dropout
        )


def checked_lora(lora: LoraSettings, family: Family, config: Config) -> LoraSettings:
    """Return the settings in their one canonical form; raise `ManifestError`."""
    decoder = _decoder(family)
    for name, value, bound in (("rank", lora.rank, MAX_RANK), ("alpha", lora.alpha, MAX_ALPHA)):
        if not 1 <= value <= bound:
            raise _refuse(f"The adapters' {name} is {value}; it must be from 1 to {bound}.")
    if not 0 <= lora.dropout < 1:
        raise _refuse(f"The adapters' dropout is {lora.dropout}; it must be from 0 to below 1.")
    modules = decoder.projections(config)
    unknown = [target for target in lora.targets if not any(_matches(path, target) for path in modules)]
    if unknown or not lora.targets:
        known = sorted({name for path in modules for name in (path, path.rpartition(".")[2])})
        raise ManifestError(
            ManifestReason.UNKNOWN_TARGET,
            f"The {family.name} family has no {unknown[0]!r} that adapters could stand at."
            if unknown
            else "Adapters need a target.",
            f"Targets: {', '.join(known)}, or {ALL}.",
        )
    wanted = len(parts(decoder.layout(config, StageSpec(0, 1, 0, decoder.layers(config)))))
    if len(lora.base) != wanted or not all(map(_is_address, lora.base)):
        raise ManifestError(
            ManifestReason.BAD_ADDRESS, f"The frozen weights must be {wanted} 64-digit hexadecimal addresses."
        )
    return msgspec.structs.replace(lora, targets=tuple(sorted(set(lora.targets))))


def adapted_modules(lora: LoraSettings, family: Family, config: Config) -> dict[str, tuple[int, int]]:
    """Return widths of input and output of each adapted module by its path in a decoder layer, in the layer's order."""
    modules = _decoder(family).projections(config)
    return {path: widths for path, widths in modules.items() if any(_matches(path, name) for name in lora.targets)}


def adapter_layout(lora: LoraSettings, family: Family, config: Config, spec: StageSpec) -> Layout:
    """Return the adapters of one stage: A drawn as peft does, uniform up to 1/√I, and B zero."""
    prefix, rank = _decoder(family).names.layer, lora.rank
    tensors: list[TensorSpec] = []
    for index in range(spec.first, spec.last):
        for path, (width, out) in adapted_modules(lora, family, config).items():
            name = f"{prefix}.{index}.{path}"
            tensors.append(TensorSpec(f"{name}.lora_A.weight", (rank, width), True, 1 / sqrt(3 * width)))
            tensors.append(TensorSpec(f"{name}.lora_B.weight", (out, rank), True, 0.0, 0.0))
    return Layout(tuple(tensors))


def _decoder(family: Family) -> Decoder:
    if not isinstance(family, Decoder):
        raise _refuse(f"The {family.name} family takes no adapters.")
    return family


def _matches(path: str, target: str) -> bool:
    return path == target or path.endswith(f".{target}")


def _part_of(name: str) -> str:
    """Return what a tensor belongs to: its decoder layer, or the module that it is a parameter of."""
    words = name.split(".")
    numbers = [place for place, word in enumerate(words) if word.isdecimal()]
    return ".".join(words[: numbers[0] + 1] if numbers else words[:-1])


def _is_address(text: str) -> bool:
    return len(text) == 64 and all(letter in "0123456789abcdef" for letter in text)


def _refuse(sentence: str) -> ManifestError:
    return ManifestError(ManifestReason.BAD_ADAPTERS, sentence, "See the section on adapters in docs/training.md.")
