"""Catching up: asks peers for their height and fetches final blocks, every certificate verified.

Knows no event loop: it awaits the network and the engine's own commit.
"""

import logging
from collections.abc import Awaitable, Callable

from chain.blocks import Refused, Verifier
from chain.codec import DecodeError, encode
from chain.engine_blocks import Tip
from chain.engine_seam import ChainNetwork, RequestFailed
from chain.sync import (
    FinalBlock,
    RangeRequest,
    StatusReply,
    StatusRequest,
    SyncRequest,
    check_final,
    decode_range,
    decode_status,
)

SYNC_RANGE = 128

_log = logging.getLogger("tdml.chain")


class CatchUp:
    """Follows peers that are ahead. `commit` executes and stores one checked block."""

    def __init__(
        self,
        network: ChainNetwork,
        tip: Callable[[], Tip],
        commit: Callable[[FinalBlock], Awaitable[None]],
        verify: Verifier,
    ) -> None:
        self._network = network
        self._tip = tip
        self._commit = commit
        self._verify = verify
        self._asked: set[str] = set()
        self._failed: set[str] = set()
        self._ahead: set[str] = set()
        self.target = 0
        """The greatest height that a connected peer said to have reached."""

    @property
    def is_behind(self) -> bool:
        """Whether a peer is ahead by more than the block under way, or peers are there and none has answered."""
        unheard = bool(self._network.peers()) and not self._asked
        return unheard or self.target > self._tip().height + 1

    def hear_of_more(self, peer: str) -> None:
        """Note that a peer spoke of a greater height."""
        self._ahead.add(peer)

    def choose(self, *, everyone: bool) -> list[str]:
        """Return whom to follow now: who is new or spoke of more, or all; who failed last comes last."""
        peers = self._network.peers()
        self._asked.intersection_update(peers)
        self._failed.intersection_update(peers)
        chosen = [p for p in peers if everyone or p in self._ahead or p not in self._asked]
        ahead, self._ahead = self._ahead, set()
        return sorted(chosen, key=lambda peer: (peer in self._failed, peer not in ahead))

    async def follow(self, peer: str) -> None:
        """Take from `peer` whatever it has beyond the tip; a false answer is reported to the network."""
        self._failed.add(peer)
        try:
            status = await self._status(peer)
            self._asked.add(peer)
            self.target = max(self.target, status.height)
            while self._tip().height < status.height:
                if not await self._fetch(peer):
                    self.target = self._tip().height
                    return
            self._failed.discard(peer)
        except RequestFailed as error:
            _log.info("sync: %s did not answer: %s", peer, error)
        except (DecodeError, Refused) as error:
            self.target = self._tip().height
            _log.warning("sync: %s served something false: %s", peer, error)
            self._network.penalize(peer, str(error))

    async def _status(self, peer: str) -> StatusReply:
        tip = self._tip()
        return decode_status(await self._ask(peer, StatusRequest(tip.chain_id, tip.height)))

    async def _fetch(self, peer: str) -> bool:
        """Fetch and commit one range; whether the tip moved on."""
        start = self._tip().height
        request = RangeRequest(self._tip().chain_id, start + 1, SYNC_RANGE)
        for final in decode_range(await self._ask(peer, request)):
            tip = self._tip()
            if final.block.height <= tip.height:
                continue
            check_final(final, tip.header, tip.state.validators(), self._verify)
            if tip.header is None and final.block.header.chain_id != tip.chain_id:
                return False
            await self._commit(final)
        return self._tip().height > start

    async def _ask(self, peer: str, request: SyncRequest) -> bytes:
        return await self._network.request(peer, encode(request))
