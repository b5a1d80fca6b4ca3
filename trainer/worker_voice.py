"""What a worker says of its step: results to its neighbours, word of them to the client."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from trainer.messages import (
    Activation,
    Apply,
    CellDone,
    Fault,
    Gradient,
    Message,
    OpenStep,
    Partial,
    Passed,
    Prepare,
    Reduce,
    Reduced,
    Tied,
)
from trainer.payloads import Reason

if TYPE_CHECKING:
    from trainer.state import StageState
    from trainer.worker_ports import WorkerConfig
    from trainer.worker_step import Cell, StepWork


class Voice:
    """Sends what there is of a cell, as often as it is asked to."""

    def __init__(self, config: "WorkerConfig", post: Callable[[str, Message], None]) -> None:
        self._client = config.client
        self._spec = config.stage.spec
        self._post = post

    def tell(self, message: Message) -> None:
        """Send the client a message."""
        self._post(self._client, message)

    def report(self, during: Prepare | OpenStep | Reduce | Apply, reason: Reason, peers: tuple[str, ...] = ()) -> None:
        """Tell the client what stops this worker."""
        self.tell(Fault(during.generation, during.step, reason, peers))

    def undelivered(self, to: str, message: Message) -> None:
        """Tell the client that a neighbour or a replica cannot be reached."""
        if isinstance(message, Activation | Gradient | Partial | Tied):
            self.tell(Fault(message.generation, message.step, Reason.PEER_UNREACHABLE, (to,)))

    def reduced(self, request: Reduce | Apply, state: "StageState") -> None:
        """Tell the client of the state that a request leads to."""
        self.tell(Reduced(request.generation, request.step, request.attempt, state.root))

    def output(self, work: "StepWork", cell: "Cell") -> None:
        """Send a cell's output on, if it is there, and tell the client."""
        if cell.y is not None and cell.y_payload is not None and not self._spec.is_last:
            at = (work.generation, work.step, cell.index, self._spec.index)
            output = Activation(*at, cell.y_payload)
            for peer in work.consumers(cell.index):
                self._post(peer, output)
            self.tell(Passed(*at, cell.y_address))

    def gradient(self, work: "StepWork", cell: "Cell") -> None:
        """Send the gradient of a cell's input back, if it is there."""
        if cell.gx is not None and cell.gx_payload is not None and not self._spec.is_first:
            at = (work.generation, work.step, cell.index, self._spec.index)
            gradient = Gradient(*at, cell.gx_payload)
            for peer in work.producers(cell.index):
                self._post(peer, gradient)

    def done(self, work: "StepWork", cell: "Cell") -> None:
        """Tell the client of a cell that is finished."""
        if cell.gw is not None:
            at = (work.generation, work.step, cell.index, self._spec.index)
            self.tell(CellDone(*at, cell.loss, cell.seconds, cell.digest))

    def again(self, work: "StepWork", cell: "Cell", stage: int) -> None:
        """Send what the new holder of `stage` lacks; if that is this worker, all it has, to everyone."""
        if stage - self._spec.index in (0, 1):
            self.output(work, cell)
        if stage - self._spec.index in (0, -1):
            self.gradient(work, cell)
        if stage == self._spec.index:
            self.done(work, cell)
