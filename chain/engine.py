"""The engine: consensus, execution, storage, own transactions and sync at work.

The one file of `chain` that knows trio. What to do is decided in `engine_core`, `engine_gate`,
`engine_outbox` and `engine_blocks`; here it is done, one task for each kind of work.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import trio

from chain.blocks import Block, Refused, VerifiedSignatures
from chain.engine_blocks import assemble, check_proposal, follow, is_heavy
from chain.engine_core import BuildJob, CommitJob, CompareJob, Core, CoreConfig, Job, KeepJob, ValidateJob
from chain.engine_feed import Feed
from chain.engine_files import Files
from chain.engine_gate import ACCEPTED, FUTURE, Action, Disposition, rejected
from chain.engine_join import Join, JoinConfig
from chain.engine_peers import Peers
from chain.engine_seam import (
    ChainBroken,
    ChainNetwork,
    Committed,
    Distrusted,
    EngineConfig,
    RequestFailed,
    SubmitRefused,
    TransactionExpired,
)
from chain.engine_serve import Server
from chain.engine_status import deciding, describe, warning
from chain.engine_sync import CatchUp, CatchUpConfig
from chain.engine_threads import Bell, Threads
from chain.engine_transactions import Transactions
from chain.genesis import Genesis
from chain.keys import PrivateKey
from chain.ledger import Executed, InvalidBlock, Receipt
from chain.queries import Reader
from chain.state import State
from chain.sync import FinalBlock, StatusRequest, decode_request
from chain.transactions import Payload, Transaction
from chain.trusted_path import TrustedPath

if TYPE_CHECKING:
    from trio_typing import TaskStatus

__all__ = [
    "Action",
    "ChainBroken",
    "ChainEngine",
    "ChainNetwork",
    "Committed",
    "Disposition",
    "Distrusted",
    "EngineConfig",
    "RequestFailed",
    "SubmitRefused",
    "TransactionExpired",
]

T = TypeVar("T")
_log = logging.getLogger("tdml.chain")

NEW_PEERS_SECONDS = 1.0


class ChainEngine:
    """One peer's chain. `key` signs own transactions and, where the set contains it, votes."""

    def __init__(
        self,
        home: Path,
        genesis: Genesis,
        key: PrivateKey | None,
        network: ChainNetwork,
        config: EngineConfig | None = None,
    ) -> None:
        self._network = network
        self._config = config or EngineConfig()
        self._files = Files(home, genesis, key, self._config.keep)
        self._follows_because = self._files.refusal
        self._verify = VerifiedSignatures()
        tip = self._files.tip()
        voter = key if self._files.may_sign and self._config.validate else None
        core = CoreConfig(voter, self._config.timers, self._config.standstill, self._verify)
        self._core = Core(core, tip)
        self._transactions = Transactions(key, tip.chain_id)
        self._threads = Threads(offload=self._config.offload)
        trust = self._config.trust
        self._path = TrustedPath(trust, tip.chain_id) if trust is not None else None
        self._peers = Peers(network, self._config.sync_timeout)
        self._server = Server(self._files, self._threads, lambda: self._core.tip)
        self._catch_up, self._join = self._loops_that_fetch(genesis)
        self._feed = Feed()
        self._turn = trio.Lock()
        self._clock, self._signing, self._jobs = Bell(), Bell(), Bell()
        self._publishing, self._sending, self._syncing = Bell(), Bell(), Bell()

    def _loops_that_fetch(self, genesis: Genesis) -> tuple[CatchUp, Join]:
        core, config, peers, threads, verify = self._core, self._config, self._peers, self._threads, self._verify
        suspect, commit, trust, every = core.suspect, self._commit_synced, config.trust, config.sync_interval
        catching_up = CatchUpConfig(
            peers, lambda: core.tip, commit, suspect, core.witness, threads, verify, self._path, every
        )
        joining = JoinConfig(peers, genesis, trust, verify, threads, config.clock_ms, core.witness, core.is_at_genesis)
        return CatchUp(catching_up), Join(joining)

    @property
    def state(self) -> State:
        """The state after the latest final block."""
        return self._core.tip.state

    @property
    def reader(self) -> Reader:
        """What `chain.queries` answers from."""
        waiting = self._transactions.mempool
        return Reader(self._files.store, lambda: self.state, lambda: tuple(waiting), partial(deciding, self._core))

    async def run(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Work until cancelled; raise `ChainBroken` when a final block cannot be followed."""
        loops = (
            self._clock_loop,
            self._sign_loop,
            self._job_loop,
            self._publish_loop,
            self._send_loop,
            self._sync_loop,
        )
        try:
            async with trio.open_nursery() as nursery:
                self._path = self._files.check(self._path)
                self._core.remember(self._files.recent())
                restored = self._files.restored(self._core.tip.height + 1)
                self._core.begin(trio.current_time(), restored, self._is_pending())
                self._core.watch.reopen(self._files.store.cases())
                self._pump()
                self._syncing.ring()
                for loop in loops:
                    nursery.start_soon(loop)
                task_status.started()
        finally:
            self.close()

    def close(self) -> None:
        """Release the files; `run` does so when it ends."""
        self._feed.close()
        self._files.close()

    async def take(self, data: bytes) -> Disposition:
        """Take gossiped transactions and say what gossip should do with them."""
        disposition = await self._transactions.take(data, lambda: self.state, self._threads)
        if disposition == ACCEPTED:
            self._core.pace.hurry(trio.current_time())
            self._pump()
        return self._core.gate.count("tx", disposition)

    def deliver(self, topic: str, sender: str, data: bytes) -> Disposition:
        """Take one gossiped consensus message and say what gossip should do with it."""
        disposition = rejected("unknown-topic")
        if topic in ("block", "vote"):
            disposition = self._core.deliver(data, trio.current_time())
            if disposition == FUTURE:
                self._hear_of_more(sender)
        self._pump()
        return self._core.gate.count(topic, disposition)

    async def serve(self, sender: str, data: bytes) -> bytes:
        """Answer a sync request; raise `DecodeError` or `Refused`."""
        tip = self._core.tip
        request = decode_request(data, tip.chain_id)
        if isinstance(request, StatusRequest) and request.height > tip.height:
            self._hear_of_more(sender)
        return await self._server.answer(request)

    # Own transactions and what others do.

    async def submit(self, payload: Payload) -> bytes:
        """Sign `payload` with the next nonce, gossip it until it is included and return its id.

        Raises `SubmitRefused` when this peer has no key or the ledger would not take it now.
        """
        await trio.lowlevel.checkpoint()
        tx_id = self._transactions.submit(payload, self.state)
        self._core.pace.hurry(trio.current_time())
        self._sending.ring()
        self._clock.ring()
        return tx_id

    async def receipt(self, tx_id: bytes) -> Receipt:
        """Wait for the receipt of an own transaction; raise `TransactionExpired` or `LookupError`."""
        while True:
            try:
                receipt = self._transactions.answer(tx_id)
            except LookupError:
                receipt = await self._threads.disk(partial(self._files.receipt, tx_id))
                if receipt is None:
                    raise
            if receipt is not None:
                return receipt
            await self._feed.passed()

    def subscribe(self) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[Committed]]:
        """Open a channel of the blocks that become final from now on.

        A reader that falls 1,024 blocks behind misses blocks; `state` is always the latest.
        """
        return self._feed.subscribe()

    def status(self) -> dict[str, Any]:
        """Return where the chain stands, ready for JSON."""
        report = describe(self._core, self._catch_up, self._follows_because, trio.current_time())
        said = {"mempool": len(self._transactions.mempool), "joining": self._join.said}
        now_ms = self._config.clock_ms()
        said |= {"clock_behind_ms": max(0, self._core.tip.timestamp - now_ms)}
        return report | said | {"warning": warning(self._core, self._path, now_ms)}

    # Loops.

    async def _clock_loop(self) -> None:
        while True:
            with trio.move_on_at(self._core.deadline()):
                await self._clock.heard()
            self._core.tick(trio.current_time())
            self._pump(clock=False)

    async def _sign_loop(self) -> None:
        if self._files.is_record_new and len(self.state.validators().members) > 1:
            await self._catch_up.settle_in()  # the record may have been lost: blocks tell of forgotten votes
            self._core.drop_stale_signing()
        while True:
            await self._signing.heard()
            while self._core.signing:
                jobs = list(self._core.signing)
                self._core.signing.clear()
                for job, vote in await self._threads.disk(partial(self._files.sign, jobs)):
                    self._core.signed(job, vote, trio.current_time())
                self._pump()

    async def _job_loop(self) -> None:
        while True:
            await self._jobs.heard()
            while self._core.jobs:
                async with self._turn:
                    await self._do(self._core.jobs.popleft())
                self._pump()

    async def _publish_loop(self) -> None:
        while True:
            await self._publishing.heard()
            while self._core.publish:
                topic, data = self._core.publish.popleft()
                await self._network.publish(topic, data)

    async def _send_loop(self) -> None:
        while True:
            with trio.move_on_at(self._transactions.next_gossip()):
                await self._sending.heard()
            await trio.sleep(self._config.gossip_batch)
            for data in self._transactions.to_gossip(trio.current_time()):
                await self._network.publish("tx", data)

    async def _sync_loop(self) -> None:
        if self._config.snapshot:
            await self._take_snapshot()
        complete = trio.current_time()
        while True:
            with trio.move_on_after(NEW_PEERS_SECONDS):
                await self._syncing.heard()
                await trio.sleep(self._config.sync_grace)
            everyone = trio.current_time() - complete >= self._config.sync_interval or self._core.is_wanting
            if everyone:
                complete = trio.current_time()
            await self._catch_up.follow(everyone=everyone)

    # Work.

    async def _do(self, job: Job) -> None:
        match job:
            case BuildJob():
                await self._build(job)
            case ValidateJob():
                executed = await self._validate(job.block)
                self._core.validated(job, executed, trio.current_time())
            case KeepJob(cases):
                await self._threads.disk(partial(self._files.store.keep_cases, cases))
            case CompareJob(foreign):
                self._core.compare(job, await self._threads.disk(partial(self._files.decided, foreign.height)))
            case CommitJob(block, certificate):
                try:
                    await self._commit([FinalBlock(block, certificate)])
                except Refused as refusal:  # keys of validators that have left can do that: sync knows better
                    _log.error("block %d is final by its votes and not taken: %s", block.height, refusal)

    async def _build(self, job: BuildJob) -> None:
        if job.machine is not self._core.machine or job.view != job.machine.view:
            return
        try:
            draft = self._core.draft(job.view, self._config.clock_ms())
        except LookupError as error:
            self._follows_because = str(error)
            return
        self._follows_because = self._files.refusal
        tip = self._core.build_tip()
        transactions = self._transactions.select(tip.state)
        try:
            block, executed = await self._compute(transactions, partial(assemble, tip, draft, transactions))
        except InvalidBlock:
            _log.exception("the mempool chose what no block may carry; the next block is empty")
            self._transactions.mempool.remove(transactions)
            block, executed = assemble(tip, draft, ())
        self._core.built(job, block, executed, trio.current_time())

    async def _validate(self, block: Block) -> Executed | None:
        if block.height != self._core.tip.height + 1:
            return None
        if block.hash in self._core.executed:
            return self._core.executed[block.hash]
        unchecked = self._transactions.unchecked(block)
        now_ms = self._config.clock_ms()
        work = partial(check_proposal, self._core.tip, block, unchecked, now_ms, self._verify)
        try:
            return await self._compute(block.transactions, work)
        except (Refused, InvalidBlock, AssertionError) as error:
            _log.warning("block %d of view %d is invalid: %s", block.height, block.header.view, error)
            return None

    async def _take_snapshot(self) -> None:
        joined = await self._join.fetch()
        async with self._turn:
            if joined is None or self._core.tip.height > 0:
                return
            restored = await self._threads.disk(partial(self._files.install, joined))
            tip = joined.tip(self._core.tip.chain_id)
            self._core.adopt([tip])
            self._server.keep([tip])
            self._transactions.mempool.prune(tip.state)
            self._core.begin(trio.current_time(), restored, self._is_pending())
            self._feed.tell(())
        self._pump()

    async def _commit_synced(self, finals: Sequence[FinalBlock]) -> None:
        async with self._turn:
            await self._commit(finals)
        self._pump()

    async def _commit(self, finals: Sequence[FinalBlock]) -> None:
        core = self._core
        is_large = len(finals) > 1 or is_heavy(core.tip.state, finals[0].block.transactions)
        work = partial(follow, core.tip, finals, core.executed, self._verify, self._path)
        steps, refusal = await self._threads.compute(work, is_large=is_large)
        if steps:
            restored = await self._threads.disk(partial(self._files.commit, steps))
            tips = [step.after for step in steps]
            core.adopt(tips, [step.final.block for step in steps])
            self._server.keep(tips)
            for step in steps:
                self._transactions.adopt(step.final.block, step.executed)
            core.begin(trio.current_time(), restored, self._is_pending())
            self._pursue()
            self._feed.tell(steps)
        if refusal is not None:
            raise refusal

    def _is_pending(self) -> bool:
        return len(self._transactions.mempool) > 0 or self.state.is_busy()

    def _hear_of_more(self, sender: str) -> None:
        self._catch_up.hear_of_more(sender)
        self._syncing.ring()

    def _pump(self, *, clock: bool = True) -> None:
        """Wake the loops that have work."""
        core = self._core
        if core.watch.has_news:
            self._pursue()
        queues = ((core.signing, self._signing), (core.jobs, self._jobs), (core.publish, self._publishing))
        for queue, bell in queues:
            if queue:
                bell.ring()
        if core.is_wanting:
            self._syncing.ring()
        if clock:
            self._clock.ring()

    def _pursue(self) -> None:
        if self._core.watch.has_news:
            self._core.jobs.append(KeepJob(self._core.watch.open_cases()))
        if self._core.watch.pursue(self.state, self._transactions):
            self._core.pace.hurry(trio.current_time())
            self._sending.ring()

    async def _compute(self, transactions: Sequence[Transaction], work: Callable[[], T]) -> T:
        return await self._threads.compute(work, is_large=is_heavy(self.state, transactions))
