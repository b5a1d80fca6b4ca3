"""The client of one task: it feeds and follows the swarm, and reports what happens."""

import json
import math
from collections import Counter
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import structlog
import trio

from tdml_p2p.errors import UserError
from tdml_p2p.swarm.feed import ClientFeed
from tdml_p2p.swarm.governor import ChainGovernor, TaskEnded
from tdml_p2p.swarm.posting import Posted, Poster
from tdml_p2p.swarm.saving import Saver, copy_chain
from tdml_p2p.swarm.states import fetch_state
from tdml_p2p.swarm.transport import SwarmTransport
from trainer.coordinator import Coordinator, StageLost
from trainer.coordinator_ports import (
    CoordinatorConfig,
    CoordinatorPorts,
    PeerJoined,
    PeerLeft,
    Rerouted,
    RolledBack,
    StageEmpty,
    StepDone,
    SwarmEvent,
)
from trainer.state import StageState
from trainer.worker_ports import StateUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tdml_p2p.config import TrainConfig
    from tdml_p2p.peer import Peer
    from tdml_p2p.swarm.preparation import Prepared

log = structlog.get_logger(__name__)

INTERRUPTED = 130
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
        self._losses: dict[int, float] = dict(prepared.checkpoint.losses) if prepared.checkpoint else {}
        self._counts: Counter[str] = Counter()
        self._poster = Poster(peer, train.out, train.price, report)
        self._saver: Saver | None = None
        self._scope: trio.CancelScope | None = None
        self._has_stepped = False
        self._is_interrupted = False
        self._transport: SwarmTransport | None = None
        self._task = b""

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
        self._prepared, self._task = posted.prepared, posted.task
        self._saver = Saver(self._train.out, posted, self._losses, self._report)
        await self._saver.save_start()
        code = await self._run_task(posted)
        if code == INTERRUPTED and not self._has_stepped and posted.resume is None:
            await self._poster.close(self._task)
        return code

    async def _run_task(self, posted: Posted) -> int:
        peer, saver = self._peer, self._saver
        feed = ClientFeed(peer.key, self._task, self._prepared)
        assert peer.swarm is not None  # every peer has a swarm service
        assert saver is not None
        peer.swarm.add_source(feed.blob)
        peer.swarm.describe_more = feed.describe
        governor = ChainGovernor(peer.engine, self._task, posted.resume)
        transport = SwarmTransport(
            self._task, peer.key, peer.name, peer.network.tensors, partial(peer.swarm.is_member, self._task)
        )
        self._transport = transport
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(governor.run)
                nursery.start_soon(self._follow)
                nursery.start_soon(transport.run)
                nursery.start_soon(self._announce)
                coordinator = self._coordinator(governor, transport, feed)
                nursery.start_soon(saver.run, coordinator, governor)
                code = await self._train_on(coordinator, governor)
                nursery.cancel_scope.cancel()
            return code
        finally:
            transport.close()

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
        with trio.move_on_after(_SEAT_SECONDS):
            quiet = 0
            while True:
                stages = governor.current().stages
                if all(len(peers) >= manifest.replicas for peers in stages):
                    break
                quiet = quiet + 1 if all(stages) else 0
                if quiet > 5:
                    break  # every stage has somebody, and nobody else has come for some blocks
                await self._peer.next_block()
            self._report({"event": "formed", "stages": [list(p) for p in stages], "steps": manifest.total_steps})
            return
        raise UserError(
            "Too few peers took a seat: some stage has nobody.",
            f"start {manifest.stages} peers or more with `tdml-peer start --join INVITE`",
        )

    # while it runs

    def _coordinator(self, governor: ChainGovernor, transport: SwarmTransport, feed: ClientFeed) -> Coordinator:
        config = CoordinatorConfig(self._prepared.manifest)
        ports = CoordinatorPorts(
            governor=governor,
            batches=self._prepared.batches,
            report=self._on_event,
            fetch_state=self._fetch_state,
            source=lambda step, stage: feed.source(step, stage, self._peer.name),
        )
        return Coordinator(config, transport, ports)

    async def _train_on(self, coordinator: Coordinator, governor: ChainGovernor) -> int:
        states: tuple[StageState, ...] = ()
        assert self._saver is not None
        try:
            with self._interruptible() as scope:
                await self._wait_for_seats(governor)
                states = await coordinator.run()
            if scope.cancelled_caught:
                if self._has_stepped:
                    await self._saver.save_interrupted(coordinator, governor)
                return INTERRUPTED
        except (StageLost, StateUnavailable, TaskEnded) as error:
            raise UserError(f"The swarm was lost: {error}.", "continue with --resume when peers are back") from None
        await self._saver.save_end(states)
        await self._poster.close(self._task)
        await copy_chain(self._peer.home.chain_path, self._train.out)
        self._report_done(self._prepared.manifest.start + states[0].step)
        return 0

    def _report_done(self, steps: int) -> None:
        done = {"out": str(self._train.out), "task": self._task.hex(), "steps": steps}
        self._report({"event": "done", **done, "loss": self._losses.get(steps, math.nan)})

    def _on_event(self, event: SwarmEvent) -> None:
        match event:
            case StepDone():
                self._on_step(event)
            case Rerouted():
                self._report(
                    {
                        "event": "rerouted",
                        "step": self._of_training(event.step),
                        "stage": event.stage,
                        "peer": event.peer,
                        "cells": list(event.cells),
                        "reason": event.why,
                    }
                )
            case RolledBack():
                step = self._of_training(event.resume_step)
                self._report({"event": "rollback", "generation": event.generation, "step": step})
            case PeerLeft():
                self._report_peer("left", event, event.why)
            case PeerJoined():
                self._report_peer("joined", event, "")
            case StageEmpty():
                step = self._of_training(event.step)
                self._report({"event": "waiting", "step": step, "stage": event.stage})

    def _of_training(self, step: int) -> int:
        """Return which step of the whole training a step of this task is."""
        return self._prepared.manifest.start + step

    def _report_peer(self, name: str, event: PeerLeft | PeerJoined, why: str) -> None:
        step = self._of_training(event.step)
        self._report({"event": name, "step": step, "stage": event.stage, "peer": event.peer, "reason": why})

    def _on_step(self, event: StepDone) -> None:
        assert self._transport is not None
        assert self._saver is not None
        step = self._of_training(event.step)
        self._losses[step], self._has_stepped = event.loss, True
        line = {
            "step": step,
            "loss": event.loss,
            "tokens_per_second": event.tokens / max(event.seconds, 1e-9),
            "seconds": event.seconds,
            "waited": event.waited,
            "bytes_sent": self._transport.bytes_sent,
            "audits": sum(self._counts[kind] for kind in _ENDED),
            "faults": self._counts["disputed"],
            "generation": event.generation,
        }
        for folder in (self._train.out, self._peer.home.tasks_path / self._task.hex()):
            _append(folder / "metrics.jsonl", line)
        self._report({"event": "step", **line})
        self._saver.note(event, self._train.save_every)

    async def _follow(self) -> None:
        """Count the task's audits and report evictions, as final blocks bring them."""
        task = self._task.hex()
        async with self._peer.engine.subscribe() as blocks:
            async for committed in blocks:
                for event in committed.events:
                    if event.data.get("task") != task:
                        continue
                    self._counts[event.kind] += 1
                    if event.kind == "evicted":
                        self._report_eviction(event.data)

    def _report_eviction(self, data: dict[str, Any]) -> None:
        self._report(
            {
                "event": "evicted",
                "peer": data["worker"],
                "task": data["task"],
                "step": self._of_training(data["step"]),
                "reason": data["reason"],
                "evidence": data["evidence"],
            }
        )

    async def _fetch_state(self, root: bytes, holders: tuple[str, ...]) -> StageState:
        assert self._peer.swarm is not None
        return await fetch_state(self._peer.swarm.library.fetch, root, holders)


def _append(path: Path, line: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(msgspec.json.encode(line) + b"\n")
