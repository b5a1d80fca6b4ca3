"""Re-execution of a cell on another peer: inputs by signature, state by root, the result kept until revealed.

Torch is loaded, in the thread that computes, when the first cell is executed.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import trio

from chain.hashing import digest
from tdml_p2p.swarm.inputs import (
    Descriptor,
    Inputs,
    InputsRefused,
    Senders,
    Wanted,
    checked,
    decode_descriptor,
    encode,
    merge,
)
from trainer.content import address_of
from trainer.manifest import TaskManifest
from trainer.worker_ports import Compute

if TYPE_CHECKING:
    import torch

    from trainer.stage import CellResult, Stage

Buffer = bytes | memoryview
Fetch = Callable[[bytes, Sequence[str]], Awaitable[Buffer]]
"""Returns the blob of an address, from this peer or from one of the given ones; raises `Unavailable`."""
Ask = Callable[[str, bytes], Awaitable[bytes]]
"""Sends a request for inputs to a peer and returns its reply; raises `Unavailable`."""


class Unavailable(ConnectionError):
    """Material that no peer gave."""


@dataclass(frozen=True, slots=True)
class Cell:
    """The cell to re-execute: its place, the state it ran on, and the peers that may hold its material."""

    wanted: Wanted
    manifest: TaskManifest
    state: bytes
    holders: tuple[str, ...]
    senders: Senders


@dataclass(frozen=True, slots=True)
class Execution:
    """Inputs as they were signed for, and this peer's own results."""

    inputs: Inputs
    result: "CellResult"

    def sketch(self, key: bytes) -> bytes:
        """Return the 384-byte sketch of the results under `key`."""
        from trainer.sketch import cell_sketch

        return cell_sketch(self.result.y, self.result.gx, self.result.gw, key)


class Reexecutor:
    """Runs cells of any task's stages on honest stages of its own, one at a time, off the event loop."""

    def __init__(self, fetch: Fetch, ask: Ask, compute: Compute) -> None:
        self._fetch = fetch
        self._ask = ask
        self._compute = compute
        self._stages: dict[tuple[bytes, int], Stage] = {}
        self._turn = trio.Lock()

    async def run(self, cell: Cell) -> Execution:
        """Return the re-execution of `cell`; raise `Unavailable` when its material cannot be had."""
        inputs = await self._inputs(cell)
        x = await self._fetch(inputs.x.address, cell.holders)
        gy = await self._fetch(inputs.gy.address, cell.holders)
        root = await self._fetch(cell.state, cell.holders)
        try:
            address = await self._compute(partial(_weights_of, bytes(root), cell.state))
            weights = await self._fetch(address, cell.holders)
            async with self._turn:
                result = await self._compute(partial(self._execute, cell, x, gy, weights))
        except ValueError as error:  # signed for and rightly addressed, and yet nothing that a stage takes
            raise Unavailable(f"the material cannot be used: {error}") from None
        return Execution(inputs, result)

    async def fetch(self, address: bytes, holders: Sequence[str]) -> Buffer:
        """Return a blob from this peer or one of `holders`; raise `Unavailable`."""
        return await self._fetch(address, holders)

    async def _inputs(self, cell: Cell) -> Inputs:
        """Ask the worker, then its neighbours and replicas, until both inputs are known."""
        problems: list[str] = []
        parts: list[Descriptor] = []
        for peer in cell.holders:
            try:
                part = decode_descriptor(await self._ask(peer, encode(cell.wanted)))
                parts.append(checked(cell.wanted, part, cell.manifest, cell.senders))
            except (Unavailable, InputsRefused) as error:
                problems.append(f"{peer}: {error}")
            if (inputs := merge(parts)) is not None:
                return inputs
        raise Unavailable("; ".join(problems) or "nobody holds the inputs")

    def _execute(self, cell: Cell, x: Buffer, gy: Buffer, weights: Buffer) -> "CellResult":
        import torch

        from trainer.stage import build_stage, execute
        from trainer.tensors import vector_of

        manifest, place = cell.manifest, cell.wanted
        stage = self._stages.get((manifest.address, place.stage))
        if stage is None:
            stage = self._stages[manifest.address, place.stage] = build_stage(manifest, place.stage)
        stage.load(vector_of(weights, stage.layout.total))
        flat, deep = (manifest.batch, manifest.sequence), (manifest.batch, manifest.sequence, manifest.hidden)
        inputs = _tensor(x, torch.int32, flat) if stage.spec.is_first else _tensor(x, torch.float32, deep)
        if stage.spec.is_last:
            return execute(stage, inputs, _tensor(gy, torch.int32, flat), None)
        return execute(stage, inputs, None, _tensor(gy, torch.float32, deep))


def _weights_of(root: bytes, state: bytes) -> bytes:
    """Return the address of a state's weights; raise `ValueError` for what is not its manifest."""
    from trainer.state import decode_state_manifest

    return decode_state_manifest(root, state).weights


def _tensor(data: Buffer, dtype: "torch.dtype", shape: tuple[int, ...]) -> "torch.Tensor":
    """Return a fresh tensor of raw little-endian bytes; raise `Unavailable` when they are not of that shape."""
    import torch

    try:
        return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)
    except (ValueError, RuntimeError) as error:
        raise Unavailable(f"an input has the wrong size: {error}") from None


def results_of(execution: Execution) -> tuple[bytes, bytes, bytes]:
    """Return the content addresses of y, gx and gw of an execution."""
    from trainer.tensors import buffer_of

    y, gx, gw = (address_of(buffer_of(t)) for t in (execution.result.y, execution.result.gx, execution.result.gw))
    return y, gx, gw


def own_key(seed: bytes, account: bytes, audit: bytes) -> bytes:
    """Return the sketch key of `account` for `audit`, drawn with `seed`."""
    return digest("sketch key", seed, account, audit)
