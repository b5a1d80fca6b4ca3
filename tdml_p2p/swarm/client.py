"""The client of one task: funds, posting, feeding, following, saving."""

import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import structlog
import trio

from chain.engine import SubmitRefused, TransactionExpired
from chain.ledger.tasks import bond_for
from chain.transactions import CloseTask, Faucet, Payload, PostTask
from tdml_p2p.errors import UserError
from tdml_p2p.swarm.feed import ClientFeed
from tdml_p2p.swarm.governor import ChainGovernor, TaskEnded
from tdml_p2p.swarm.preparation import DEPTH
from tdml_p2p.swarm.states import fetch_state
from tdml_p2p.swarm.transport import SwarmTransport
from trainer.checkpoint import Checkpoint, CheckpointError, save
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
from trainer.manifest import encode_manifest
from trainer.state import StageState
from trainer.worker_ports import StateUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable

    from tdml_p2p.config import TrainConfig
    from tdml_p2p.peer import Peer
    from tdml_p2p.swarm.preparation import Prepared

log = structlog.get_logger(__name__)

LIFETIME_BLOCKS = 100_000
_PEER_SECONDS = 60.0
_SEAT_SECONDS = 300.0
_SAVE_SECONDS = 120.0
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
        self._running: trio.CancelScope | None = None
        self._is_interrupted = False
        self._transport: SwarmTransport | None = None
        self._task = b""

    def interrupt(self) -> None:
        """Stop training; a resumable state is saved first."""
        self._is_interrupted = True
        if self._running is not None:
            self._running.cancel()

    async def run(self) -> int:
        """Train to the end, or to the interruption."""
        peer = self._peer
        await self._wait_for_peers()
        await self._publish()
        self._task = await self._find_or_post()
        feed = ClientFeed(peer.key, self._task, self._prepared)
        assert peer.swarm is not None  # every peer has a swarm service
        peer.swarm.add_source(feed.blob)
        peer.swarm.describe_more = feed.describe
        governor = ChainGovernor(peer.engine, self._task, self._resume_step())
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
                await self._wait_for_seats(governor)
                code = await self._coordinate(governor, transport, feed)
                nursery.cancel_scope.cancel()
            return code
        finally:
            transport.close()

    # before the swarm

    async def _wait_for_peers(self) -> None:
        with trio.move_on_after(_PEER_SECONDS):
            while not self._peer.network.peers() or self._peer.engine.status()["syncing"]:
                await trio.sleep(0.1)
            return
        raise UserError(
            "No peer of the network was reached.", "give the invite line of a running peer with --join INVITE"
        )

    async def _publish(self) -> None:
        blobs, prepared = self._peer.network.blobs, self._prepared
        address = await blobs.put(encode_manifest(prepared.manifest))
        assert address == prepared.manifest.address  # both are the BLAKE3 address of the same bytes
        if not prepared.tokenizer.is_bytes:
            await blobs.put(prepared.tokenizer.json)

    async def _find_or_post(self) -> bytes:
        """Return the id of the task: on resuming the one that is still open, else a new one."""
        manifest = self._prepared.manifest
        mine = [
            task
            for task in self._peer.engine.state.open_tasks()
            if task.client == self._peer.key.account and task.manifest == manifest.address
        ]
        if mine and self._train.resume:
            self._report({"event": "posted", "task": mine[-1].id.hex(), "resumed": True})
            return mine[-1].id
        if self._train.resume:
            raise UserError(
                "The task of this run is no longer open on chain.",
                "start a new run; the model saved so far stays in the out folder",
            )
        return await self._post()

    async def _post(self) -> bytes:
        manifest, price = self._prepared.manifest, self._train.price
        params = self._peer.engine.state.params
        rate = max(manifest.audit.rate, params.floor_rate)
        cells = manifest.steps * manifest.stages * manifest.microbatches
        post = PostTask(
            manifest=manifest.address,
            stages=manifest.stages,
            replicas=manifest.replicas,
            steps=manifest.steps,
            microbatches=manifest.microbatches,
            price=price,
            escrow=2 * cells * price,
            worker_bond=bond_for(price, rate, params.colluding_share, DEPTH * manifest.microbatches),
            audit_rate=rate,
            depth=DEPTH,
            lifetime=LIFETIME_BLOCKS,
        )
        await self._fund(post.escrow)
        before = {task.id for task in self._peer.engine.state.open_tasks()}
        await self._submit(post)
        for task in self._peer.engine.state.open_tasks():
            if task.id not in before and task.client == self._peer.key.account:
                self._report({"event": "posted", "task": task.id.hex(), "resumed": False})
                return task.id
        raise UserError("The task is not on chain although it was accepted.", "try again")

    async def _fund(self, amount: int) -> None:
        """See that the account can pay: wait for the wallet's own grant, or ask the faucet for it."""
        state, account = self._peer.engine.state, self._peer.key.account
        if state.account(account).balance >= amount:
            return
        if state.params.faucet_grant and not state.account(account).granted:
            with trio.move_on_after(20):
                while not self._peer.engine.state.account(account).granted:
                    await self._peer.next_block()
            if not self._peer.engine.state.account(account).granted:
                await self._submit(Faucet())
        balance = self._peer.engine.state.account(account).balance
        if balance < amount:
            raise UserError(
                f"The account has {balance} base units; this task needs {amount} in escrow.",
                f"send them to {self._peer.name}, or lower --price or --steps",
            )

    async def _submit(self, payload: Payload) -> None:
        try:
            receipt = await self._peer.submit(payload)
        except (SubmitRefused, TransactionExpired) as error:
            raise UserError(f"The chain did not take the transaction: {error}.", "see `tdml-peer status`") from None
        if not receipt.ok:
            raise UserError(f"The chain refused the transaction: {receipt.reason}.", "see `tdml-chain params`")

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
            self._report({"event": "formed", "stages": [list(p) for p in stages], "steps": manifest.steps})
            return
        raise UserError(
            "Too few peers took a seat: some stage has nobody.",
            f"start {manifest.stages} peers or more with `tdml-peer start --join INVITE`",
        )

    # while it runs

    async def _coordinate(self, governor: ChainGovernor, transport: SwarmTransport, feed: ClientFeed) -> int:
        config = CoordinatorConfig(self._prepared.manifest)
        ports = CoordinatorPorts(
            governor=governor,
            batches=self._prepared.batches,
            report=self._on_event,
            fetch_state=self._fetch_state,
            source=lambda step, stage: feed.source(step, stage, self._peer.name),
        )
        coordinator = Coordinator(config, transport, ports)
        states: tuple[StageState, ...] = ()
        try:
            with trio.CancelScope() as self._running:
                if self._is_interrupted:
                    self._running.cancel()
                states = await coordinator.run()
        except (StageLost, StateUnavailable, TaskEnded) as error:
            raise UserError(f"The swarm was lost: {error}.", "continue with --resume when peers are back") from None
        if self._running.cancelled_caught:
            return await self._save_interrupted(coordinator)
        await self._save(states)
        await self._submit(CloseTask(self._task))
        self._copy_chain()
        loss = self._losses[max(self._losses)]
        done = {"out": str(self._train.out), "task": self._task.hex(), "steps": states[0].step, "loss": loss}
        self._report({"event": "done", **done})
        return 0

    def _on_event(self, event: SwarmEvent) -> None:
        match event:
            case StepDone():
                self._on_step(event)
            case Rerouted():
                self._report(
                    {
                        "event": "rerouted",
                        "step": event.step,
                        "stage": event.stage,
                        "peer": event.peer,
                        "cells": list(event.cells),
                        "reason": event.why,
                    }
                )
            case RolledBack():
                self._report({"event": "rollback", "generation": event.generation, "step": event.resume_step})
            case PeerLeft():
                self._report_peer("left", event, event.why)
            case PeerJoined():
                self._report_peer("joined", event, "")
            case StageEmpty():
                self._report({"event": "waiting", "step": event.step, "stage": event.stage})

    def _report_peer(self, name: str, event: PeerLeft | PeerJoined, why: str) -> None:
        self._report({"event": name, "step": event.step, "stage": event.stage, "peer": event.peer, "reason": why})

    def _on_step(self, event: StepDone) -> None:
        self._losses[event.step] = event.loss
        assert self._transport is not None
        line = {
            "step": event.step,
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
                "step": data["step"],
                "reason": data["reason"],
                "evidence": data["evidence"],
            }
        )

    async def _fetch_state(self, root: bytes, holders: tuple[str, ...]) -> StageState:
        assert self._peer.swarm is not None
        return await fetch_state(self._peer.swarm.library.fetch, root, holders)

    def _resume_step(self) -> int | None:
        return self._prepared.checkpoint.step if self._prepared.checkpoint else None

    # at the end

    async def _save_interrupted(self, coordinator: Coordinator) -> int:
        if not self._losses:
            return 130  # nothing was trained yet
        with trio.CancelScope(shield=True, deadline=trio.current_time() + _SAVE_SECONDS):
            try:
                states = await coordinator.fetch_states()
            except (StateUnavailable, KeyError) as error:
                raise UserError(
                    f"The state could not be fetched from the workers: {error}.",
                    "--resume continues from the newest state in the out folder, if there is one",
                ) from None
            await self._save(states)
            return 130
        raise UserError("The workers did not give their state in time.", "try --resume") from None

    async def _save(self, states: tuple[StageState, ...]) -> None:
        step = states[0].step
        losses = tuple((s, loss) for s, loss in sorted(self._losses.items()) if s <= step)
        checkpoint = Checkpoint(self._prepared.manifest, states, self._prepared.tokenizer, losses)
        try:
            await trio.to_thread.run_sync(save, checkpoint, self._train.out)
        except CheckpointError as error:
            raise UserError(error.sentence, error.hint) from None
        self._report({"event": "saved", "out": str(self._train.out), "step": step})

    def _copy_chain(self) -> None:
        """Leave the chain's own database beside the model: the evidence of how it was trained."""
        import sqlite3

        source = sqlite3.connect(f"file:{self._peer.home.chain_path}?mode=ro", uri=True)
        target = sqlite3.connect(self._train.out / "chain.db")
        with source, target:
            source.backup(target)
        source.close()
        target.close()


def _append(path: Path, line: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(msgspec.json.encode(line) + b"\n")
