"""What a model family provides: config checks, costs, the layout of a stage and its module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from trainer.layout import Layout, Shape, StageSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

    from trainer.families.dropout import Masks

Config = dict[str, int | float | bool | str]


@dataclass(frozen=True)
class Costs:
    """Relative compute per token or image (integers): a layer, and what the two end stages add.

    `each` has the layers' own where they are not equal; `layer` is their mean then.
    """

    layer: int
    embedding: int
    head: int
    each: tuple[int, ...] = ()

    def of(self, first: int, last: int) -> int:
        """Return what the layers `first <= i < last` cost."""
        return sum(self.each[first:last]) if self.each else (last - first) * self.layer


class StageModule(Protocol):
    """The module of one stage, its parameters being views into the flat vector it was built on."""

    def __call__(self, x: Tensor, labels: Tensor | None, boundaries: list[Tensor]) -> Tensor:
        """Return hidden (B,T,D), or per-token loss (B,T) at the last stage; append each layer's output."""
        ...

    def ordered(self) -> list[nn.Parameter]:
        """Return the parameters in the order of the layout, without running statistics."""
        ...

    def additions(self) -> list[Tensor]:
        """Return what the cell that ran last adds to the running statistics, in the order of the layout."""
        ...

    masks: Masks
    training: bool

    def train(self, mode: bool = True) -> object:
        """Make the module behave as in training, or as when it is used."""
        ...

    def get_submodule(self, target: str) -> nn.Module:
        """Return a part of the module by name; `layers` holds the decoder layers in order."""
        ...


class Family(Protocol):
    """One architecture, cut between its layers; `kind` is what it is trained on."""

    name: str
    kind: Literal["text", "images"]

    def read(self, found: Mapping[str, object]) -> Config:
        """Return the settings in a Hugging Face `config.json`; raise `ManifestError` for what is not supported."""
        ...

    def complete(self, config: Config) -> Config:
        """Return `config` checked and with every default filled in; raise `ManifestError`."""
        ...

    def layers(self, config: Config) -> int:
        """Return the number of decoder layers of a complete config."""
        ...

    def hidden(self, config: Config) -> int:
        """Return the width D of the hidden activations."""
        ...

    def vocabulary(self, config: Config) -> int:
        """Return the size of the vocabulary, or the number of classes."""
        ...

    def example(self, config: Config, size: int) -> Shape:
        """Return the shape of one example: tokens (T), or pixels (C,H,W)."""
        ...

    def boundary(self, config: Config, size: int, layers: int) -> Shape:
        """Return the shape of what one example is after so many layers: (T,D) or (C,H,W)."""
        ...

    def normalised(self, config: Config, size: int) -> int:
        """Return over how many positions of one example its statistics are taken at least; 1 without any."""
        ...

    def context(self, config: Config) -> int:
        """Return the longest sequence."""
        ...

    def tied(self, config: Config) -> str:
        """Return the name of the tensor that both end stages hold, empty if there is none."""
        ...

    def stored_name(self, config: Config, name: str) -> str:
        """Return the name in the model of a tensor in a weights file; empty for one that the model derives."""
        ...

    def costs(self, config: Config, sequence: int) -> Costs:
        """Return relative compute per token at a sequence length."""
        ...

    def layout(self, config: Config, spec: StageSpec) -> Layout:
        """Return the parameters of one stage under their names in the whole model."""
        ...

    def build(self, config: Config, spec: StageSpec, flat: Tensor) -> StageModule:
        """Return the module of one stage on views into `flat` (fp32, `layout.total` elements)."""
        ...

    def whole_config(self, config: Config) -> dict[str, object]:
        """Return the content of the Hugging Face `config.json` of the whole model."""
        ...
