"""The client's side of validating between steps: probes out, losses in; a worker that dies costs only this."""

from dataclasses import dataclass, field
from statistics import fmean

from trainer.coordinator_state import SwarmState
from trainer.data import HeldBack
from trainer.messages import Probe, Probed
from trainer.payloads import MessageError, Reason, pack


@dataclass
class Evaluation:
    """Probes of the state after the last committed step, on all ready workers in turn.

    Only as many are under way as keep every stage busy, so that no worker has to hold more.
    """

    state: SwarmState
    validation: HeldBack
    patience: float
    losses: dict[int, float] = field(default_factory=dict)
    routes: tuple[tuple[str, ...], ...] = ()
    since: float = 0.0
    sent: int = 0

    def start(self) -> None:
        """Send the first micro-batches; without a worker in each stage there is nothing to be had."""
        state = self.state
        ready = [state.roster.ready(stage) for stage in range(state.roster.stages)]
        self.since = state.now()
        if not all(ready):
            return
        self.routes = tuple(tuple(peers[cell % len(peers)] for peers in ready) for cell in range(self.validation.count))
        for _ in range((len(ready) + 1) * max(map(len, ready))):
            self._send_next()

    @property
    def is_over(self) -> bool:
        """Whether all losses are in, or there is no use in waiting for them."""
        if len(self.losses) == len(self.routes) or any(loss != loss for loss in self.losses.values()):
            return True
        present = {peer for stage in range(self.state.roster.stages) for peer in self.state.roster.ready(stage)}
        waiting = [route for cell, route in enumerate(self.routes) if cell not in self.losses]
        is_broken = any(not present.issuperset(route) for route in waiting)
        return is_broken or self.state.now() - self.since > self.patience

    @property
    def loss(self) -> float | None:
        """Mean loss over all micro-batches, none if one of them is missing."""
        if not self.routes or len(self.losses) < len(self.routes):
            return None
        mean = fmean(self.losses[cell] for cell in range(len(self.routes)))
        return mean if mean == mean else None

    def note(self, sender: str, message: Probed) -> None:
        """Take a loss; raise `MessageError` for one that was not asked for or came before."""
        at = (self.state.generation, self.state.step)
        if (message.generation, message.step) != at or message.cell >= len(self.routes):
            raise MessageError(Reason.STALE_STEP, f"step {message.step}")
        route = self.routes[message.cell]
        if sender != route[-1] and (sender not in route or message.loss == message.loss):
            raise MessageError(Reason.WRONG_SENDER, sender)
        if message.cell in self.losses:
            raise MessageError(Reason.DUPLICATE)
        self.losses[message.cell] = message.loss
        self.since = self.state.now()
        self._send_next()

    def _send_next(self) -> None:
        if self.sent == len(self.routes):
            return
        cell, route, batch = self.sent, self.routes[self.sent], self.validation.batch(self.sent)
        payload = (*pack(batch.tokens), *pack(batch.labels))
        self.state.post(route[0], Probe(self.state.generation, self.state.step, cell, route, payload))
        self.sent += 1
