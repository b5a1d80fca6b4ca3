"""The client of one task: it feeds and follows the swarm, and reports what happens."""

import json
import math
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import structlog
import trio

from chain.state import Table
from tdml_p2p.blob_store import BlobStore, DiskFull
from tdml_p2p.errors import UserError
from tdml_p2p.swarm.evidence import EvidenceStore
from tdml_p2p.swarm.feed import ClientFeed
from tdml_p2p.swarm.governor import ChainGovernor, TaskEnded
from tdml_p2p.swarm.keeping import Keeper, has_room_for, until_lost
from tdml_p2p.swarm.material import Unavailable
from tdml_p2p.swarm.posting import Posted, Poster
from tdml_p2p.swarm.private import Links, hold_ends
from tdml_p2p.swarm.progress import Progress
from tdml_p2p.swarm.replay import NotReplayable
from tdml_p2p.swarm.saving import History, Saver, copy_chain
from tdml_p2p.swarm.states import fetch_state
from tdml_p2p.swarm.tracing import TraceCollector
from tdml_p2p.swarm.transport import SwarmTransport
from tdml_p2p.swarm.watching import Watcher
from trainer.base_weights import base_layout
from trainer.coordinator import Coordinator, StageFull, StageLost, StepFailed
from trainer.coordinator_ports import (
    CoordinatorConfig,
    CoordinatorPorts,
    Outvoted,
    StepDone,
    Suspicious,
    SwarmEvent,
    patience_for,
)
from trainer.ends import with_ends
from trainer.footprint import largest, size_text
from trainer.state import StageState
from trainer.trace import recording
from trainer.worker_ports import StateUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tdml_p2p.config import TrainConfig
    from tdml_p2p.peer import Peer
    from tdml_p2p.swarm.preparation import Prepared

log = structlog.get_logger(__name__)

INTERRUPTED = 130
_MOVED = -1
_VACANT_SECONDS = 7 * 24 * 3600.0
_PEER_SECONDS = 60.0
_SEAT_SECONDS = 300.0
_ENDED = ("passed", "convicted", "acquitted", "faulted", "undecided", "withheld", "absent")


class SwarmClient:
    """One training run from this peer; `run` returns the exit code."""

    def __init__(
        self, peer: "Peer", prepared: "Prepared", train: "TrainConfig", report: "Callable[[dict[str, Any]], None]"
    ) -> None:
        self._peer = peer
        self._prepared = prepared
        self._train = train
        self._report = report
        former = prepared.checkpoint
        history = History(*(dict(former.losses), dict(former.validation)) if former else ({}, {}))
        self._progress = Progress(report, history)
        self._poster = Poster(peer, train.out, train.price, report)
        self._saver: Saver | None = None
        self._scope: trio.CancelScope | None = None
        self._is_interrupted = False
        self._transport: SwarmTransport | None = None
        self._task = b""
        self._keeper: Keeper | None = None
        self._watcher: Watcher | None = None
        self._is_lost = False
        self._trace: TraceCollector | None = None

    def interrupt(self) -> None:
        """Stop training; a resumable state is saved first. Before the first step there is nothing to save."""
        self._is_interrupted = True
        if self._scope is not None:
            self._scope.cancel()

    async def run(self) -> int:
        """Train to the end, or to the interruption."""
        with self._interruptible() as scope:
            await self._wait_for_peers()
        if scope.cancelled_caught:
            return INTERRUPTED
        posted = await self._poster.open(self._prepared)
        if posted is None:
            self._report_done(self._prepared.manifest.total_steps)
            return 0
        code = await self._train_posted(posted)
        while code == _MOVED:
            kept = self._keeper.states if self._keeper is not None else ()
            checkpoint = None if self._saver is None else await self._saver.newest(kept)
            start = self._prepared.manifest.start if checkpoint is None else checkpoint.step
            self._report({"event": "moved", "task": self._task.hex(), "step": start})
            code = await self._train_posted(await self._poster.move(self._task, self._prepared, checkpoint))
        return code

    async def _train_posted(self, posted: Posted) -> int:
        self._prepared, self._task = posted.prepared, posted.task
        self._keeper = None
        history, chain = self._progress.history, self._peer.home.chain_path
        self._saver = Saver(self._train.out, posted, history, self._report, self._seal, chain)
        folders = (self._train.out, self._peer.home.tasks_path / self._task.hex())
        self._progress.begin(posted.prepared.manifest, folders)
        await self._saver.save_start()
        code = await self._run_task(posted)
        if code == INTERRUPTED and not self._progress.has_stepped and posted.resume is None:
            await self._poster.close(self._task)
        return code

    async def _run_task(self, posted: Posted) -> int:
        peer = self._peer
        feed = ClientFeed(peer.key, self._task, self._prepared)
        assert peer.swarm is not None  # every peer has a swarm service
        peer.swarm.add_source(feed.blob)
        peer.swarm.describe_more = feed.describe
        governor = ChainGovernor(peer.engine, self._task, posted.resume)
        transport = SwarmTransport(
            self._task, peer.key, peer.name, peer.network.tensors, partial(peer.swarm.is_member, self._task)
        )
        self._transport = transport
        if self._train.trace is not None:
            self._trace = TraceCollector(self._task, peer.name, peer.network, governor)
        try:
            with recording(None if self._trace is None else self._trace.recorder):
                return await self._run_parts(governor, transport, feed, posted)
        finally:
            transport.close()
            if self._trace is not None and self._train.trace is not None:
                self._save_trace(self._trace, self._train.trace)

    def _save_trace(self, trace: TraceCollector, path: "Path") -> None:
        try:
            trace.save(path)
        except OSError as error:
            self._report_unsaved(f"The trace could not be written: {error}.", "nothing else depends on it")

    async def _run_parts(
        self, governor: ChainGovernor, transport: SwarmTransport, feed: ClientFeed, posted: Posted
    ) -> int:
        """Run what follows the chain, the transport and the coordinator until the training ends."""
        assert self._saver is not None
        self._keeper = Keeper(governor, partial(has_room_for, posted.prepared.manifest))
        self._watcher = Watcher(self._peer, self._task)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(governor.run)
            nursery.start_soon(self._progress.follow, self._peer.engine, self._task.hex())
            nursery.start_soon(transport.run)
            nursery.start_soon(self._watcher.run)
            nursery.start_soon(self._announce)
            links = Links(governor, transport, self._fetch_state)
            if posted.prepared.manifest.private:
                recorder = None if self._trace is None else self._trace.recorder
                ends = await hold_ends(self._peer, posted, transport, recorder)
                nursery.start_soon(ends.run)
                links = ends.around(links)
            coordinator = self._coordinator(links, feed)
            nursery.start_soon(self._saver.run, coordinator, governor)
            nursery.start_soon(self._keeper.run, coordinator)
            nursery.start_soon(self._watch, coordinator, governor)
            if self._trace is not None:
                nursery.start_soon(self._trace.run)
            code = await self._train_on(coordinator, governor)
            nursery.cancel_scope.cancel()
        return code

    async def _watch(self, coordinator: Coordinator, governor: ChainGovernor) -> None:
        """Stop training when a stage is lost that others could take over in a new task."""
        await until_lost(coordinator, governor)
        self._is_lost = True
        if self._scope is not None:
            self._scope.cancel()

    @contextmanager
    def _interruptible(self) -> "Iterator[trio.CancelScope]":
        with trio.CancelScope() as self._scope:
            if self._is_interrupted:
                self._scope.cancel()
            yield self._scope

    # before the swarm

    async def _wait_for_peers(self) -> None:
        with trio.move_on_after(_PEER_SECONDS):
            while not self._peer.network.peers() or self._peer.engine.status()["syncing"]:
                await trio.sleep(0.1)
            return
        raise UserError(
            "No peer of the network was reached.", "give the invite line of a running peer with --join INVITE"
        )

    async def _announce(self) -> None:
        record = json.dumps({"manifest": self._prepared.manifest.address.hex()}).encode()
        await self._peer.network.discovery.announce(f"task/{self._task.hex()}", record)
        await self._peer.network.discovery.announce("tasks", self._task)

    async def _wait_for_seats(self, governor: ChainGovernor) -> None:
        manifest = self._prepared.manifest
        with trio.move_on_after(math.inf if self._is_lost else _SEAT_SECONDS):
            self._is_lost = False
            quiet = 0
            while True:
                members = governor.current()
                stages = members.stages
                if all(len(peers) >= manifest.replicas for peers in stages):
                    break
                quiet = quiet + 1 if all(len(peers) >= manifest.quorum for peers in stages) else 0
                if quiet > 5:
                    break  # every stage has somebody, and nobody else has come for some blocks
                await self._peer.next_block()
            stages = with_ends(members, self._peer.name).stages if manifest.private else stages
            self._progress.formed(stages)
            return
        raise UserError(
            f"Too few peers took a seat: some stage has {'nobody' if manifest.quorum == 1 else 'no majority'}.",
            f"start {len(manifest.seated) * manifest.quorum} peers or more with `tdml-peer start --join INVITE`; "
            f"the largest seat takes about {self._need()} of memory",
        )

    # while it runs

    def _coordinator(self, links: Links, feed: ClientFeed) -> Coordinator:
        manifest = self._prepared.manifest
        widest = max(base_layout(manifest, stage).total for stage in range(manifest.stages))
        patience = replace(patience_for(widest, manifest.positions), vacant=_VACANT_SECONDS)
        config = CoordinatorConfig(manifest, patience, self._train.eval_every)
        ports = CoordinatorPorts(
            governor=links.governor,
            batches=self._prepared.batches,
            report=self._on_event,
            fetch_state=links.fetch_state,
            source=lambda step, stage: feed.source(step, stage, self._peer.name),
            validation=self._prepared.validation,
        )
        return Coordinator(config, links.transport, ports)

    def _seal(self) -> str:
        """Return HEIGHT:HASH of the newest final block."""
        status = self._peer.engine.status()
        return f"{status['height']}:{status['block_hash']}"

    async def _train_on(self, coordinator: Coordinator, governor: ChainGovernor) -> int:
        states: tuple[StageState, ...] = ()
        assert self._saver is not None
        try:
            with self._interruptible() as scope:
                await self._wait_for_seats(governor)
                if self._trace is not None:
                    await self._trace.collect()  # workers record from the first step on
                states = await coordinator.run()
            if self._trace is not None:
                await self._trace.collect()
            if scope.cancelled_caught and self._is_lost and not self._is_interrupted:
                return _MOVED
            if scope.cancelled_caught:
                await self._save_stopped(coordinator, governor)
                return INTERRUPTED
        except (StageLost, StateUnavailable, TaskEnded) as error:
            if self._keeper is not None and self._keeper.states and isinstance(error, StateUnavailable):
                return _MOVED
            raise UserError(f"The swarm was lost: {error}.", "continue with --resume when peers are back") from None
        except (StepFailed, StageFull) as error:
            raise await self._stopped_by(error, coordinator, governor) from None
        await self._saver.save_end(states)
        await self._poster.close(self._task)
        await self._save_evidence()
        await copy_chain(self._peer.home.chain_path, self._train.out)
        self._report_done(self._prepared.manifest.start + states[0].step)
        return 0

    async def _save_evidence(self) -> None:
        """Leave what the task's verdicts rest on beside the model, so that they can be replayed without any peer."""
        assert self._peer.swarm is not None
        out = self._train.out
        store = EvidenceStore(out / "evidence", BlobStore(out / "blobs"))
        verdicts = self._peer.engine.state.tables[Table.CONVICTIONS].values()
        for conviction in verdicts:
            if conviction.task == self._task and conviction.kind == 0:
                try:
                    await self._peer.swarm.collect(conviction.subject, store)
                except (NotReplayable, Unavailable) as error:
                    log.warning("evidence is not saved", audit=conviction.subject.hex(), reason=str(error))
                except (DiskFull, OSError) as error:
                    reason = f"The evidence of a verdict could not be written: {error}."
                    self._report_unsaved(reason, "the model itself is complete; `tdml-chain audit` gives it again")

    async def _save_stopped(self, coordinator: Coordinator, governor: ChainGovernor) -> None:
        """Save the newest state of a run that goes on no further, if it has one, and the chain so far."""
        assert self._saver is not None
        if not self._progress.has_stepped:
            return
        await self._saver.save_interrupted(coordinator, governor)
        try:
            with trio.CancelScope(shield=True):
                await copy_chain(self._peer.home.chain_path, self._train.out)
        except UserError as error:
            self._report_unsaved(error.message, error.hint)

    def _report_unsaved(self, reason: str, hint: str) -> None:
        self._report({"event": "not-saved", "reason": reason, "hint": hint})

    async def _stopped_by(
        self, error: StepFailed | StageFull, coordinator: Coordinator, governor: ChainGovernor
    ) -> UserError:
        """Save the last good state of a run that cannot go on, and return what to tell its owner."""
        await self._save_stopped(coordinator, governor)
        step = self._progress.of_training(error.step)
        if isinstance(error, StageFull):
            return UserError(
                f"Training stopped: in step {step} nobody who holds stage {error.stage} has the memory for it.",
                f"it takes about {self._need()}: continue with --resume when larger peers are there, or start again "
                "with more --stages or a smaller --batch; the state before this step was saved",
            )
        return UserError(
            f"Training stopped: in step {step}, stage {error.stage}, {error.what} is not finite, wherever computed.",
            "start again with a lower --learning-rate or with --clip; the state before this step was saved",
        )

    def _need(self) -> str:
        """Return in words how much memory the largest seat takes."""
        return size_text(largest(self._prepared.manifest).total)

    def _report_done(self, steps: int) -> None:
        done = {"out": str(self._train.out), "task": self._task.hex(), "steps": steps}
        self._report({"event": "done", **done, "loss": self._progress.history.losses.get(steps, math.nan)})

    def _on_event(self, event: SwarmEvent) -> None:
        assert self._transport is not None
        assert self._saver is not None
        self._progress.on_event(event, self._transport.bytes_sent)
        if isinstance(event, Outvoted | Suspicious) and self._watcher is not None:
            self._watcher.note(event)
        if isinstance(event, StepDone):
            if self._trace is not None:
                self._trace.note_step(event)
            self._saver.note(event, self._train.save_every)
            if self._keeper is not None:
                self._keeper.note(event)

    async def _fetch_state(self, root: bytes, holders: tuple[str, ...]) -> StageState:
        assert self._peer.swarm is not None
        return await fetch_state(self._peer.swarm.library.fetch, root, holders)
