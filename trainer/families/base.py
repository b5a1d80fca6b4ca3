"""What a model family provides: config checks, costs, the layout of a stage and its module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from trainer.layout import Layout, StageSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

Config = dict[str, int | float | bool | str]


@dataclass(frozen=True)
class Costs:
    """Relative compute per token (integers): one decoder layer, and what the two end stages add."""

    layer: int
    embedding: int
    head: int


class StageModule(Protocol):
    """The module of one stage, its parameters being views into the flat vector it was built on."""

    def __call__(self, x: Tensor, labels: Tensor | None, boundaries: list[Tensor]) -> Tensor:
        """Return hidden (B,T,D), or per-token loss (B,T) at the last stage; append each layer's output."""
        ...

    def ordered(self) -> list[nn.Parameter]:
        """Return the parameters in the order of the layout."""
        ...

    def get_submodule(self, target: str) -> nn.Module:
        """Return a part of the module by name; `layers` holds the decoder layers in order."""
        ...


class Family(Protocol):
    """One architecture, cut at decoder-layer boundaries."""

    name: str

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
        """Return the size of the vocabulary."""
        ...

    def context(self, config: Config) -> int:
        """Return the longest sequence."""
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
