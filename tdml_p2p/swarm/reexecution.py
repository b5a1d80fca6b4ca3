"""Re-execution of a cell on another peer: inputs by signature, state by root, the result kept until revealed.

Torch is loaded, in the thread that computes, when the first cell is executed.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import trio

from chain.hashing import digest
from chain.transactions import Claim, Opening, Trace
from chain.verdicts import Limits
from tdml_p2p.swarm.asking import all_of, in_turn, limited_by, timely
from tdml_p2p.swarm.base import BaseShelf
from tdml_p2p.swarm.handed import Handed
from tdml_p2p.swarm.inputs import (
    Descriptor,
    Input,
    Inputs,
    InputsRefused,
    Senders,
    Wanted,
    agreed,
    checked,
    decode_descriptor,
    encode,
    is_of,
    merge,
    opened_inputs,
    unanimous,
)
from tdml_p2p.swarm.material import Buffer, Fetch, Unavailable
from tdml_p2p.swarm.step_audits import StepAuditor
from trainer.content import address_of
from trainer.manifest import TaskManifest, encode_manifest
from trainer.payloads import TensorPayload, unpack
from trainer.tensor_shapes import Form, gradient_of, input_of
from trainer.trace import Recorder, lane, recording, span
from trainer.worker_ports import Compute

if TYPE_CHECKING:
    import torch

    from trainer.stage import CellResult, Stage

Ask = Callable[[str, bytes], Awaitable[bytes]]
"""Sends a request for inputs to a peer and returns its reply; raises `Unavailable`."""


Keep = Callable[[Inputs, Sequence[Buffer]], Awaitable[None]]
"""Takes the signed inputs of a cell and the blobs that its execution rests on."""


@dataclass(frozen=True, slots=True)
class Claimed:
    """What the chain knows of a claimed optimiser's step: `opened` is None before the worker has opened it."""

    worker: str
    client: str
    claim: Claim
    opened: Opening | None = None


@dataclass(frozen=True, slots=True)
class Cell:
    """The cell to re-execute: its place, the state it ran on, and the peers that may hold its material."""

    wanted: Wanted
    manifest: TaskManifest
    state: bytes
    holders: tuple[str, ...]
    senders: Senders
    claimed: "Claimed | None" = None
    kernel: bytes = b""
    """The kernel class in which results are exact; empty where they are comparable between all."""

    @property
    def is_transition(self) -> bool:
        """Whether it is no cell but the optimiser's step after them."""
        return self.wanted.cell == self.manifest.microbatches

    @property
    def opened(self) -> Trace | None:
        """The trace that the worker has opened, None before."""
        return None if self.claimed is None or self.claimed.opened is None else self.claimed.opened.trace

    @property
    def signed_inputs(self) -> Inputs | None:
        """The inputs as the worker has opened them, with the signatures of who may send them; None without."""
        if self.claimed is None or self.claimed.opened is None or self.manifest.quorum > 1:
            return None
        return opened_inputs(self.claimed.opened, self.wanted, self.manifest, self.senders)


@dataclass(frozen=True, slots=True)
class Execution:
    """Inputs as they were signed for, and this peer's own results."""

    inputs: Inputs
    result: "CellResult"
    leaves: tuple[bytes, ...] = ()
    """Of an optimiser's step the leaves of its worker's cells, which its sum was made of."""
    contradiction: str = ""
    """What is false in the worker's own record of an optimiser's step, or in the state that it claims."""

    def sketch(self, key: bytes) -> bytes:
        """Return the 384-byte sketch of the results under `key`."""
        from trainer.sketch import cell_sketch

        return cell_sketch(self.result.y, self.result.gx, self.result.gw, key)


_OPENED_SECONDS = 5.0
"""How much longer than for others it is waited for the inputs that a worker has opened."""
_MAX_STAGES = 8
"""Stages, weights and all, that wait for their next cell."""


class Reexecutor:
    """Runs cells of any task's stages on honest stages of its own, one at a time, off the event loop."""

    def __init__(
        self,
        fetch: Fetch,
        ask: Ask,
        compute: Compute,
        recorder_of: Callable[[bytes], Recorder | None] = lambda _: None,
    ) -> None:
        self._fetch = timely(fetch)
        self._ask = timely(ask)
        self._compute = compute
        self._recorder_of = recorder_of
        self.bases = BaseShelf(fetch, compute)
        self._steps = StepAuditor(self._fetch, self._ask, compute)
        self._stages: dict[tuple[bytes, int], Stage] = {}
        self._loaded: dict[tuple[bytes, int], bytes] = {}
        """Of stages that hold weights now, the address of these."""
        self._turn = trio.Lock()

    async def run(self, cell: Cell, keep: Keep | None = None) -> Execution:
        """Return the re-execution of `cell`; raise `Unavailable` when its material cannot be had.

        `keep` is given the signed inputs and all blobs that the execution rests on.
        """
        place = cell.wanted
        # in this order: a span is of the lane that is entered before it
        with recording(self._recorder_of(place.task)), lane("audits"), span("re-execute", place.step, place.cell):
            if cell.is_transition:
                execution, material = await self._steps.run(cell)
            else:
                inputs = await self.inputs(cell)
                result, material = await self._run(cell, inputs.x.address, inputs.gy.address, is_kept=keep is not None)
                execution = Execution(inputs, result)
            if keep is not None:
                with limited_by(None):
                    await keep(execution.inputs, material)
            return execution

    async def replay(self, cell: Cell, x: bytes, gy: bytes) -> Execution:
        """Return the execution of `cell` on inputs of these addresses, whoever sent them; raise `Unavailable`."""
        if cell.is_transition:
            return (await self._steps.run(cell, x))[0]
        result, _ = await self._run(cell, x, gy)
        unsigned = (Input(address, "-", bytes(64)) for address in (x, gy))
        return Execution(Inputs(*unsigned), result)

    async def again(self, cell: Cell, execution: Execution, seed: int) -> Execution:
        """Return the execution of a cell on material whose last bits are changed; raise `Unavailable`."""
        with span("execute again", cell.wanted.step, cell.wanted.cell):
            inputs = execution.inputs
            result, _ = await self._run(cell, inputs.x.address, inputs.gy.address, seed=seed)
        return replace(execution, result=result)

    async def _run(
        self, cell: Cell, x_address: bytes, gy_address: bytes, *, is_kept: bool = False, seed: int = 0
    ) -> "tuple[CellResult, tuple[Buffer, ...]]":
        """Return a cell's results, last bits shaken if there is a seed, and the blobs behind them if they are kept."""
        place = cell.wanted
        with span("fetch", place.step, place.cell):
            x, gy, root = await all_of((x_address, gy_address, cell.state), lambda one: self._fetch(one, cell.holders))
        try:
            address = await self._compute(partial(_weights_of, bytes(root), cell.state))
            result, weights = await self._on_weights(cell, (x, gy), address, is_fetched=is_kept, seed=seed)
        except ValueError as error:  # signed for and rightly addressed, and yet nothing that a stage takes
            raise Unavailable(f"the material cannot be used: {error}") from None
        if weights is None or not is_kept:
            return result, ()
        return result, (encode_manifest(cell.manifest), root, weights, x, gy, *await self._base_parts(cell))

    async def _on_weights(
        self, cell: Cell, given: tuple[Buffer, Buffer], address: bytes, *, is_fetched: bool, seed: int
    ) -> "tuple[CellResult, Buffer | None]":
        """Return a cell's results on the weights of an address, and these if they were fetched.

        The cells of one state come one after another: what the stage still holds of the last one is neither fetched nor
        hashed nor loaded again.
        """
        name, place = (cell.manifest.address, cell.wanted.stage), cell.wanted
        while True:
            weights: Buffer | None = None
            if is_fetched or seed or self._loaded.get(name) != address:
                with span("fetch weights", place.step, place.cell):
                    weights = await self._fetch(address, cell.holders)
            async with self._turn:
                stage = await self._stage(cell)
                if weights is None and self._loaded.get(name) != address:
                    continue  # another cell has come in between
                self._loaded.pop(name, None)
                result = await self._compute(partial(_execute, stage, cell, (*given, weights), seed))
                if not seed:
                    self._loaded[name] = address
                return result, weights

    async def _base_parts(self, cell: Cell) -> tuple[Buffer, ...]:
        """Return the frozen weights under adapters, part by part."""
        if cell.manifest.lora is None:
            return ()
        base = await self.bases.get(cell.manifest, cell.wanted.stage, cell.holders)
        return tuple(base.blob(place.address) or b"" for place in base.places)

    async def is_other_kernel(self, cell: Cell) -> bool:
        """Whether this machine's results of a cell are not exact because it is of another kernel class."""
        if not cell.kernel or cell.is_transition:
            return False
        return await self._compute(partial(_kernel, cell.manifest.precision)) != cell.kernel

    async def handed_others(self, cell: Cell, worker: str, result: "CellResult", limits: Limits, until: float) -> bool:
        """Whether a neighbour holds, signed by a cell's worker, a grossly other result than this, which it claims."""
        return await Handed(self._ask, self._fetch, limits).is_other(cell, worker, result, until)

    async def fetch(self, address: bytes, holders: Sequence[str]) -> Buffer:
        """Return a blob from this peer or one of `holders`; raise `Unavailable`."""
        return await self._fetch(address, holders)

    async def inputs(self, cell: Cell) -> Inputs:
        """Return both inputs as signed, from the first of the holders that tell; raise `Unavailable`.

        Once the worker has opened the cell, its inputs are those of the opening, if they are signed there, or some
        seconds more are given for them: a sender that signed two must not have it convicted. Where teams compute every
        cell an input is what most of a team sent, or what all who can be asked agree on.
        """
        quorum, opened = cell.manifest.quorum, cell.opened
        if (signed := cell.signed_inputs) is not None:
            return signed
        problems: list[str] = []
        parts: list[Descriptor] = []
        found: list[Inputs] = []

        async def attempt(peer: str) -> bool:
            try:
                part = decode_descriptor(await self._ask(peer, encode(cell.wanted)))
                parts.append(checked(cell.wanted, part, cell.manifest, cell.senders))
            except (Unavailable, InputsRefused) as error:
                problems.append(f"{peer}: {error}")
            inputs = merge(parts, opened) if quorum == 1 else agreed(parts, cell.senders, quorum)
            if inputs is not None and (quorum > 1 or opened is None or is_of(inputs, opened)):
                found.append(inputs)
            elif inputs is not None:
                patience.deadline = min(patience.deadline, trio.current_time() + _OPENED_SECONDS)
            return bool(found)

        with trio.CancelScope() as patience:
            await in_turn(cell.holders, attempt)
        if found:
            return found[0]
        if (inputs := merge(parts, opened) if quorum == 1 else unanimous(parts)) is not None:
            return inputs
        raise Unavailable("; ".join(problems) or "nobody holds the inputs")

    async def _stage(self, cell: Cell) -> "Stage":
        """Return this peer's own stage for a cell, with frozen weights if it has any."""
        manifest, index = cell.manifest, cell.wanted.stage
        stage = self._stages.get((manifest.address, index))
        if stage is None:
            stage = await self._compute(partial(_build, manifest, index))
            if manifest.lora is not None:
                stage.load_base(await self.bases.get(manifest, index, cell.holders))
            self._stages[manifest.address, index] = stage
            while len(self._stages) > _MAX_STAGES:
                oldest = next(iter(self._stages))
                del self._stages[oldest]
                self._loaded.pop(oldest, None)
        return stage


def _kernel(precision: str) -> bytes:
    from trainer.kernel import kernel_class

    return kernel_class(precision)


def _build(manifest: TaskManifest, index: int) -> "Stage":
    from trainer.stage import build_stage

    return build_stage(manifest, index)


def _execute(stage: "Stage", cell: Cell, material: tuple[Buffer, Buffer, Buffer | None], seed: int) -> "CellResult":
    """Return a cell's results, of material whose last bits are shaken if there is a seed.

    Without weights the stage holds them already.
    """
    from trainer.spread import shaken_cell
    from trainer.stage import CellKey, execute
    from trainer.tensors import view_of

    manifest, place, (x, gy, weights) = cell.manifest, cell.wanted, material
    given, back = _tensor(x, input_of(manifest, place.stage)), _tensor(gy, gradient_of(manifest, place.stage))
    if weights is not None:
        with span("load", place.step, place.cell):
            state = view_of(weights, stage.layout.total)
            if seed:
                state, given, back = shaken_cell(state, given, back, seed)
            stage.load(state)
    key = CellKey(0, place.step, place.cell)
    with span("audit", place.step, place.cell):
        if stage.spec.is_last:
            return execute(stage, given, back, None, key)
        return execute(stage, given, None, back, key)


def _weights_of(root: bytes, state: bytes) -> bytes:
    """Return the address of a state's weights; raise `ValueError` for what is not its manifest."""
    from trainer.state import decode_state_manifest

    return decode_state_manifest(root, state).weights


def _tensor(data: Buffer, form: Form) -> "torch.Tensor":
    """Return an input as a worker decodes the bytes that it receives; raise `Unavailable`."""
    payload = TensorPayload(*form, memoryview(bytes(data)))
    if payload.nbytes != len(data):
        raise Unavailable(f"an input has {len(data)} bytes, not {payload.nbytes}")
    return unpack((payload,))


def results_of(execution: Execution) -> tuple[bytes, bytes, bytes]:
    """Return the content addresses of y, gx and gw of an execution."""
    from trainer.tensors import buffer_of

    y, gx, gw = (address_of(buffer_of(t)) for t in (execution.result.y, execution.result.gx, execution.result.gw))
    return y, gx, gw


def own_key(seed: bytes, account: bytes, audit: bytes) -> bytes:
    """Return the sketch key of `account` for `audit`, drawn with `seed`."""
    return digest("sketch key", seed, account, audit)
