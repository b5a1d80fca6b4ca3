"""A run's task on the chain: the open one that a resumed run can go on with, or a new one."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog
import trio
from msgspec import structs

from chain.engine import SubmitRefused, TransactionExpired
from chain.ledger.tasks import least_bond, least_escrow
from chain.state import Task
from chain.transactions import MAX_PATIENCE, CloseTask, Faucet, Payload, PostTask
from tdml_p2p.errors import UserError
from tdml_p2p.swarm.journal import Journal, read_journal, write_journal
from tdml_p2p.swarm.preparation import Prepared
from trainer.checkpoint import Checkpoint, CheckpointError, resume
from trainer.manifest import TaskManifest, encode_manifest

if TYPE_CHECKING:
    from tdml_p2p.peer import Peer

log = structlog.get_logger(__name__)

LIFETIME_BLOCKS = 100_000
_GRANT_SECONDS = 20.0
_CLOSE_SECONDS = 60.0
_AUDITOR_FLOPS = 5e9
_AUDITOR_LINK = 5e6
"""Operations and bytes per second of the slowest auditor that is waited for."""


@dataclass(frozen=True)
class Posted:
    """A task on the chain and the run behind it.

    `resume` is (generation, step): while the task's generation is that one, the run goes on after the step.
    """

    task: bytes
    prepared: Prepared
    resume: tuple[int, int] | None = None


def patience_blocks(manifest: TaskManifest, interval_ms: int) -> int:
    """Return how many blocks an auditor may need for a cell: 4 bytes a weight, 6 operations a weight and token."""
    from trainer.base_weights import base_layout

    weights = max(base_layout(manifest, stage).total for stage in manifest.seated)
    seconds = 6.0 * weights * manifest.positions / _AUDITOR_FLOPS + 4.0 * weights / _AUDITOR_LINK
    return min(math.ceil(1000 * seconds / interval_ms), MAX_PATIENCE)


class Poster:
    """Finds, posts and closes the tasks of this peer's account; `out` holds the checkpoints."""

    def __init__(self, peer: "Peer", out: Path, price: int, report: Callable[[dict[str, Any]], None]) -> None:
        self._peer = peer
        self._out = out
        self._price = price
        self._report = report

    async def open(self, prepared: Prepared) -> Posted | None:
        """Return the task to train, None when all steps of a resumed run are done; raise `UserError`.

        A saved state goes on in its own task only while nothing was claimed or rolled back since it was saved:
        what has been claimed once must not be computed again under the same claim. Else a new task takes over.
        """
        checkpoint = prepared.checkpoint
        await self._close_former("" if checkpoint is None else checkpoint.task)
        if checkpoint is None:
            return await self._post(prepared)
        task, are_ends_here = self._own_task(checkpoint.task), prepared.manifest.private
        if task is not None and task.generation == checkpoint.generation:
            return await self._go_on(task, prepared, (task.generation, checkpoint.states[0].step))
        start = await trio.to_thread.run_sync(self._restart_point, checkpoint)
        if task is not None and not start.is_verified and checkpoint.generation >= 0 and not are_ends_here:
            return await self._go_on(task, prepared, None)  # after a rollback the workers hold what is verified
        if task is not None:
            await self.close(task.id)
        if start.step >= start.manifest.total_steps:
            return None
        if not start.is_verified:
            self._report(
                {"event": "unverified", "step": start.step, "reason": "its audits had not ended when it was saved"}
            )
        return await self._post(await trio.to_thread.run_sync(prepared.over_rest_of, start))

    async def move(self, task: bytes, prepared: Prepared, kept: Checkpoint | None) -> Posted:
        """Return a new task in place of one that has lost a stage: from the kept state, or from its beginning.

        The seats of the old one go on being held by the dead until their leases end. Raises `UserError`.
        """
        await self.close(task)
        if kept is not None:
            prepared = await trio.to_thread.run_sync(prepared.over_rest_of, kept)
        with trio.move_on_after(_CLOSE_SECONDS):
            while not self._can_pay(self._payload(prepared).escrow):
                await self._peer.next_block()  # what the old task did not use returns when its claims have settled
        return await self._post(prepared)

    def _can_pay(self, amount: int) -> bool:
        return self._peer.engine.state.account(self._peer.key.account).balance >= amount

    async def close(self, task: bytes) -> None:
        """End a task; what is left in escrow returns."""
        await self.submit(CloseTask(task))

    async def submit(self, payload: Payload) -> None:
        """Send a transaction and wait until it is final; raise `UserError`."""
        try:
            receipt = await self._peer.submit(payload)
        except (SubmitRefused, TransactionExpired) as error:
            raise UserError(f"The chain did not take the transaction: {error}.", "see `tdml-peer status`") from None
        if not receipt.ok:
            raise UserError(f"The chain refused the transaction: {receipt.reason}.", "see `tdml-chain params`")

    async def _close_former(self, going_on: str) -> None:
        """Close the task that a run in this folder left open when it was killed, unless this one goes on with it."""
        journal = await trio.to_thread.run_sync(read_journal, self._out)
        if journal is None:
            return
        former = self._own_task(journal.task) if journal.task else self._posted_since(journal)
        if former is not None and former.id.hex() != going_on:
            await self.close(former.id)
            self._report({"event": "abandoned", "task": former.id.hex()})

    def _posted_since(self, journal: Journal) -> Task | None:
        """Return the task that was posted although the run was killed before it could note so."""
        own = (task for task in self._peer.engine.state.open_tasks() if task.client == self._peer.key.account)
        return next(
            (task for task in own if task.manifest.hex() == journal.manifest and task.posted_at > journal.height), None
        )

    def _own_task(self, identity: str) -> Task | None:
        """Return a task if it is open and this account's."""
        task = self._peer.engine.state.task(bytes.fromhex(identity))
        is_mine = task is not None and task.is_open and task.client == self._peer.key.account
        return task if is_mine else None

    def _restart_point(self, checkpoint: Checkpoint) -> Checkpoint:
        """Return the checkpoint that a new task may start from: a verified one, if there is any."""
        task = self._peer.engine.state.task(bytes.fromhex(checkpoint.task))
        has_settled = (
            task is not None and task.generation == checkpoint.generation and task.settled >= checkpoint.states[0].step
        )
        if checkpoint.is_verified or has_settled:
            return replace(checkpoint, is_verified=True)
        try:
            return resume(self._out, is_verified=True)
        except CheckpointError:
            return checkpoint

    async def _go_on(self, task: Task, prepared: Prepared, at: tuple[int, int] | None) -> Posted:
        await self._publish(prepared)
        step = task.settled if at is None else at[1]
        self._report_posted(task.id, prepared.manifest.start + step, is_resumed=True)
        return Posted(task.id, prepared, at)

    async def _post(self, prepared: Prepared) -> Posted:
        await self._publish(prepared)
        payload = self._payload(prepared)
        await self._fund(payload.escrow)
        state = self._peer.engine.state
        before = {task.id for task in state.open_tasks()}
        await self._note(Journal(payload.manifest.hex(), state.height))
        await self.submit(payload)
        for task in self._peer.engine.state.open_tasks():
            if task.id not in before and task.client == self._peer.key.account:
                await self._note(Journal(payload.manifest.hex(), state.height, task.id.hex()))
                self._report_posted(task.id, prepared.manifest.start, is_resumed=prepared.checkpoint is not None)
                return Posted(task.id, prepared)
        raise UserError("The task is not on chain although it was accepted.", "try again")

    async def _note(self, journal: Journal) -> None:
        try:
            await trio.to_thread.run_sync(write_journal, self._out, journal)
        except OSError as error:
            raise UserError(f"Nothing can be written to {self._out}: {error.strerror}.", "make room there") from None

    def _payload(self, prepared: Prepared) -> PostTask:
        manifest, params = prepared.manifest, self._peer.engine.state.params
        rate = max(manifest.audit.rate, params.floor_rate)
        stages = len(manifest.seated)
        task = PostTask(
            manifest=manifest.address,
            stages=stages,
            replicas=manifest.replicas,
            steps=manifest.steps,
            microbatches=manifest.microbatches,
            price=self._price,
            escrow=0,
            worker_bond=least_bond(params, self._price, rate, manifest.audit.depth * manifest.microbatches),
            audit_rate=rate,
            depth=manifest.audit.depth,
            lifetime=LIFETIME_BLOCKS,
            patience=patience_blocks(manifest, params.block_interval_ms),
            redundancy=manifest.audit.redundancy,
            kernel=prepared.kernel,
        )
        return structs.replace(task, escrow=least_escrow(task))

    def _report_posted(self, task: bytes, step: int, is_resumed: bool) -> None:
        self._report({"event": "posted", "task": task.hex(), "resumed": is_resumed, "step": step})

    async def _publish(self, prepared: Prepared) -> None:
        blobs = self._peer.network.blobs
        address = await blobs.put(encode_manifest(prepared.manifest))
        assert address == prepared.manifest.address  # both are the BLAKE3 address of the same bytes
        if not prepared.tokenizer.is_bytes and not prepared.manifest.private:  # it is made of the text
            await blobs.put(prepared.tokenizer.json)

    async def _fund(self, amount: int) -> None:
        """See that the account can pay: wait for the wallet's own grant, or ask the faucet for it."""
        state, account = self._peer.engine.state, self._peer.key.account
        if state.account(account).balance >= amount:
            return
        if state.params.faucet_grant and not state.account(account).granted:
            with trio.move_on_after(_GRANT_SECONDS):
                while not self._peer.engine.state.account(account).granted:
                    await self._peer.next_block()
            if not self._peer.engine.state.account(account).granted:
                await self.submit(Faucet())
        balance = self._peer.engine.state.account(account).balance
        if balance < amount:
            raise UserError(
                f"The account has {balance} base units; this task needs {amount} in escrow.",
                f"send them to {self._peer.name}, or lower --price or --steps",
            )
