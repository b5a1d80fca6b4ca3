"""Joining by snapshot: an empty store takes a state that a light client has verified the header of.

Nothing rests on a server's word: the header follows from the genesis or from a block that the owner
trusts, every chunk is verified against its state root, and who served something false is banned. Until
all of it is here nothing is written, so an interrupted join begins anew.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import trio

from chain.blocks import Certificate, Reason, Refused, ValidatorSet, Verifier
from chain.codec import DecodeError
from chain.engine_blocks import Tip
from chain.engine_peers import Peers
from chain.engine_threads import Threads
from chain.genesis import Genesis
from chain.light import (
    LightBlock,
    LightClient,
    NotEnoughTrust,
    Trust,
    decode_light_block,
    genesis_anchor,
    trusting_ms,
)
from chain.snapshots import Assembly, decode_chunk
from chain.state import State
from chain.sync import (
    NOTHING,
    ChunkRequest,
    FinalBlock,
    LightRequest,
    RangeRequest,
    SnapshotRequest,
    SyncRequest,
    check_range,
    decode_info,
    decode_range,
)

PATIENCE_SECONDS = 30.0
"""How long nobody may offer a usable snapshot before the chain is fetched from its first block."""
LONGEST_SECONDS = 600.0
"""How long offers that come to nothing, or servers that drip, may go on before that."""
ASKED_PEERS = 16
MAX_EARLY = 1024
CHUNK_PEERS = 4
MAX_STEPS = 4096
"""Light blocks on the way to one header."""
MAX_BACK = 1024
"""Blocks below a trusted one through which its parents are followed to a snapshot."""

_log = logging.getLogger("tdml.chain")
T = TypeVar("T")


@dataclass(frozen=True)
class JoinConfig:
    """What a join is given."""

    peers: Peers
    genesis: Genesis
    trust: Trust | None
    verify: Verifier
    threads: Threads
    clock_ms: Callable[[], int]
    witness: Callable[[Certificate], None]
    """Look for evidence in the certificate of a light block that was refused."""
    is_needed: Callable[[], bool]


@dataclass(frozen=True)
class Joined:
    """A verified final block, who signed it, and the state after it."""

    final: FinalBlock
    signers: ValidatorSet
    state: State

    def tip(self, chain_id: bytes) -> Tip:
        """Return the tip that it makes."""
        return Tip(chain_id, self.state, self.final.block.header, self.final.certificate, self.signers)


@dataclass(frozen=True)
class _Offer:
    height: int
    depth: int


class _Expired(Exception):
    """Nothing that is trusted is young enough."""


class Join:
    """Fetches one snapshot."""

    def __init__(self, config: JoinConfig) -> None:
        self._config = config
        self._peers = config.peers
        self._chain_id = config.genesis.chain_id
        self.said: str | None = None
        """How far it is, or why it cannot go on, in words."""
        self._early: set[str] = set()
        """Who served a header from the future of this machine's clock."""

    async def fetch(self) -> Joined | None:
        """Return the newest snapshot that can be verified; None when there is none for a while."""
        began = heard = trio.current_time()
        while self._config.is_needed() and trio.current_time() < min(heard + PATIENCE_SECONDS, began + LONGEST_SECONDS):
            offers: dict[_Offer, list[str]] = {}
            try:
                with trio.move_on_at(began + LONGEST_SECONDS):
                    offers = await self._offers()
                    if offers or not self._peers.connected():
                        heard = trio.current_time()
                    began = began if self._peers.connected() else heard
                    joined = await self._best(offers)
                    if joined is not None:
                        self.said = None
                        return joined
            except _Expired as error:
                self.said = str(error)
                return None
            servers = {name for names in offers.values() for name in names}
            if servers and servers <= self._early:
                return None  # trying again would not set the clock; `said` tells
            await trio.sleep(1)
        self.said = None
        return None

    async def _best(self, offers: dict[_Offer, list[str]]) -> Joined | None:
        """Return the snapshot that most offer, or the next one that can be had."""
        for offer in sorted(offers, key=lambda offer: (-len(offers[offer]), -offer.height)):
            joined = await self._take(offer, offers[offer])
            if joined is not None:
                return joined
        return None

    async def _offers(self) -> dict[_Offer, list[str]]:
        """Return who serves which snapshot."""
        offers: dict[_Offer, list[str]] = {}

        async def ask(name: str) -> None:
            data = await self._peers.ask(name, SnapshotRequest(self._chain_id))
            if data is None:
                return
            try:
                info = decode_info(data)
            except DecodeError as error:
                self._peers.blame(name, error)
                return
            if info.height > 0:
                offers.setdefault(_Offer(info.height, info.depth), []).append(name)

        async with trio.open_nursery() as nursery:
            for name in list(self._peers.usable())[:ASKED_PEERS]:
                nursery.start_soon(ask, name)
        return offers

    async def _take(self, offer: _Offer, names: Sequence[str]) -> Joined | None:
        """Return a snapshot, or None when nobody who offers it can serve it."""
        light = await self._light(offer.height, names)
        if light is None:
            return None
        assembly = Assembly(light.header.state_root, offer.depth)
        await self._chunks(assembly, offer, names)
        if assembly.missing():
            return None
        final = await self._block(light, names)
        if final is None:
            return None
        state = await self._config.threads.compute(assembly.state)
        return Joined(final, light.validators, state)

    async def _first(self, names: Iterable[str], request: SyncRequest, take: Callable[[bytes], T]) -> T | None:
        """Return what `take` makes of the first true answer; who answers falsely is banned."""
        for name in sorted(names, key=lambda name: self._peers[name].stalls):
            data = await self._peers.ask(name, request) if self._peers.is_usable(name) else None
            if data is None or data == NOTHING:
                continue
            try:
                return await self._config.threads.compute(partial(take, data))
            except (DecodeError, Refused) as error:
                if isinstance(error, Refused) and error.reason is Reason.WRONG_TIME and len(self._early) < MAX_EARLY:
                    self._early.add(name)
                self._peers.blame(name, error)
        return None

    # The header.

    async def _light(self, height: int, names: Sequence[str]) -> LightBlock | None:
        """Return the verified light block of a height; raise `_Expired`."""
        trust = self._config.trust
        if trust is not None and height < trust.height:
            return await self._light_below(height, trust, names)
        genesis = self._config.genesis
        period = trusting_ms(genesis.params)
        client = LightClient(self._chain_id, genesis_anchor(genesis), trust, period, self._config.verify)
        for _ in range(MAX_STEPS):
            wanted = client.wanted(height)
            take = partial(self._step, client, wanted)
            everyone = [*names, *(name for name in self._peers.usable() if name not in names)]
            block = await self._first(everyone, LightRequest(self._chain_id, wanted), take)
            if block is None or (wanted == height and client.anchor and client.anchor.height == height):
                return block
        return None

    def _step(self, client: LightClient, wanted: int, data: bytes) -> LightBlock:
        """Take one light block; one that is too far away for a skip is true all the same."""
        block = decode_light_block(data)
        if block.header.height != wanted:
            raise Refused(Reason.WRONG_HEIGHT, f"{block.header.height} for {wanted}")
        try:
            client.update(block, self._config.clock_ms())
        except NotEnoughTrust:
            pass
        except Refused as refusal:
            if refusal.reason is Reason.TRUST_EXPIRED:
                raise _Expired(
                    "What this peer trusts is older than the trusting period: start with --trust HEIGHT:HASH "
                    "of a recent block that somebody vouches for."
                ) from None
            ahead_ms = block.header.timestamp - self._config.clock_ms()
            if refusal.reason is Reason.WRONG_TIME and ahead_ms > 0:
                self.said = (
                    f"Header {wanted} is {ahead_ms // 1000} seconds ahead of this machine's clock: no snapshot can be "
                    "verified before the clock is right. The chain is fetched block by block instead."
                )
            self._config.witness(block.certificate)
            raise
        return block

    async def _light_below(self, height: int, trust: Trust, names: Sequence[str]) -> LightBlock | None:
        """Return the light block of a height below the trusted block, from whose parents it follows."""
        if trust.height - height > MAX_BACK:
            return None
        block: LightBlock | None = None
        for at in range(trust.height, height - 1, -1):
            expected = block.header.parent if block else trust.block_hash
            take = partial(self._named, Trust(at, expected))
            block = await self._first(names, LightRequest(self._chain_id, at), take)
            if block is None:
                return None
        return block

    def _named(self, named: Trust, data: bytes) -> LightBlock:
        """Return the light block that is known by its hash."""
        block = decode_light_block(data)
        LightClient(self._chain_id, None, named, 0, self._config.verify).update(block, self._config.clock_ms())
        return block

    # The state.

    async def _chunks(self, assembly: Assembly, offer: _Offer, names: Sequence[str]) -> None:
        """Fetch the chunks that are missing from several peers at once, until all are here or nobody is left."""
        wanted = sorted(assembly.missing(), reverse=True)
        total = len(wanted)

        async def work(name: str) -> None:
            while wanted and self._peers.is_usable(name):
                index = wanted.pop()
                if not await self._chunk(assembly, offer, index, name):
                    wanted.append(index)
                self.said = f"Snapshot {offer.height}: {total - len(assembly.missing())} of {total} chunks are here."

        while assembly.missing():
            usable = [name for name in names if self._peers.is_usable(name)]
            if not usable:
                return
            async with trio.open_nursery() as nursery:
                for name in usable[:CHUNK_PEERS]:
                    nursery.start_soon(work, name)

    async def _chunk(self, assembly: Assembly, offer: _Offer, index: int, name: str) -> bool:
        request = ChunkRequest(self._chain_id, offer.height, offer.depth, index)
        data = await self._peers.ask(name, request)
        if data is None:
            return False
        if data == NOTHING:
            self._peers.avoid(name, Reason.EMPTY_ANSWER)
            return False
        try:
            chunk = decode_chunk(data)
            if chunk.index != index:
                raise Refused(Reason.WRONG_CHUNK, "another place than asked for")
            await self._config.threads.compute(partial(assembly.add, chunk))
        except (DecodeError, Refused) as error:
            self._peers.blame(name, error)
            return False
        return True

    async def _block(self, light: LightBlock, names: Sequence[str]) -> FinalBlock | None:
        """Return the block of a verified header."""
        height = light.header.height

        def take(data: bytes) -> FinalBlock:
            finals = decode_range(data)
            check_range(finals, height, 1)
            block = finals[0].block
            if block.header != light.header or not block.is_consistent:
                raise Refused(Reason.WRONG_BLOCK, "not the block of the verified header")
            return FinalBlock(block, light.certificate)

        return await self._first(names, RangeRequest(self._chain_id, height, 1), take)
