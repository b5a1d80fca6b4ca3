"""Catching up: ranges of final blocks from several peers at once, verified, committed in order.

A peer that serves something false is banned and reported, one that does not answer must wait; what
either owed is asked of others. Everything that a peer can make this hold is bounded.
"""

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial

import trio

from chain.blocks import Reason, Refused, ValidatorSet, Verifier, verify_certificate
from chain.codec import DecodeError, encode
from chain.engine_blocks import Tip
from chain.engine_ranges import Batch, Lease, Ranges
from chain.engine_seam import ChainNetwork, RequestFailed
from chain.engine_threads import Bell, Threads
from chain.sync import (
    FinalBlock,
    RangeRequest,
    StatusRequest,
    SyncRequest,
    check_range,
    decode_range,
    decode_status,
)

SYNC_PEERS = 4
"""Peers that ranges are fetched from at once."""
ASKED_PEERS = 16
"""Peers asked for their height in one round."""
BAN_SECONDS = 600.0
STALL_SECONDS = 2.0
"""How long a peer that did not answer is left alone, doubled each time up to `MAX_STALL_SECONDS`."""
MAX_STALL_SECONDS = 120.0
MAX_KNOWN = 1024
"""Peers remembered, banned ones longest."""

_log = logging.getLogger("tdml.chain")


@dataclass(frozen=True)
class CatchUpConfig:
    """What catching up is given: the network, the final tip, how to commit, check and compute."""

    network: ChainNetwork
    tip: Callable[[], Tip]
    commit: Callable[[Sequence[FinalBlock]], Awaitable[None]]
    """Execute and store consecutive blocks; raises `Refused` when one does not follow."""
    suspect: Callable[[FinalBlock], None]
    """Look for evidence in a block that is not the chain's."""
    threads: Threads
    verify: Verifier
    timeout: float = 10.0
    interval: float = 5.0


@dataclass
class _Peer:
    """What is known of a peer: the heights it claims, when it was asked, and until when it is avoided."""

    base: int = 0
    height: int = 0
    asked: float = float("-inf")
    until: float = float("-inf")
    stalls: int = 0
    is_busy: bool = False


class CatchUp:
    """Follows peers that are ahead."""

    def __init__(self, config: CatchUpConfig) -> None:
        self._config = config
        self._peers: dict[str, _Peer] = {}
        self._ahead: set[str] = set()
        self._ranges: Ranges | None = None
        self._idle = 0
        self._changed, self._arrival = trio.Event(), Bell()
        self.faults: dict[str, int] = {}
        """How often peers failed, by reason."""

    @property
    def target(self) -> int:
        """The greatest height that a connected peer claims and was not caught lying about."""
        return max((peer.height for peer in self._usable().values()), default=0)

    @property
    def is_behind(self) -> bool:
        """Whether a peer is ahead by more than the block under way, or peers are there and none has answered."""
        connected = self._config.network.peers()
        unheard = bool(connected) and not any(peer in self._peers for peer in connected)
        return unheard or self.target > self._config.tip().height + 1

    def hear_of_more(self, peer: str) -> None:
        """Note that a peer spoke of a greater height."""
        if len(self._ahead) < MAX_KNOWN:
            self._ahead.add(peer)

    async def follow(self, *, everyone: bool) -> None:
        """Ask peers for their height, those that are new or spoke of more or all, and fetch what is missing."""
        await self._ask_heights(everyone=everyone)
        tip = self._config.tip()
        if self.target <= tip.height:
            return
        self._ranges = Ranges(tip.height + 1)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._refresh)
                self._idle = 0
                for _ in range(SYNC_PEERS):
                    nursery.start_soon(self._work, self._ranges)
                await self._commit(self._ranges)
                nursery.cancel_scope.cancel()
        finally:
            self._ranges = None
            for peer in self._peers.values():
                peer.is_busy = False

    # Heights.

    def _usable(self) -> dict[str, _Peer]:
        now = trio.current_time()
        connected = self._config.network.peers()
        return {name: p for name in connected if (p := self._peers.get(name)) is not None and p.until <= now}

    def _choose(self, *, everyone: bool) -> list[str]:
        """Return whom to ask now: who is new or spoke of more, or all; asked longest ago first."""
        now, ahead = trio.current_time(), self._ahead
        self._ahead = set()
        self._forget(now)
        known = {name: self._peers.get(name, _Peer()) for name in self._config.network.peers()}
        chosen = [
            name
            for name, p in known.items()
            if p.until <= now and (everyone or name in ahead or p.asked == float("-inf"))
        ]
        return sorted(chosen, key=lambda name: (name not in ahead, known[name].asked))[:ASKED_PEERS]

    def _forget(self, now: float) -> None:
        connected = set(self._config.network.peers())
        for name, peer in list(self._peers.items()):
            if name not in connected and (peer.until <= now or len(self._peers) > MAX_KNOWN):
                del self._peers[name]

    async def _ask_heights(self, *, everyone: bool) -> None:
        async with trio.open_nursery() as nursery:
            for name in self._choose(everyone=everyone):
                nursery.start_soon(self._ask_height, name)

    async def _ask_height(self, name: str) -> None:
        tip, peer = self._config.tip(), self._peers.setdefault(name, _Peer())
        peer.asked = trio.current_time()
        data = await self._ask(name, StatusRequest(tip.chain_id, tip.height))
        if data is None:
            return
        try:
            status = decode_status(data)
        except DecodeError as error:
            self._blame(name, error)
            return
        peer.height, peer.base = status.height, status.base
        self._ring()
        tip = self._config.tip()
        if status.height == tip.height and status.block_hash != tip.hash:
            await self._look_at_fork(name, tip)

    async def _look_at_fork(self, name: str, tip: Tip) -> None:
        """Ask a peer for its block of the tip's height, which cannot be final as well unless validators lied."""
        data = await self._ask(name, RangeRequest(tip.chain_id, tip.height, 1))
        if data is None:
            return
        finals: tuple[FinalBlock, ...] = ()
        try:
            finals = decode_range(data)
            check_range(finals, tip.height, 1)
            if finals[0].certificate.block_hash != finals[0].block.hash:
                raise Refused(Reason.WRONG_BLOCK)
            if tip.signers is not None:
                verify_certificate(finals[0].certificate, tip.signers, self._config.verify)
        except (DecodeError, Refused) as error:
            self._blame(name, error, finals)
            return
        if finals[0].block.hash != tip.hash:
            _log.error("sync: %s has another final block %d than this peer", name, tip.height)
            self._count("fork")
            self._config.suspect(finals[0])

    async def _refresh(self) -> None:
        while True:
            await trio.sleep(self._config.interval)
            await self._ask_heights(everyone=True)

    # Ranges.

    async def _work(self, ranges: Ranges) -> None:
        """Fetch from one peer after the other."""
        while True:
            name = self._source(ranges)
            if name is None:
                self._idle += 1
                self._arrival.ring()
                await self._changed.wait()
                self._idle -= 1
                continue
            peer = self._peers[name]
            peer.is_busy = True
            await self._drain(name, peer, ranges)
            peer.is_busy = False

    def _source(self, ranges: Ranges) -> str | None:
        """Return a peer that has what is missing and that nobody asks yet."""
        free = {name: p for name, p in self._usable().items() if not p.is_busy and p.base <= ranges.next <= p.height}
        return min(free, key=lambda name: (free[name].stalls, -free[name].height), default=None)

    async def _drain(self, name: str, peer: _Peer, ranges: Ranges) -> None:
        """Fetch from a peer while it answers truly and has what is missing."""
        while peer.base <= ranges.next <= peer.height and peer.until <= trio.current_time():
            lease = ranges.lease(peer.base, peer.height, trio.current_time())
            if lease is not None:
                await self._fetch(name, lease, ranges)
                continue
            with trio.move_on_after(1.0):
                await self._changed.wait()

    async def _fetch(self, name: str, lease: Lease, ranges: Ranges) -> None:
        chain_id = self._config.tip().chain_id
        data = await self._ask(name, RangeRequest(chain_id, lease.first, lease.count))
        if data is None or name not in self._usable():
            ranges.give_back(lease)
            return
        finals: tuple[FinalBlock, ...] = ()
        compute, known = self._config.threads.compute, self._config.tip().state.validators()
        try:
            finals = await compute(partial(decode_range, data))
            await compute(partial(_check, finals, lease, known, self._config.verify))
        except (DecodeError, Refused) as error:
            ranges.give_back(lease)
            self._blame(name, error, finals[:1])
            return
        self._peers[name].stalls = 0
        ranges.put(lease, Batch(name, finals, len(data)))
        self._ring()

    async def _commit(self, ranges: Ranges) -> None:
        """Commit what arrives, in order, until nobody has anything more to ask for."""
        while True:
            batch = ranges.take()
            if batch is not None:
                await self._commit_batch(batch, ranges)
            elif self._idle == SYNC_PEERS:
                return
            else:
                await self._arrival.heard()

    async def _commit_batch(self, batch: Batch, ranges: Ranges) -> None:
        try:
            await self._config.commit(batch.finals)
        except Refused as refusal:
            ranges.advance(self._config.tip().height)
            self._blame(batch.peer, refusal, batch.finals)
        else:
            ranges.advance(self._config.tip().height)
        self._ring()

    # Peers.

    async def _ask(self, name: str, request: SyncRequest) -> bytes | None:
        """Return the answer of a peer; None, and the peer is left alone for a while, when there is none."""
        try:
            with trio.fail_after(self._config.timeout):
                return await self._config.network.request(name, encode(request))
        except (RequestFailed, trio.TooSlowError) as error:
            _log.info("sync: %s did not answer: %s", name, error)
        self._avoid(name, "stalled")
        return None

    def _avoid(self, name: str, reason: str) -> None:
        """Leave a peer alone for a while, longer each time, and believe nothing that it claimed."""
        peer = self._peers.setdefault(name, _Peer())
        pause = min(STALL_SECONDS * 2**peer.stalls, MAX_STALL_SECONDS)
        peer.height, peer.stalls = 0, min(peer.stalls + 1, 16)
        peer.until = max(peer.until, trio.current_time() + pause)
        self._count(reason)
        self._ring()

    def _blame(self, name: str, error: DecodeError | Refused, served: Sequence[FinalBlock] = ()) -> None:
        """Ban and report a peer for a false answer; an empty one may come of pruning and is left alone."""
        height = self._config.tip().height
        for final in served:
            if final.block.height <= height + 1:
                self._config.suspect(final)
        reason = error.reason if isinstance(error, Refused) else Reason.MALFORMED
        if reason is Reason.EMPTY_ANSWER:
            self._avoid(name, reason)
            return
        _log.warning("sync: %s served something false: %s", name, error)
        peer = self._peers.setdefault(name, _Peer())
        peer.height, peer.until = 0, trio.current_time() + BAN_SECONDS
        if self._ranges is not None:
            self._ranges.drop(name)
        self._count(reason)
        self._config.network.penalize(name, str(error))
        self._ring()

    def _count(self, reason: str) -> None:
        self.faults[reason] = self.faults.get(reason, 0) + 1

    def _ring(self) -> None:
        self._arrival.ring()
        self._changed.set()
        self._changed = trio.Event()


def _check(finals: tuple[FinalBlock, ...], lease: Lease, known: ValidatorSet, verify: Verifier) -> None:
    """Raise `Refused` for another range; check the signatures of what the known set decided already here."""
    check_range(finals, lease.first, lease.count)
    for final in finals:
        if final.block.header.validators_hash == known.hash:
            verify_certificate(final.certificate, known, verify)
