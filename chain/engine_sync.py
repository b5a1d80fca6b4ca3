"""Catching up: ranges of final blocks from several peers at once, verified, committed in order.

A peer that serves something false is banned and reported, one that does not answer must wait; what
either owed is asked of others. Everything that a peer can make this hold is bounded.
"""

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial

import trio

from chain.blocks import Certificate, Reason, Refused, ValidatorSet, Verifier, verify_certificate
from chain.codec import DecodeError
from chain.engine_blocks import Tip
from chain.engine_peers import Peers
from chain.engine_ranges import Batch, Lease, Ranges
from chain.engine_threads import Bell, Threads
from chain.light import Trust, decode_light_block
from chain.sync import (
    NOTHING,
    FinalBlock,
    HeadersRequest,
    LightRequest,
    RangeRequest,
    StatusRequest,
    check_range,
    decode_headers,
    decode_range,
    decode_status,
)
from chain.trusted_path import TrustedPath

SYNC_PEERS = 4
"""Peers that ranges are fetched from at once."""
ASKED_PEERS = 16
"""Peers asked for their height in one round."""
FIRST_ANSWER_SECONDS = 10.0
"""How long a validator without a record waits for a peer before it signs."""
CATCH_UP_SECONDS = 120.0
"""How long it then follows who claims to be ahead."""
MAX_AHEAD = 1024
"""Peers remembered for having spoken of a greater height."""

_log = logging.getLogger("tdml.chain")


@dataclass(frozen=True)
class CatchUpConfig:
    """What catching up is given: the peers, the final tip, how to commit, check and compute."""

    peers: Peers
    tip: Callable[[], Tip]
    commit: Callable[[Sequence[FinalBlock]], Awaitable[None]]
    """Execute and store consecutive blocks; raises `Refused` when one does not follow."""
    suspect: Callable[[FinalBlock], None]
    """Look for evidence in a block that is not the chain's."""
    witness: Callable[[Certificate], None]
    """Look for evidence in a certificate that is not the chain's."""
    threads: Threads
    verify: Verifier
    path: TrustedPath | None = None
    """What leads to the block that the owner trusts."""
    interval: float = 5.0


class CatchUp:
    """Follows peers that are ahead."""

    def __init__(self, config: CatchUpConfig) -> None:
        self._config = config
        self._peers = config.peers
        self._ahead: set[str] = set()
        self._ranges: Ranges | None = None
        self._idle = 0
        self._speeds: dict[str, float] = {}
        """Headers a second, of each peer's last answer."""
        self._changed, self._arrival = trio.Event(), Bell()
        self._answered = trio.Event()

    @property
    def target(self) -> int:
        """The greatest height that a connected peer claims and was not caught lying about."""
        return max((peer.height for peer in self._peers.usable().values()), default=0)

    @property
    def is_behind(self) -> bool:
        """Whether a peer is ahead by more than the block under way, the trusted block is, or none has answered yet."""
        connected = self._peers.connected().values()
        unheard = bool(connected) and all(peer.asked == float("-inf") for peer in connected)
        return unheard or self._trust is not None or self.target > self._config.tip().height + 1

    @property
    def _trust(self) -> Trust | None:
        """The trusted block while the chain here is below it."""
        path = self._config.path
        return path.trust if path is not None and self._config.tip().height < path.trust.height else None

    async def settle_in(self) -> None:
        """Wait until a peer has told its height and no peer is ahead, within bounds."""
        with trio.move_on_after(FIRST_ANSWER_SECONDS):
            await self._answered.wait()
        with trio.move_on_after(CATCH_UP_SECONDS):
            while self.target > self._config.tip().height:
                await self._changed.wait()

    def hear_of_more(self, peer: str) -> None:
        """Note that a peer spoke of a greater height."""
        if len(self._ahead) < MAX_AHEAD:
            self._ahead.add(peer)

    async def follow(self, *, everyone: bool) -> None:
        """Ask peers for their height, those that are new or spoke of more or all, and fetch what is missing."""
        await self._ask_heights(everyone=everyone)
        if self.target <= self._config.tip().height or not await self._walk():
            return
        self._ranges = Ranges(self._config.tip().height + 1)
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
            self._peers.release()

    # Heights.

    def _choose(self, *, everyone: bool) -> list[str]:
        """Return whom to ask now: who is new or spoke of more, or all; asked longest ago first."""
        ahead, self._ahead = self._ahead, set()
        usable = self._peers.usable()
        chosen = [name for name, p in usable.items() if everyone or name in ahead or p.asked == float("-inf")]
        return sorted(chosen, key=lambda name: (name not in ahead, usable[name].asked))[:ASKED_PEERS]

    async def _ask_heights(self, *, everyone: bool) -> None:
        async with trio.open_nursery() as nursery:
            for name in self._choose(everyone=everyone):
                nursery.start_soon(self._ask_height, name)

    async def _ask_height(self, name: str) -> None:
        tip, peer = self._config.tip(), self._peers[name]
        peer.asked = trio.current_time()
        data = await self._peers.ask(name, StatusRequest(tip.chain_id, tip.height))
        if data is None:
            return
        try:
            status = decode_status(data)
        except DecodeError as error:
            self._blame(name, error)
            return
        tip, trust = self._config.tip(), self._trust
        if trust is not None and (status.height < trust.height or not await self._is_trusty(name, trust)):
            return
        peer.height, peer.base = status.height, status.base
        self._answered.set()
        self._ring()
        if status.height == tip.height and status.block_hash != tip.hash:
            await self._look_at_fork(name, tip)

    async def _is_trusty(self, name: str, trust: Trust) -> bool:
        """Whether a peer that claims to be beyond the trusted block has that block."""
        data = await self._peers.ask(name, LightRequest(self._config.tip().chain_id, trust.height))
        if data is None or data == NOTHING:
            return False
        try:
            light = decode_light_block(data)
            if light.header.hash != trust.block_hash:
                self._config.witness(light.certificate)
                raise Refused(Reason.WRONG_BLOCK, f"not the trusted block {trust}")
        except (DecodeError, Refused) as error:
            self._blame(name, error)
            return False
        return True

    async def _look_at_fork(self, name: str, tip: Tip) -> None:
        """Ask a peer for its block of the tip's height, which cannot be final as well unless validators lied."""
        data = await self._peers.ask(name, RangeRequest(tip.chain_id, tip.height, 1))
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
            self._peers.faults["fork"] += 1
            self._config.suspect(finals[0])

    async def _refresh(self) -> None:
        while True:
            await trio.sleep(self._config.interval)
            await self._ask_heights(everyone=True)

    # The way down from the trusted block.

    async def _walk(self) -> bool:
        """Follow parents from the trusted block down to the tip; whether all are known. Raises `Distrusted`."""
        path, tip = self._config.path, self._config.tip()
        if path is None:
            return True
        if self._trust is None:
            path.forget()
            return True
        while (request := path.wanted(tip.height)) is not None:
            name = self._guide(request)
            if name is None:
                return False
            await self._take_headers(name, request, path)
        path.check(tip.height, tip.hash)
        return True

    def _guide(self, request: HeadersRequest) -> str | None:
        """Return who has these headers: everybody once, then whoever was fastest, so that nobody drips for long."""
        able = {n for n, p in self._peers.usable().items() if p.base <= request.last <= p.height}
        return max(sorted(able), key=lambda name: self._speeds.get(name, float("inf")), default=None)

    async def _take_headers(self, name: str, request: HeadersRequest, path: TrustedPath) -> None:
        began = trio.current_time()
        data = await self._peers.ask(name, request)
        if data is None:
            return
        try:
            headers = await self._config.threads.compute(partial(decode_headers, data, request))
            await self._config.threads.compute(partial(path.extend, headers))
        except (DecodeError, Refused) as error:
            self._blame(name, error)
            return
        if len(self._speeds) >= MAX_AHEAD:
            self._speeds.clear()
        self._speeds[name] = len(headers) / max(trio.current_time() - began, 1e-3)

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
            self._peers[name].is_busy = True
            await self._drain(name, ranges)
            self._peers[name].is_busy = False

    def _source(self, ranges: Ranges) -> str | None:
        """Return a peer that has what is missing and that nobody asks yet."""
        free = {
            name: p for name, p in self._peers.usable().items() if not p.is_busy and p.base <= ranges.next <= p.height
        }
        return min(free, key=lambda name: (free[name].stalls, -free[name].height), default=None)

    async def _drain(self, name: str, ranges: Ranges) -> None:
        """Fetch from a peer while it answers truly and has what is missing."""
        while self._peers.is_usable(name):
            peer = self._peers[name]  # known anew when it was gone for a moment
            if not peer.base <= ranges.next <= peer.height:
                return
            lease = ranges.lease(peer.base, peer.height, trio.current_time())
            if lease is not None:
                await self._fetch(name, lease, ranges)
                continue
            with trio.move_on_after(1.0):
                await self._changed.wait()

    async def _fetch(self, name: str, lease: Lease, ranges: Ranges) -> None:
        chain_id = self._config.tip().chain_id
        data = await self._peers.ask(name, RangeRequest(chain_id, lease.first, lease.count))
        if data is None or not self._peers.is_usable(name):
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

    def _blame(self, name: str, error: DecodeError | Refused, served: Sequence[FinalBlock] = ()) -> None:
        """Ban and report a peer for a false answer; an empty one may come of pruning and is left alone."""
        height = self._config.tip().height
        for final in served:
            if final.block.height <= height + 1:
                self._config.suspect(final)
        self._peers.blame(name, error)
        if self._ranges is not None:
            self._ranges.drop(name)
        self._ring()

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
