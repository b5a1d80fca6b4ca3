"""A worker's torch work: states restored and loaded, halves of cells, the partial sum, the optimiser step."""

from functools import partial
from typing import TYPE_CHECKING, Literal

from trainer.content import address_of
from trainer.errors import StageError
from trainer.joint import is_finite
from trainer.messages import Prepare
from trainer.payloads import Dtype, MessageError, Reason, TensorPayload, pack, unpack
from trainer.reduction import Reduction
from trainer.stage import Backward, CellKey, Forward
from trainer.state import StageState, StateRing, initial_state
from trainer.step_rule import StepRule
from trainer.tensors import buffer_of
from trainer.trace import span
from trainer.worker_ports import StateUnavailable, WorkerConfig, WorkerPorts
from trainer.worker_probe import HeldProbe
from trainer.worker_step import Cell, Half, StepWork

if TYPE_CHECKING:
    from torch import Tensor


class NotFiniteError(ArithmeticError):
    """What `stage` made of a cell is infinite or not a number."""

    def __init__(self, stage: int, what: Literal["output", "gradient"]) -> None:
        super().__init__(f"not finite: {what} of stage {stage}")
        self.stage: int = stage
        self.what: Literal["output", "gradient"] = what


class StageComputer:
    """One stage with its ring of states; every method runs one piece of work through `ports.compute`."""

    def __init__(self, config: WorkerConfig, ports: WorkerPorts) -> None:
        self.ring = StateRing(config.ring_depth)
        self.loaded: StageState | None = None
        self._stage = config.stage
        self._manifest = config.manifest
        self._rule = StepRule(config.manifest, config.stage.spec.index)
        self._ports = ports
        self._wire = config.manifest.wire
        self._dropped: list[CellKey] = []

    def forget(self, step: int) -> None:
        """Drop the states before `step`."""
        if len(self.ring):
            self.ring.settle(step)

    def drop(self, work: StepWork, cells: list[Cell]) -> None:
        """Free the graphs of `cells`, and empty that list, before the next piece of work."""
        while cells:
            self._dropped.append(CellKey(work.generation, work.step, cells.pop().index))

    async def restore(self, wanted: Prepare) -> StageState:
        """Return the wanted state from the ring, the seed or its holders; the ring ends with it.

        Raises `MessageError` with NO_STATE or STATE_MISMATCH.
        """
        self.loaded = None
        if not wanted.step and self._manifest.initial and wanted.root.hex() != self._manifest.initial[wanted.stage]:
            raise MessageError(Reason.STATE_MISMATCH, "the manifest names another initial state")
        for find in (self._from_ring, self._from_seed, self._from_holders):
            state = await find(wanted)
            if state is not None:
                return state
        raise MessageError(Reason.NO_STATE, f"step {wanted.step}")

    async def load(self, state: StageState) -> None:
        """Load a state's weights into the stage; graphs in flight are dropped."""
        await self._ports.compute(partial(self._load, state))
        self._dropped.clear()
        self.loaded = state

    async def run(self, work: StepWork, cell: Cell, half: Half) -> tuple[Forward | None, Backward | None]:
        """Return what computing half of a cell, or the whole of it, yields; raise `NotFiniteError`."""
        key = CellKey(work.generation, work.step, cell.index)
        started = self._ports.clock()
        try:
            return await self._ports.compute(partial(self._halves, key, cell, half))
        finally:
            cell.seconds += self._ports.clock() - started

    async def digest(self, y: "Tensor | None", backward: Backward) -> bytes:
        """Return the digest of the content addresses of a cell's results, which its team compares."""
        return await self._ports.compute(partial(_digest, y, backward))

    async def evaluate(self, probe: HeldProbe) -> "Tensor":
        """Return what the loaded state makes of a probe, without a graph."""
        return await self._ports.compute(partial(self._evaluate, probe))

    async def own_sum(self, reduction: Reduction, work: StepWork) -> "tuple[Tensor, tuple[TensorPayload]]":
        """Return the sum of the gradients that this worker contributes, as all replicas add it, and as it is sent."""
        gradients = {cell: work.cells[cell].gw for cell in reduction.own_cells}
        present = {cell: gw for cell, gw in gradients.items() if gw is not None}
        return await self._ports.compute(partial(_own_sum, reduction, present, work.step, self._wire))

    async def mean(self, reduction: Reduction, step: int) -> "tuple[Tensor, Tensor]":
        """Return the stage's mean gradient, and a copy of the tied tensor's part of it."""
        return await self._ports.compute(partial(self._mean, reduction, step))

    async def join(self, gradient: "Tensor", far: "Tensor | None", step: int) -> tuple[float, bytes]:
        """Add the other end's part to the tied gradient; return the squared norm of the stage and that part's digest.

        The first stage counts the tied tensor in the norm.
        """
        return await self._ports.compute(partial(self._join, gradient, far, step))

    async def apply(self, state: StageState, gradient: "Tensor", squares: tuple[float, ...]) -> StageState:
        """Return the state after the step, its root already computed; `squares` are the stages' squared norms.

        Raises `NotFiniteError`.
        """
        return await self._ports.compute(partial(self._apply, state, gradient, squares))

    def _load(self, state: StageState) -> None:
        with span("load", state.step):
            self._stage.load(state.weights)

    def _evaluate(self, probe: HeldProbe) -> "Tensor":
        return self._stage.evaluate(probe.x, probe.labels if self._stage.spec.is_last else None)

    def _mean(self, reduction: Reduction, step: int) -> "tuple[Tensor, Tensor]":
        with span("reduce", step):
            mean = reduction.mean()
            return mean, mean[self._rule.tied].clone()

    def _join(self, gradient: "Tensor", far: "Tensor | None", step: int) -> tuple[float, bytes]:
        with span("norm", step):
            return self._rule.join(gradient, far)

    def _apply(self, state: StageState, gradient: "Tensor", squares: tuple[float, ...]) -> StageState:
        step, index = state.step + 1, self._stage.spec.index
        if not is_finite(gradient):
            raise NotFiniteError(index, "gradient")
        with span("optimiser", step):
            after = self._rule.apply(state, gradient, squares)
        if not is_finite(after.weights) or not is_finite(after.v):
            raise NotFiniteError(index, "gradient")
        with span("root", step):
            _ = after.root
        return after

    def _halves(self, key: CellKey, cell: Cell, half: Half) -> tuple[Forward | None, Backward | None]:
        while self._dropped:
            self._stage.drop(self._dropped.pop())
        if cell.x is None:
            raise ValueError(f"cell {key.cell} has no input")
        forward = backward = None
        if half is not Half.BACKWARD:
            if not self._stage.spec.is_first and not is_finite(cell.x):
                raise NotFiniteError(self._stage.spec.index - 1, "output")
            with span("forward", key.step, key.cell):
                forward = self._stage.forward(key, cell.x, cell.labels)
            self._check(key, "output", forward.y)
            if not self._stage.spec.is_last:
                cell.y_payload = pack(forward.y, self._wire)
                cell.y_address = address_of(cell.y_payload[0].data) if self._manifest.quorum > 1 else b""
        if half is not Half.FORWARD:
            if cell.gy is not None and not is_finite(cell.gy):
                raise NotFiniteError(self._stage.spec.index + 1, "gradient")
            with span("backward", key.step, key.cell):
                backward = self._stage.backward(key, cell.gy)
            self._check(key, "gradient", backward.gx, backward.gw)
            if not self._stage.spec.is_first:
                cell.gx_payload = pack(backward.gx, self._wire)
        return forward, backward

    def _check(self, key: CellKey, what: Literal["output", "gradient"], *results: "Tensor") -> None:
        if not all(map(is_finite, results)):
            self._stage.drop(key)
            raise NotFiniteError(self._stage.spec.index, what)

    async def _from_ring(self, wanted: Prepare) -> StageState | None:
        if wanted.step not in self.ring:
            return None
        if wanted.root not in (b"", self.ring.at(wanted.step).root):
            return None
        return self.ring.restore(wanted.step)

    async def _from_seed(self, wanted: Prepare) -> StageState | None:
        if wanted.step or self._manifest.initial:
            return None
        state = await self._ports.compute(partial(initial_state, self._manifest, wanted.stage))
        if wanted.root not in (b"", state.root):
            return None
        self.ring.reset(state)
        return state

    async def _from_holders(self, wanted: Prepare) -> StageState | None:
        if not wanted.holders or not wanted.root:
            return None
        if not wanted.step and not self._manifest.initial and wanted.stage in self._manifest.seated:
            raise MessageError(Reason.STATE_MISMATCH, "a run begins with the state that its seed gives")
        try:
            state = await self._ports.fetch_state(wanted.root, wanted.holders)
        except (StateUnavailable, StageError):
            return None
        if (state.step, state.root) != (wanted.step, wanted.root):
            raise MessageError(Reason.STATE_MISMATCH, f"step {state.step}")
        self.ring.reset(state)
        return state


def _digest(y: "Tensor | None", backward: Backward) -> bytes:
    tensors = (y, backward.gx, backward.gw)
    return address_of(b"".join(address_of(buffer_of(tensor)) for tensor in tensors if tensor is not None))


def _own_sum(
    reduction: Reduction, gradients: dict[int, "Tensor"], step: int, wire: Dtype
) -> "tuple[Tensor, tuple[TensorPayload]]":
    with span("sum", step):
        total = reduction.own_sum(gradients)
        payload = pack(total, wire)
        # what the replicas will add is what this worker adds, or their weights would part
        return (unpack(payload) if payload[0].is_encoded else total), payload
