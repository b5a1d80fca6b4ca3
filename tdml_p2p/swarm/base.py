"""Frozen weights under adapters, fetched once a stage, shared by work and audits, and served to others."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import trio

from tdml_p2p.swarm.material import Fetch, Unavailable
from trainer.errors import StageError
from trainer.layout import StageSpec
from trainer.manifest import TaskManifest
from trainer.worker_ports import Compute

if TYPE_CHECKING:
    from trainer.base_weights import StageBase


class BaseShelf:
    """The frozen weights that some stage of this peer computes with; those that none does are forgotten."""

    def __init__(self, fetch: Fetch, compute: Compute) -> None:
        self._fetch = fetch
        self._compute = compute
        self._held: WeakValueDictionary[tuple[tuple[str, ...], StageSpec], StageBase] = WeakValueDictionary()
        self._turn = trio.Lock()

    async def get(self, manifest: TaskManifest, stage: int, holders: Sequence[str]) -> "StageBase":
        """Return a stage's frozen weights, every part checked by its hash; raise `Unavailable`."""
        assert manifest.lora is not None  # nothing is frozen without adapters
        name = (manifest.lora.base, manifest.stage(stage))
        async with self._turn:
            held = self._held.get(name)
            if held is None:
                held = await self._fetched(manifest, stage, holders)
                self._held[name] = held
            return held

    def blob(self, address: bytes) -> memoryview | None:
        """Return a part by content address."""
        found = (base.blob(address) for base in list(self._held.values()))
        return next((data for data in found if data is not None), None)

    async def _fetched(self, manifest: TaskManifest, stage: int, holders: Sequence[str]) -> "StageBase":
        base = await self._compute(partial(_empty, manifest, stage))
        for place in base.places:
            data = await self._fetch(place.address, holders)
            try:
                await self._compute(partial(base.fill, place, data))
            except StageError as error:
                raise Unavailable(str(error)) from None
        return base


def _empty(manifest: TaskManifest, stage: int) -> "StageBase":
    from trainer.base_weights import empty_base  # with torch, in the thread that computes

    return empty_base(manifest, stage)
