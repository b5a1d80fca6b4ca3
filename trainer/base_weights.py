"""Frozen weights under adapters: one flat fp32 vector for a stage, which travels in parts by content address."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from trainer.adapters import parts
from trainer.content import address_of
from trainer.errors import StageError, StageReason
from trainer.families import family_of
from trainer.families.base import Config
from trainer.families.decoder import Decoder
from trainer.layout import Layout, StageSpec
from trainer.tensors import buffer_of

if TYPE_CHECKING:
    from trainer.families.lora import AdaptedStage
    from trainer.manifest import TaskManifest


class Place(NamedTuple):
    """A part's content address and its range in the vector."""

    address: bytes
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class StageBase:
    """Frozen weights of one stage, never written to again once they are whole, and where its parts lie."""

    spec: StageSpec
    weights: Tensor
    places: tuple[Place, ...]

    def fill(self, place: Place, data: bytes | memoryview) -> None:
        """Put a part in its place; raise `StageError` if `data` is not the one that the manifest names."""
        view = memoryview(data).cast("B")
        if len(view) != 4 * (place.stop - place.start) or address_of(view) != place.address:
            raise StageError(StageReason.WRONG_STATE, "A part of the frozen weights is not the one that is named.")
        buffer_of(self.weights[place.start : place.stop])[:] = view

    def blob(self, address: bytes) -> memoryview | None:
        """Return the raw bytes of a part."""
        found = next((place for place in self.places if place.address == address), None)
        return None if found is None else buffer_of(self.weights[found.start : found.stop])

    @property
    def addresses(self) -> tuple[str, ...]:
        """The hex address of every part in order."""
        return tuple(place.address.hex() for place in self.places)


def base_layout(manifest: "TaskManifest", index: int) -> Layout:
    """Return all weights that stage `index` computes with, adapters aside."""
    return family_of(manifest.family).layout(manifest.config, manifest.stage(index))


def empty_base(manifest: "TaskManifest", index: int) -> StageBase:
    """Return the frozen weights of stage `index`, every part of which is still to be filled in."""
    assert manifest.lora is not None  # only adapters have frozen weights below
    named = [part.name for part in parts(manifest.whole_layout)]
    addresses = dict(zip(named, map(bytes.fromhex, manifest.lora.base), strict=True))
    layout = base_layout(manifest, index)
    places = tuple(Place(addresses[part.name], part.start, part.stop) for part in parts(layout))
    return StageBase(manifest.stage(index), torch.empty(layout.total, dtype=torch.float32), places)


def whole_base(family: str, config: Config, tensors: Mapping[str, Tensor]) -> StageBase:
    """Return the frozen weights of the uncut model from its state dict, cast to fp32; raise `StageError`."""
    known = family_of(family)
    spec = StageSpec(0, 1, 0, known.layers(config))
    layout = known.layout(config, spec)
    weights = filled(layout, tensors)
    named = (
        Place(address_of(buffer_of(weights[part.start : part.stop])), part.start, part.stop) for part in parts(layout)
    )
    return StageBase(spec, weights, tuple(named))


def stage_base(base: StageBase, manifest: "TaskManifest", index: int) -> StageBase:
    """Return the frozen weights of stage `index` out of those of the uncut model; raise `StageError`."""
    cut = empty_base(manifest, index)
    for place in cut.places:
        data = base.blob(place.address)
        if data is None:
            raise StageError(StageReason.WRONG_STATE, "The frozen weights are not those that the manifest names.")
        cut.fill(place, data)
    return cut


def filled(layout: Layout, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return a layout's flat fp32 vector from a state dict; raise `StageError`."""
    weights = torch.empty(layout.total, dtype=torch.float32)
    for tensor, (start, stop) in zip(layout.tensors, layout.ranges, strict=True):
        given = tensors.get(tensor.name)
        if given is None or tuple(given.shape) != tensor.shape:
            raise StageError(
                StageReason.WRONG_STATE, f"The weights have no tensor {tensor.name} of shape {tensor.shape}."
            )
        weights[start:stop].copy_(given.reshape(-1))
    return weights


def adapted_stage(manifest: "TaskManifest", spec: StageSpec, flat: Tensor) -> "AdaptedStage | None":
    """Return the module of a stage that trains adapters on views into `flat`, None where weights are trained."""
    family = family_of(manifest.family)
    if manifest.lora is None or not isinstance(family, Decoder):
        return None
    return family.build_adapted(manifest.config, spec, manifest.lora, flat)
