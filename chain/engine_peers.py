"""Whom to ask while catching up: who claims what, who must wait for having stalled, who is banned for a lie."""

import logging
from collections import Counter
from dataclasses import dataclass

import trio

from chain.blocks import Reason, Refused
from chain.codec import DecodeError, encode
from chain.engine_seam import ChainNetwork, RequestFailed
from chain.sync import SyncRequest

BAN_SECONDS = 600.0
STALL_SECONDS = 2.0
"""How long a peer that did not answer is left alone, doubled each time up to `MAX_STALL_SECONDS`."""
MAX_STALL_SECONDS = 120.0
MAX_KNOWN = 1024
"""Peers remembered, banned ones longest."""

_log = logging.getLogger("tdml.chain")


@dataclass
class Peer:
    """What is known of a peer: the heights it claims, when it was asked, and until when it is avoided."""

    base: int = 0
    height: int = 0
    asked: float = float("-inf")
    until: float = float("-inf")
    stalls: int = 0
    is_busy: bool = False


class Peers:
    """The peers of the network, as servers."""

    def __init__(self, network: ChainNetwork, timeout: float) -> None:
        self._network = network
        self._timeout = timeout
        self._known: dict[str, Peer] = {}
        self.faults: Counter[str] = Counter()
        """How often peers failed, by reason."""

    def __getitem__(self, name: str) -> Peer:
        return self._known.setdefault(name, Peer())

    def connected(self) -> dict[str, Peer]:
        """Return the connected peers, also those to be avoided."""
        self._forget()
        return {name: self._known.get(name, Peer()) for name in self._network.peers()}

    def usable(self) -> dict[str, Peer]:
        """Return the connected peers that need not be avoided."""
        now = trio.current_time()
        return {name: peer for name, peer in self.connected().items() if peer.until <= now}

    def is_usable(self, name: str) -> bool:
        """Whether a peer need not be avoided."""
        return self[name].until <= trio.current_time()

    def release(self) -> None:
        """Note that nobody is asked for anything now."""
        for peer in self._known.values():
            peer.is_busy = False

    async def ask(self, name: str, request: SyncRequest) -> bytes | None:
        """Return the answer of a peer; None, and the peer is left alone for a while, when there is none."""
        try:
            with trio.fail_after(self._timeout):
                return await self._network.request(name, encode(request))
        except (RequestFailed, trio.TooSlowError) as error:
            _log.info("sync: %s did not answer: %s", name, error)
        self.avoid(name, "stalled")
        return None

    def avoid(self, name: str, reason: str) -> None:
        """Leave a peer alone for a while, longer each time, and believe nothing that it claimed."""
        peer = self[name]
        pause = min(STALL_SECONDS * 2**peer.stalls, MAX_STALL_SECONDS)
        peer.height, peer.stalls = 0, min(peer.stalls + 1, 16)
        peer.until = max(peer.until, trio.current_time() + pause)
        self.faults[reason] += 1

    def blame(self, name: str, error: DecodeError | Refused) -> None:
        """Ban and report a peer for a false answer.

        An empty one may come of pruning, one from the future of this machine's clock: such a peer is left alone.
        """
        reason = error.reason if isinstance(error, Refused) else Reason.MALFORMED
        if reason in (Reason.EMPTY_ANSWER, Reason.WRONG_TIME):
            self.avoid(name, reason)
            return
        _log.warning("sync: %s served something false: %s", name, error)
        self[name].height, self[name].until = 0, trio.current_time() + BAN_SECONDS
        self.faults[reason] += 1
        self._network.penalize(name, str(error))

    def _forget(self) -> None:
        connected, now = set(self._network.peers()), trio.current_time()
        for name, peer in list(self._known.items()):
            if name not in connected and (peer.until <= now or len(self._known) > MAX_KNOWN):
                del self._known[name]
