"""The client's side of the step: route, feed, gather every cell exactly once, reduce, commit.

The coordinator hands out tokens and labels and keeps the books; activations and gradients go from worker
to worker. It sees the chain through a `Governor` only, and the network through a `Transport`.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import trio

from trainer.coordinator_pace import Pace
from trainer.coordinator_ports import (
    CoordinatorConfig,
    CoordinatorPorts,
    Governor,
    Members,
    NotValidated,
    RolledBack,
    StepDone,
)
from trainer.coordinator_probe import Evaluation
from trainer.coordinator_repair import StageFull, StageLost, StepFailed
from trainer.coordinator_state import SwarmState
from trainer.coordinator_swarm import Swarm
from trainer.messages import Message
from trainer.payloads import MessageError, Reason
from trainer.state import StageState
from trainer.transport import Transport
from trainer.worker_mail import Outbox

__all__ = ["Coordinator", "Governor", "Members", "StageFull", "StageLost", "StepFailed"]


class _GenerationEndedError(Exception):
    """A verdict convicted a worker while a step was under way."""


class _ReopenedError(Exception):
    """The step under way begins again."""


class Coordinator:
    """The client of one task."""

    def __init__(self, config: CoordinatorConfig, transport: Transport, ports: CoordinatorPorts) -> None:
        self._config = config
        self._transport = transport
        self._ports = ports
        self._outbox = Outbox(transport, self._on_undelivered)
        self._state = SwarmState(config, ports, self._outbox.post, Pace(config.patience))
        self._swarm = Swarm(self._state)
        self._next_check = 0.0

    @property
    def refused(self) -> Counter[Reason]:
        """How many messages were refused, by reason."""
        return self._swarm.refused

    async def run(self) -> tuple[StageState, ...]:
        """Train all steps that are left and return the final state of every stage.

        Raises `StageLost` when a stage has had no worker for too long, `StageFull` when nobody of one has the memory
        for a cell, `StepFailed` for a step that is not finite, `StateUnavailable` when no holder gives a final state.
        """
        try:
            async with trio.open_nursery() as nursery:
                self._outbox.open(nursery)
                await self._train()
                states = await self.fetch_states()
                self._swarm.finish()
                with trio.move_on_after(self._config.patience.floor):
                    await self._outbox.flush()
                nursery.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            if len(group.exceptions) == 1:
                raise group.exceptions[0] from None
            raise
        return states

    @property
    def step(self) -> int:
        """The last committed step."""
        return self._state.step

    @property
    def empty_since(self) -> float | None:
        """Since when some stage has had no worker that gets on, None while every stage has one."""
        return self._swarm.repairs.empty_since

    @property
    def ready(self) -> tuple[tuple[str, ...], ...]:
        """The workers that take part and get on, by stage; none of the ends that a private run's client holds."""
        stuck = self._swarm.repairs.stuck_stages
        return tuple(
            () if stage in stuck else self._state.roster.ready(stage) for stage in self._config.manifest.seated
        )

    async def fetch_states(self, step: int | None = None) -> tuple[StageState, ...]:
        """Return every stage's state after `step`, the last committed one by default, from those who hold it.

        Raises `KeyError` for a step that is not known any more, `StateUnavailable` when nobody gives a state.
        """
        state, states = self._state, []
        roots = [state.roots[state.step if step is None else step, stage] for stage in range(state.roster.stages)]
        for stage, root in enumerate(roots):
            states.append(await self._ports.fetch_state(root, state.roster.ready(stage)))
        return tuple(states)

    async def _train(self) -> None:
        state, governor = self._state, self._ports.governor
        steps = self._config.manifest.steps
        while True:
            asked, is_over = self._ports.clock(), state.step >= steps
            try:
                members = governor.current()
                if members.generation == state.generation:
                    members = await (governor.settled(steps) if is_over else governor.admit(state.step + 1))
                if members.generation != state.generation:
                    await self._form(members)
                elif is_over:
                    return
                elif state.must_reopen:
                    self._swarm.reopen()
                    await self._pump(lambda: self._swarm.is_formed)
                else:
                    self._swarm.update(members)
                    await self._run_step(self._ports.clock() - asked)
            except (_GenerationEndedError, _ReopenedError):
                continue

    async def _form(self, members: Members) -> None:
        if self._state.generation >= 0:
            self._ports.report(RolledBack(members.generation, members.resume_step))
        self._swarm.form(members)
        await self._pump(lambda: self._swarm.is_formed)
        self._swarm.agree()

    async def _run_step(self, waited: float) -> None:
        swarm, started = self._swarm, self._ports.clock()
        while self._state.roster.empty_stages():
            await self._pump(lambda: not self._state.roster.empty_stages())
            swarm.agree()
        book = swarm.open()
        while not swarm.is_reduced:
            if swarm.is_summed:
                swarm.apply(book)
            else:
                await self._pump(lambda: book.is_complete and swarm.has_no_newcomer)
                swarm.reduce(book)
            await self._pump(lambda: swarm.is_reduced or swarm.is_summed or not book.is_complete)
        swarm.commit(book)
        seconds, tokens = self._ports.clock() - started, self._config.manifest.tokens_per_step
        done = StepDone(book.step, book.generation, book.loss, tokens, seconds, waited, shares=swarm.shares(book))
        try:
            done = replace(done, validation=await self._evaluate(max(self._config.patience.first, seconds)))
        finally:
            self._ports.report(done)

    async def _evaluate(self, patience: float) -> float | None:
        """Return the loss on the text that is never trained on, if it is due and all workers stay to measure it."""
        manifest, every, kept = self._config.manifest, self._config.eval_every, self._ports.validation
        step = manifest.start + self._state.step
        if kept is None or not every or (step % every and step != manifest.total_steps):
            return None
        evaluation = self._swarm.evaluation = Evaluation(self._state, kept, patience)
        try:
            evaluation.start()
            await self._pump(lambda: evaluation.is_over)
        finally:
            self._swarm.evaluation = None
        if evaluation.loss is None:
            self._ports.report(NotValidated(self._state.step))
        return evaluation.loss

    async def _pump(self, is_over: Callable[[], bool]) -> None:
        """Take messages and act on deadlines until `is_over`; raise when the generation ends or the step reopens."""
        while self._state.must_reopen or not is_over():
            if self._state.must_reopen:
                raise _ReopenedError
            with trio.move_on_after(self._config.patience.tick):
                self._swarm.take(await self._transport.receive())
            if self._ports.clock() < self._next_check:
                continue
            self._next_check = self._ports.clock() + self._config.patience.tick
            members = self._ports.governor.current()
            if members.generation != self._state.generation:
                raise _GenerationEndedError
            self._swarm.update(members)
            self._swarm.repairs.tick()

    def _on_undelivered(self, to: str, message: Message) -> None:
        try:
            self._swarm.repairs.lose(to, "lost")
        except MessageError as stranger:
            self._swarm.refused[stranger.reason] += 1
