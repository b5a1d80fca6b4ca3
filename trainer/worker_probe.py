"""Forward passes between the steps, to validate: unpaid, unclaimed, and nothing of the training depends on them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainer.layout import StageSpec
from trainer.messages import Message, Probe, Probed, Relay
from trainer.payloads import MessageError, Reason, TensorPayload, pack, unpack
from trainer.transport import Received

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.worker_ports import WorkerConfig


@dataclass(frozen=True)
class HeldProbe:
    """A probe that waits for its turn, or for the commit of the step that it follows."""

    message: Probe | Relay

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(payload.nbytes for payload in self.message.payload)

    @property
    def x(self) -> "Tensor":
        """The input of this stage."""
        return _only(self.message.payload[0])

    @property
    def labels(self) -> "Tensor":
        """The labels, for the last stage."""
        return _only(self.message.payload[1])


class Probes:
    """The probes that worker `me` holds, at most `limit` bytes of them."""

    def __init__(self, config: "WorkerConfig", me: str) -> None:
        self._spec: StageSpec = config.stage.spec
        self._client = config.client
        self._me = me
        self._limit = config.early_limit
        self._held: dict[int, HeldProbe] = {}

    def take(self, received: Received, message: Probe | Relay, generation: int, step: int) -> None:
        """Keep a probe of the state after `step`, or of the next one's; raise `MessageError`."""
        if message.generation != generation or not step <= message.step <= step + 1:
            raise MessageError(Reason.STALE_STEP, f"step {message.step}")
        self._check_route(received.sender, message)
        self.forget(generation, step)
        probe = HeldProbe(message)
        if message.cell in self._held:
            raise MessageError(Reason.DUPLICATE)
        if sum(held.nbytes for held in self._held.values()) + probe.nbytes > self._limit:
            raise MessageError(Reason.MEMORY_FULL)
        self._held[message.cell] = probe

    def forget(self, generation: int, step: int) -> None:
        """Drop what came too late for the state after `step`."""
        self._held = {
            cell: held
            for cell, held in self._held.items()
            if held.message.generation == generation and held.message.step >= step
        }

    def next(self, generation: int, step: int) -> HeldProbe | None:
        """Take out the probe that is due while the state after `step` is current."""
        self.forget(generation, step)
        due = [cell for cell, held in self._held.items() if held.message.step == step]
        return self._held.pop(min(due)) if due else None

    def answer(self, probe: HeldProbe, y: "Tensor | None") -> tuple[str, Message]:
        """Return what a stage's output becomes and who gets it; no output ends the probe."""
        message = probe.message
        at = (message.generation, message.step, message.cell)
        if y is None or self._spec.is_last:
            return self._client, Probed(*at, float("nan") if y is None else float(y.mean()))
        payload = (*pack(y), message.payload[1])
        return message.route[self._spec.index + 1], Relay(*at, self._spec.index, message.route, payload)

    def _check_route(self, sender: str, message: Probe | Relay) -> None:
        spec, route = self._spec, message.route
        if len(route) != spec.count or route[spec.index] != self._me:
            raise MessageError(Reason.UNKNOWN_CELL, "the route does not lead here")
        is_right_stage = spec.is_first if isinstance(message, Probe) else message.stage == spec.index - 1
        if not is_right_stage:
            raise MessageError(Reason.WRONG_STAGE)
        if sender != (self._client if isinstance(message, Probe) else route[message.stage]):
            raise MessageError(Reason.WRONG_SENDER, sender)


def _only(payload: TensorPayload) -> "Tensor":
    return unpack((payload,))
