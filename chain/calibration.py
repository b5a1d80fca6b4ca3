"""A calibration of thresholds: what `bench.numerics` measured, as parameters of a network."""

import math
from typing import Annotated, Literal

import msgspec
from msgspec import Meta
from msgspec.structs import replace

from chain.bounds import MOST_TAU, problem
from chain.params import Params

MARGIN = 10
"""τ is so many times the worst honest deviation."""
MAX_BYTES = 1 << 20

Worst = Annotated[float, Meta(ge=0, lt=1)]


class Calibration(msgspec.Struct, frozen=True):
    """Worst honest deviations of y, gx and gw over so many comparisons; further fields of the file are notes."""

    worst: tuple[Worst, Worst, Worst]
    comparisons: Annotated[int, Meta(ge=1)]
    precision: Literal["fp32", "bf16"] = "fp32"

    @property
    def tau(self) -> tuple[int, int, int]:
        """τ of y, gx and gw in units of 1e-9, ten times what was measured, at least one unit."""
        y, gx, gw = (max(1, math.ceil(MARGIN * worst * MOST_TAU)) for worst in self.worst)
        return y, gx, gw

    @property
    def parameter(self) -> str:
        """The parameter that it sets: between all machines, or of bf16 between kernel classes."""
        return "tau" if self.precision == "fp32" else "wide_tau"


def read_calibration(data: bytes) -> Calibration:
    """Return the calibration in a file; raise `ValueError`, saying why, for a bad one."""
    try:
        found = msgspec.json.decode(data, type=Calibration) if len(data) <= MAX_BYTES else None
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError(f"it is no calibration: {error}") from None
    if found is None:
        raise ValueError(f"it has more than {MAX_BYTES} bytes")
    return found


def calibrated(params: Params, found: Calibration) -> Params:
    """Return `params` with the thresholds of a calibration; raise `ValueError` where no network could run on them."""
    changed = replace(params, **{found.parameter: found.tau})
    if (wrong := problem(changed)) is not None:
        raise ValueError(f"no network can run on it: {wrong}")
    return changed
