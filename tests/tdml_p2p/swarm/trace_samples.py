"""Committed steps with small made-up tensors, for the tests of what a peer keeps of them."""

import torch
from torch import Tensor

from trainer.messages import Reduce
from trainer.state import StageState, StateManifest
from trainer.worker_step import CellRecord, StepRecord

AFTER = StateManifest(1, *(bytes([number]) * 32 for number in (3, 4, 5)))
BEFORE = bytes([1]) * 32
ROOT = bytes([2]) * 32


def tensor_of(*name: int, shape: tuple[int, ...] = (2, 3, 4)) -> Tensor:
    """Return a tensor that its name determines and that no other name has."""
    seed = sum(number * 1000**place for place, number in enumerate(name, start=1))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def cell_of(step: int, cell: int, generation: int = 0, labels: Tensor | None = None) -> CellRecord:
    """Return a finished cell, of the last stage if it has labels."""
    is_last = labels is not None
    return CellRecord(
        cell=cell,
        x=tensor_of(generation, step, cell, 1),
        x_sender="before",
        x_proof=(),
        labels=labels,
        labels_proof=(),
        y=tensor_of(generation, step, cell, 2, shape=(2, 3) if is_last else (2, 3, 4)),
        boundaries=(bytes([cell]) * 32,),
        gy=None if is_last else tensor_of(generation, step, cell, 3),
        gy_sender="" if is_last else "after",
        gy_proof=(),
        gx=tensor_of(generation, step, cell, 4),
        gw=tensor_of(generation, step, cell, 5, shape=(20,)),
        loss=0.0,
        seconds=0.1,
    )


def step_of(step: int, *cells: CellRecord, generation: int = 0) -> StepRecord:
    """Return a committed step of stage 1 with these cells."""
    reduction = Reduce(generation, step, 1, (), ())
    return StepRecord(generation, step, 1, ROOT, reduction, (), cells)


def state_of(step: int, shared: bool = False) -> StageState:
    """Return a state after `step`; `shared` states have the same moments."""
    moment = torch.zeros(20) if shared else tensor_of(step, 8, shape=(20,))
    return StageState(step, tensor_of(step, 7, shape=(20,)), moment, tensor_of(step, 9, shape=(20,)))
