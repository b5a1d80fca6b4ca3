"""The canonical sum of a step's gradients, the same bits at every replica of a stage.

Each replica adds the gradients of the cells it owns in ascending cell order; the partial sums are added in
ascending order of the replicas' names; the total is divided by the number of micro-batches.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from trainer.messages import MessageError, Reason, Reduce

if TYPE_CHECKING:
    from torch import Tensor


def ordered_sum(tensors: Iterable["Tensor"]) -> "Tensor":
    """Return the sum of at least one tensor, added one after another from the left."""
    total: Tensor | None = None
    for tensor in tensors:
        total = tensor.clone() if total is None else total.add_(tensor)
    if total is None:
        raise ValueError("a sum needs at least one tensor")
    return total


class Reduction:
    """One attempt to reduce a stage's gradients at replica `me`: who owns what, and what has arrived."""

    def __init__(self, request: Reduce, me: str) -> None:
        if not set(request.owners) <= set(request.replicas) or me not in request.replicas:
            raise MessageError(Reason.UNEXPECTED, "an owner or this peer is not among the replicas")
        self.request = request
        self.contributors = tuple(sorted(set(request.owners)))
        self.own_cells = tuple(c for c, owner in enumerate(request.owners) if owner == me)
        self.others = tuple(peer for peer in request.replicas if peer != me)
        self.is_summed = not self.own_cells
        self._partials: dict[str, Tensor] = {}

    @property
    def attempt(self) -> int:
        """Number of this attempt within the step."""
        return self.request.attempt

    @property
    def missing(self) -> tuple[str, ...]:
        """Contributors whose partial sum is not in yet."""
        return tuple(peer for peer in self.contributors if peer not in self._partials)

    def add(self, peer: str, partial: "Tensor") -> None:
        """Take a contributor's partial sum; raise `MessageError` for a second one or a stranger's."""
        if peer not in self.contributors:
            raise MessageError(Reason.WRONG_SENDER, f"{peer} contributes nothing to this sum")
        if peer in self._partials:
            raise MessageError(Reason.DUPLICATE, f"a second partial sum of {peer}")
        self._partials[peer] = partial

    def own_sum(self, gradients: Mapping[int, "Tensor"]) -> "Tensor":
        """Return the sum of the owned cells' gradients."""
        return ordered_sum(gradients[cell] for cell in self.own_cells)

    def mean(self) -> "Tensor":
        """Return the mean gradient over all cells; every partial sum must be in."""
        total = ordered_sum(self._partials[peer] for peer in self.contributors)
        return total.div_(len(self.request.owners))
