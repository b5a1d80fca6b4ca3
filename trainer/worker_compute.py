"""A worker's torch work: states restored and loaded, halves of cells, the partial sum, the optimiser step."""

from functools import partial
from typing import TYPE_CHECKING

from trainer.errors import StageError
from trainer.messages import MessageError, Prepare, Reason
from trainer.optimizer import build_optimizer
from trainer.reduction import Reduction
from trainer.stage import Backward, CellKey, Forward
from trainer.state import StageState, StateRing, initial_state
from trainer.worker_ports import StateUnavailable, WorkerConfig, WorkerPorts
from trainer.worker_step import Cell, Half, StepWork

if TYPE_CHECKING:
    from torch import Tensor

COMPUTE_ERRORS = (RuntimeError, ValueError, IndexError)


class StageComputer:
    """One stage with its ring of states; every method runs one piece of work through `ports.compute`."""

    def __init__(self, config: WorkerConfig, ports: WorkerPorts) -> None:
        self.ring = StateRing(config.ring_depth)
        self.loaded: StageState | None = None
        self._stage = config.stage
        self._manifest = config.manifest
        self._optimizer = build_optimizer(config.manifest, config.stage.spec.index)
        self._ports = ports
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
        await self._ports.compute(partial(self._stage.load, state.weights))
        self._dropped.clear()
        self.loaded = state

    async def run(self, work: StepWork, cell: Cell, half: Half) -> tuple[Forward | None, Backward | None]:
        """Return what computing half of a cell, or the whole of it, yields."""
        key = CellKey(work.generation, work.step, cell.index)
        started = self._ports.clock()
        try:
            return await self._ports.compute(partial(self._halves, key, cell, half))
        finally:
            cell.seconds += self._ports.clock() - started

    async def own_sum(self, reduction: Reduction, work: StepWork) -> "Tensor":
        """Return the sum of the gradients that this worker contributes."""
        gradients = {cell: work.cells[cell].gw for cell in reduction.own_cells}
        present = {cell: gw for cell, gw in gradients.items() if gw is not None}
        return await self._ports.compute(partial(reduction.own_sum, present))

    async def apply(self, state: StageState, reduction: Reduction) -> StageState:
        """Return the state after the step, its root already computed."""
        return await self._ports.compute(partial(self._apply, state, reduction))

    def _apply(self, state: StageState, reduction: Reduction) -> StageState:
        after = self._optimizer.apply(state, reduction.mean())
        _ = after.root
        return after

    def _halves(self, key: CellKey, cell: Cell, half: Half) -> tuple[Forward | None, Backward | None]:
        while self._dropped:
            self._stage.drop(self._dropped.pop())
        if cell.x is None:
            raise ValueError(f"cell {key.cell} has no input")
        forward = self._stage.forward(key, cell.x, cell.labels) if half is not Half.BACKWARD else None
        backward = self._stage.backward(key, cell.gy) if half is not Half.FORWARD else None
        return forward, backward

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
        try:
            state = await self._ports.fetch_state(wanted.root, wanted.holders)
        except (StateUnavailable, StageError):
            return None
        if (state.step, state.root) != (wanted.step, wanted.root):
            raise MessageError(Reason.STATE_MISMATCH, f"step {state.step}")
        self.ring.reset(state)
        return state
