"""Recorded cells, and what each attack and each honest machine makes of them: computed once a process."""

from functools import cache, lru_cache

import torch

from bench.support.recordings import HONEST, RESULTS, SMALL, Attack, Recording, Recordings, record
from tdml_p2p.swarm.inputs import Input, Inputs
from trainer.content import address_of
from trainer.sketch import cell_sketch
from trainer.stage import CellResult
from trainer.tensors import buffer_of

ATTACKS: dict[str, Attack] = {**HONEST, **SMALL, **RESULTS}
USUAL = "same kernels"


@cache
def recordings() -> Recordings:
    """Return the recorded cells, made once a process."""
    torch.set_num_threads(1)
    return record()


@cache
def result_of(attack: str, stage: int, number: int) -> CellResult:
    """Return what an attack, or an honest configuration, makes of a recorded cell."""
    recorded = recordings()
    return ATTACKS[attack](recorded, recorded.cells[stage][number])


@cache
def addresses_of(attack: str, stage: int, number: int) -> dict[str, bytes]:
    """Return the content addresses of such a result."""
    result = result_of(attack, stage, number)
    return {name: address_of(buffer_of(getattr(result, name).contiguous())) for name in ("y", "gx", "gw")}


@cache
def inputs_of(stage: int, number: int) -> Inputs:
    """Return the inputs of a recorded cell by address."""
    one: Recording = recordings().cells[stage][number]
    gy = one.gy if one.labels is None else one.labels
    assert gy is not None
    x, gy = (Input(address_of(buffer_of(part.contiguous())), "-", bytes(64)) for part in (one.x, gy))
    return Inputs(x, gy)


@lru_cache(256)
def sketch_of(said: str, stage: int, number: int, key: bytes) -> bytes:
    """Return the sketch under a key: a worker's and its auditors' are of one key, and mostly of one result."""
    result = result_of(said, stage, number)
    return cell_sketch(result.y, result.gx, result.gw, key)
