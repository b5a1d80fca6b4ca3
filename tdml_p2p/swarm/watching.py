"""What the client does about workers that are outvoted or odd: has the chain audit all that they claim, for a while.

Its word convicts nobody. It only makes sure that what it saw is looked at, and pays for it.
"""

import math
from typing import TYPE_CHECKING

import structlog
import trio

from chain.engine import SubmitRefused, TransactionExpired
from chain.keys import account_of
from chain.transactions import WatchWorker
from trainer.coordinator_ports import Outvoted, Suspicious

if TYPE_CHECKING:
    from tdml_p2p.peer import Peer

log = structlog.get_logger(__name__)


class Watcher:
    """Wishes of one task's client that a worker be audited in full; must be run."""

    def __init__(self, peer: "Peer", task: bytes) -> None:
        self._peer = peer
        self._task = task
        self._noted, self._names = trio.open_memory_channel[str](math.inf)

    def note(self, event: Outvoted | Suspicious) -> None:
        """Have a worker watched that most of its team differ from, or that a monitor names."""
        self._noted.send_nowait(event.peer)

    async def run(self) -> None:
        """Send wishes until cancelled; one that the chain does not take is only logged."""
        async for name in self._names:
            if not self._is_due(account_of(name)):
                continue
            try:
                receipt = await self._peer.submit(WatchWorker(self._task, account_of(name)))
            except (SubmitRefused, TransactionExpired) as error:
                log.warning("a worker is not watched", worker=name, reason=str(error))
                continue
            if not receipt.ok:
                log.warning("a worker is not watched", worker=name, reason=receipt.reason)

    def _is_due(self, account: bytes) -> bool:
        """Whether a worker holds a seat and is not watched for a while yet."""
        state = self._peer.engine.state
        worker = state.worker(self._task, account)
        if worker is None or not worker.is_seated:
            return False
        return worker.watched_until - state.height <= state.params.absence_blocks // 2
