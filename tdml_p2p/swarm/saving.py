"""What a run leaves in its folder: verified checkpoints while it trains, the model at the end, the chain."""

import os
import sqlite3
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import structlog
import trio

from tdml_p2p.errors import UserError
from tdml_p2p.swarm.governor import ChainGovernor, TaskEnded
from tdml_p2p.swarm.posting import Posted
from trainer.checkpoint import Checkpoint, CheckpointError, resume, save
from trainer.coordinator import Coordinator
from trainer.coordinator_ports import StepDone
from trainer.errors import DataError
from trainer.state import StageState
from trainer.worker_ports import StateUnavailable

log = structlog.get_logger(__name__)

_FETCH_SECONDS = 120.0
_SLOW_LINK = 2e6
"""Bytes per second of the slowest link over which states are waited for when a run is interrupted."""
_PAUSES = (0.1, 0.3, 1.0)


@dataclass(frozen=True)
class History:
    """Losses of the whole training by step: of what it was trained on, and of what it never saw."""

    losses: dict[int, float]
    validation: dict[int, float]


class Saver:
    """Saves states of one run into `out`, with the chain's database, `chain`, that proves how they came about.

    `seal` says HEIGHT:HASH of the chain's newest block.
    """

    def __init__(
        self,
        out: Path,
        posted: Posted,
        history: History,
        report: Callable[[dict[str, Any]], None],
        seal: Callable[[], str] = str,
        chain: Path | None = None,
    ) -> None:
        self._out = out
        self._posted = posted
        self._history = history
        self._report = report
        self._seal = seal
        self._chain = chain
        self._turn = trio.Lock()
        # without a buffer: a step that comes due while another is being saved is left out
        self._due, self._taken = trio.open_memory_channel[StepDone](0)
        self.saved: int | None = None

    def note(self, event: StepDone, every: int) -> None:
        """Have the state after this step saved once it has settled, if it is one of every `every` steps."""
        manifest = self._posted.prepared.manifest
        step = manifest.start + event.step
        if not every or step % every or step >= manifest.total_steps:
            return
        try:
            self._due.send_nowait(event)
        except trio.WouldBlock:
            log.info("checkpoint left out: another is being saved", step=step)

    async def run(self, coordinator: Coordinator, governor: ChainGovernor) -> None:
        """Save what is due, beside the training, until cancelled. What fails is reported and left out.

        A state is fetched when it is new, while workers surely hold it, and written when all its audits ended.
        """
        async for event in self._taken:
            try:
                states = await self._verified(event, coordinator, governor)
                if states is not None:
                    await self._write(states)
            except (StateUnavailable, KeyError, TaskEnded) as error:
                step = self._posted.prepared.manifest.start + event.step
                log.warning("checkpoint left out", step=step, reason=str(error))
            except CheckpointError as error:
                self._report({"event": "not-saved", "reason": error.sentence, "hint": error.hint})

    async def save_start(self) -> None:
        """Save the given states of a new task, so that the run can be resumed from it at once."""
        prepared = self._posted.prepared
        if prepared.checkpoint is not None and self._posted.resume is None and prepared.states:
            await self._write_or_raise(prepared.states, is_verified=prepared.checkpoint.is_verified)

    async def save_end(self, states: tuple[StageState, ...]) -> None:
        """Save the final states; raise `UserError`."""
        await self._write_or_raise(states)

    async def save_interrupted(self, coordinator: Coordinator, governor: ChainGovernor) -> None:
        """Save the newest state that the workers hold; raise `UserError`.

        The last step's commit may not have reached them; the step before is then saved to start a new task from.
        """
        patience = _FETCH_SECONDS + 12 * self._posted.prepared.manifest.parameters / _SLOW_LINK
        with trio.CancelScope(shield=True, deadline=trio.current_time() + patience):
            generation, step = governor.current().generation, coordinator.step
            for candidate, at in ((step, generation), (step - 1, -1)):
                try:
                    states = await _fetch(coordinator, candidate)
                except (StateUnavailable, KeyError) as error:
                    log.warning("state not fetched", step=candidate, reason=str(error))
                    continue
                task = governor.task
                is_verified = task.generation == generation and task.settled >= candidate
                await self._write_or_raise(states, generation=at, is_verified=is_verified)
                return
        if self.saved is None:
            raise UserError(
                "The workers did not give their state.",
                "--resume continues from the newest state in the out folder, if there is one",
            )
        self._report({"event": "saved", "out": str(self._out), "step": self.saved})

    async def _verified(
        self, event: StepDone, coordinator: Coordinator, governor: ChainGovernor
    ) -> tuple[StageState, ...] | None:
        """Return the states after a step once it has settled, None after a rollback."""
        if governor.current().generation != event.generation:
            return None
        states = await _fetch(coordinator, event.step)
        if governor.current().generation != event.generation:
            return None
        members = await governor.settled(event.step)
        return states if members.generation == event.generation else None

    async def _write_or_raise(
        self, states: tuple[StageState, ...], *, generation: int = -1, is_verified: bool = True
    ) -> None:
        try:
            await self._write(states, generation=generation, is_verified=is_verified)
        except CheckpointError as error:
            raise UserError(error.sentence, error.hint) from None

    async def _write(self, states: tuple[StageState, ...], *, generation: int = -1, is_verified: bool = True) -> None:
        checkpoint = self.checkpoint(states, generation=generation, is_verified=is_verified)
        async with self._turn:
            # before the states: whatever happens in between, the block that they name is there
            await self._copy_chain()
            await trio.to_thread.run_sync(save, checkpoint, self._out)
        self.saved = checkpoint.step
        self._report({"event": "saved", "out": str(self._out), "step": self.saved})

    async def _copy_chain(self) -> None:
        """Leave beside the states what proves them; a run goes on without it, and says so."""
        if self._chain is None:
            return
        try:
            await copy_chain(self._chain, self._out)
        except UserError as error:
            self._report({"event": "not-saved", "reason": error.message, "hint": error.hint})

    async def newest(self, kept: tuple[StageState, ...]) -> Checkpoint | None:
        """Return the newer of two verified checkpoints of the task: what is kept in memory, and what was saved."""
        held = self.checkpoint(kept) if kept else None
        try:
            saved = await trio.to_thread.run_sync(partial(resume, self._out, is_verified=True))
        except (CheckpointError, DataError) as error:
            log.debug("no verified checkpoint in the folder", reason=error.sentence)
            return held
        is_own = saved.task == self._posted.task.hex()
        return saved if is_own and (held is None or held.step < saved.step) else held

    def checkpoint(
        self, states: tuple[StageState, ...], *, generation: int = -1, is_verified: bool = True
    ) -> Checkpoint:
        """Return what would be saved of these states."""
        prepared = self._posted.prepared
        step = prepared.manifest.start + states[0].step
        return Checkpoint(
            manifest=prepared.manifest,
            states=states,
            tokenizer=prepared.tokenizer,
            losses=_until(step, self._history.losses),
            task=self._posted.task.hex(),
            generation=generation,
            is_verified=is_verified,
            data=prepared.batches.data,
            tokens=prepared.batches.tokens,
            validation=_until(step, self._history.validation),
            sealed_by=self._seal(),
            base="" if prepared.frozen is None else str(prepared.frozen.folder),
        )


def _until(step: int, losses: Mapping[int, float]) -> tuple[tuple[int, float], ...]:
    return tuple((done, loss) for done, loss in sorted(losses.items()) if done <= step)


async def _fetch(coordinator: Coordinator, step: int) -> tuple[StageState, ...]:
    """Return the states after a step, asked for again while its commit may still be on the way to the workers."""
    for pause in _PAUSES:
        try:
            return await coordinator.fetch_states(step)
        except StateUnavailable as error:
            log.debug("state not there yet", step=step, reason=str(error))
        await trio.sleep(pause)
    return await coordinator.fetch_states(step)


async def copy_chain(source: Path, out: Path) -> None:
    """Leave the chain's database beside the model, the evidence of how it was trained; raise `UserError`."""
    try:
        await trio.to_thread.run_sync(_copy_database, source, out / "chain.db")
    except (sqlite3.Error, OSError) as error:
        raise UserError(
            f"The chain's database could not be copied to {out}: {error}.",
            f"the model itself is complete; copy {source} by hand once there is room",
        ) from None


def _copy_database(source: Path, target: Path) -> None:
    pending = target.with_name(f".{target.name}.pending")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with (
            closing(sqlite3.connect(f"file:{source}?mode=ro", uri=True)) as live,
            closing(sqlite3.connect(pending)) as copy,
        ):
            live.backup(copy)
            # One file, which reading leaves as it is: a write-ahead log would come back with every reader.
            copy.execute("PRAGMA journal_mode = DELETE")
        os.replace(pending, target)
    finally:
        pending.unlink(missing_ok=True)
