"""Running statistics in a stage's state: what each cell adds to them, in an order that only the cells fix.

One process that trains the cells of a step one after another makes r ← k·r + a of each, a being what the cell adds
and k the share that is kept. Over M cells that is k^M·r + Σ k^(M−1−i)·aᵢ, a sum over the cells: so the slots of a
statistic in the gradient of cell i hold k^(M−1−i)·aᵢ, and the sum of the gradients is the step's addition.

Statistics are neither clipped nor normalised, so that one false cell could move them as far as it likes: a replica
looks at what the others add, and has its client told of what is far out of proportion.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.layout import Layout

SCALE = 0.125
"""What the slots are multiplied by, a power of two: audits compare them and the gradients by one norm."""


_FAR = 100.0


def power(base: float, exponent: int) -> float:
    """Return base ** exponent by multiplications in a fixed order (libm's pow differs between machines)."""
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


def share(kept: float, cells: int, cell: int) -> float:
    """Return what the addition of a cell is multiplied by in its gradient, in a step of `cells`."""
    return SCALE * power(kept, cells - 1 - cell)


def gain(cells: int) -> float:
    """Return what the mean of the cells' gradients is multiplied by to be the step's addition."""
    return cells / SCALE


def are_odd(layout: "Layout", partial: "Tensor", weights: "Tensor") -> bool:
    """Whether what a partial sum adds to the statistics in `weights` is many times what they are now.

    What only counts, as batches, is left out: it grows with the run.
    """
    parts = [slice(each.start, each.stop) for each in layout.segments if each.kept is not None and each.kept < 1.0]
    added, usual = (sum(float(vector[part].norm()) ** 2 for part in parts) for vector in (partial, weights))
    return added > (_FAR * SCALE) ** 2 * usual
