"""The canonical sum of a step's gradients, the same bits at every replica of a stage.

Each replica adds the gradients of the cells it owns in ascending cell order; the partial sums are added in
ascending order of the replicas' names; the total is divided by the number of micro-batches. Where clipping or
a tied tensor joins the stages, the mean is kept until the client says what the other stages' gradients are like.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from trainer.messages import Apply, Partial, Reduce, Summed, Tied
from trainer.payloads import MessageError, Reason, TensorPayload
from trainer.transport import Proof

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


Sent: TypeAlias = tuple[tuple[str, Partial | Tied], ...]


@dataclass(frozen=True, slots=True)
class Part:
    """Another worker's part of a sum, as it came: the message with its bytes, and who signed for them."""

    sender: str
    message: Partial | Tied
    proof: Proof


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
        self.is_failed = False
        self.gradient: Tensor | None = None
        self.far: Tensor | None = None
        self.told: Summed | None = None
        self.order: Apply | None = None
        self.sent: dict[str, Partial | Tied] = {}
        """This worker's own part by whom it went to."""
        self.parts: dict[str, Part] = {}
        self.far_part: Part | None = None
        self.proof: Proof = ()
        """The client's signature under the request, and under the order below."""
        self.order_proof: Proof = ()
        self._partials: dict[str, Tensor] = {}
        self._far_senders: set[str] = set()

    @property
    def attempt(self) -> int:
        """Number of this attempt within the step."""
        return self.request.attempt

    @property
    def place(self) -> tuple[int, int, int]:
        """Generation, step and attempt."""
        return self.request.generation, self.request.step, self.request.attempt

    @property
    def missing(self) -> tuple[str, ...]:
        """Contributors whose partial sum is not in yet."""
        return tuple(peer for peer in self.contributors if peer not in self._partials)

    def to_send(self, kind: type[Partial | Tied], stage: int, payload: tuple[TensorPayload]) -> Sent:
        """Return this worker's part with everybody it goes to, and keep it for who asks again."""
        part = kind(*self.place, stage, payload)
        self.sent |= dict.fromkeys(self.others if kind is Partial else self.request.ends, part)
        return tuple((peer, sent) for peer, sent in self.sent.items() if sent is part)

    def check_contributor(self, peer: str) -> None:
        """Raise `MessageError` unless a partial sum of this peer is wanted."""
        if peer not in self.contributors:
            raise MessageError(Reason.WRONG_SENDER, f"{peer} contributes nothing to this sum")

    def check_far(self, peer: str) -> None:
        """Raise `MessageError` unless this peer is at the other end."""
        if peer not in self.request.ends:
            raise MessageError(Reason.WRONG_SENDER, f"{peer} is not at the other end")

    def add(self, peer: str, partial: "Tensor", _address: bytes = b"") -> None:
        """Take a contributor's partial sum; raise `MessageError` for a second one or a stranger's."""
        self.check_contributor(peer)
        if peer in self._partials:
            raise MessageError(Reason.DUPLICATE, f"a second partial sum of {peer}")
        self._partials[peer] = partial

    def add_far(self, peer: str, part: "Tensor", _address: bytes = b"") -> None:
        """Take the other end's part of the tied gradient; raise `MessageError` for a stranger's or a second one."""
        self.check_far(peer)
        if peer in self._far_senders:
            raise MessageError(Reason.DUPLICATE, f"a second tied part of {peer}")
        self._far_senders.add(peer)
        if self.far is None:
            self.far = part

    @property
    def awaited(self) -> tuple[str, ...]:
        """Whom this replica waits for: those whose partial sum is missing, or the other end."""
        return self.missing or (self.request.ends if self.far is None else ())

    def keep(self, part: Part) -> None:
        """Keep a part that was taken, for those who audit the step; of the other end's equal ones the first."""
        if isinstance(part.message, Partial):
            self.parts[part.sender] = part
        elif self.far_part is None:
            self.far_part = part

    def own_sum(self, gradients: Mapping[int, "Tensor"]) -> "Tensor":
        """Return the sum of the owned cells' gradients."""
        return ordered_sum(gradients[cell] for cell in self.own_cells)

    def mean(self) -> "Tensor":
        """Return the mean gradient over all cells; every partial sum must be in."""
        total = ordered_sum(self._partials[peer] for peer in self.contributors)
        return total.div_(len(self.request.owners))
