"""What comes in at a worker, in order: what is large is decoded and looked at outside the event loop.

A seat takes a message in one go, but tensors of megabytes would hold the loop, and with it every other link of the
peer. Such a message is opened in a thread first; what has come after it waits meanwhile, so that the order stays.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

from trainer.joint import is_finite
from trainer.messages import Partial, Tied
from trainer.payloads import MessageError, unpack
from trainer.stage import stage_layout
from trainer.statistics import are_odd
from trainer.transport import Lost, Received
from trainer.worker_step import CellData

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.messages import Message
    from trainer.state import StageState
    from trainer.worker_ports import Compute, WorkerConfig

LARGE = 1 << 20
"""Bytes from which on a tensor is opened in a thread."""

Data: TypeAlias = CellData | Partial | Tied


@dataclass(frozen=True, slots=True)
class Opened:
    """The tensor of a message; of a part of a sum also whether it is finite, and out of all proportion."""

    tensor: "Tensor"
    is_finite: bool = True
    is_odd: bool = False


class Opener:
    """Decodes and looks at tensors for one stage; needs nothing that changes."""

    def __init__(self, config: "WorkerConfig") -> None:
        # of a team's sums most decide, also on what is not finite
        self._looks = config.manifest.quorum == 1
        self._layout = stage_layout(config.manifest, config.stage.spec.index)

    def open(self, message: Data, current: "StageState | None") -> Opened:
        """Return what is in a message for a worker whose state is `current`."""
        tensor = unpack(message.payload)
        if not isinstance(message, Partial | Tied):
            return Opened(tensor)
        if self._looks and not is_finite(tensor):
            return Opened(tensor, is_finite=False)
        if current is None or not isinstance(message, Partial):
            return Opened(tensor)
        return Opened(tensor, is_odd=are_odd(self._layout, tensor, current.weights))


class Taker(Protocol):
    """What takes the messages: a worker's seat."""

    def opening(self, received: Received) -> Callable[[], Opened] | None:
        """Return how to open what a message brings, None for one without a tensor; raise `MessageError`."""
        ...

    def take(self, received: Received, opened: Opened | None = None) -> tuple[Received, ...]:
        """Take a message; return those that came early and are to be looked at again now."""
        ...

    def lack(self, message: "Message | Lost", error: Exception) -> None:
        """Note that there was no memory for what a message brings."""
        ...


class Intake:
    """Hands messages to a seat, one after the other."""

    def __init__(self, seat: Taker, offload: "Compute") -> None:
        self._seat = seat
        self._offload = offload

    async def take(self, received: Received) -> None:
        """Have the seat take a message, and those that have waited for it."""
        due = deque((received,))
        while due:
            each = due.popleft()
            try:
                opened = await self._opened(each)
            except (MemoryError, RuntimeError) as error:
                self._seat.lack(each.message, error)
                continue
            due.extendleft(reversed(self._seat.take(each, opened)))

    async def _opened(self, received: Received) -> Opened | None:
        """Return what a message brings if it is large and the seat would take it as things are now."""
        if not _is_large(received.message):
            return None
        try:
            opening = self._seat.opening(received)
        except MessageError:
            return None  # the seat refuses it by the same name
        return None if opening is None else await self._offload(opening)


def _is_large(message: "Message | Lost") -> bool:
    if not isinstance(message, Data):
        return False
    # what is neither decoded, copied nor looked at costs nothing
    is_free = not isinstance(message, Partial | Tied) and not any(
        each.is_encoded or each.data.readonly for each in message.payload
    )
    return not is_free and sum(each.nbytes for each in message.payload) >= LARGE
