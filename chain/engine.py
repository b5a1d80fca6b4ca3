"""The engine: consensus, execution, storage, own transactions and sync at work.

The one file of `chain` that knows trio. What to do is decided in `engine_core`, `engine_gate`,
`engine_outbox` and `engine_blocks`; here it is done, one task for each kind of work.
"""

import logging
import random
from collections import OrderedDict
from pathlib import Path
from typing import TypeVar

import trio

from chain.blocks import VerifiedSignatures
from chain.engine_core import Core, CoreConfig
from chain.engine_gate import Action, Disposition
from chain.engine_outbox import Outbox, Own
from chain.engine_seam import (
    ChainBroken,
    ChainNetwork,
    Committed,
    EngineConfig,
    RequestFailed,
    SubmitRefused,
    TransactionExpired,
)
from chain.genesis import Genesis
from chain.keys import PrivateKey
from chain.ledger import Receipt
from chain.mempool import Mempool
from chain.queries import Reader
from chain.store import Store

__all__ = [
    "Action",
    "ChainBroken",
    "ChainEngine",
    "ChainNetwork",
    "Committed",
    "Disposition",
    "EngineConfig",
    "RequestFailed",
    "SubmitRefused",
    "TransactionExpired",
]

T = TypeVar("T")
_log = logging.getLogger("tdml.chain")

TRANSACTION_BATCH = 128
TRANSACTION_BATCH_BYTES = 256 * 1024
SUBSCRIBER_BUFFER = 1024
KEPT_RECEIPTS = 4096
KEPT_SIGNED_HEIGHTS = 64
SYNC_PEERS = 4
SYNC_RANGE = 128


class _Bell:
    """Wakes one loop; ringing twice before it listens wakes it once."""

    def __init__(self) -> None:
        self._event = trio.Event()

    def ring(self) -> None:
        self._event.set()

    async def heard(self) -> None:
        await self._event.wait()
        self._event = trio.Event()


class _Sent:
    """An own transaction, and its receipt once it is included (None when it was given up)."""

    def __init__(self, own: Own) -> None:
        self.own = own
        self.done = trio.Event()
        self.receipt: Receipt | None = None

    def finish(self, receipt: Receipt | None) -> None:
        self.receipt = receipt
        self.done.set()


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
        self._key = key
        self._store = Store.open(home)
        self._verify = VerifiedSignatures()
        tip = self._load(genesis)
        self._record, self._follows_because = self._open_record(home, tip)
        voter = key if self._record is not None and self._config.validate else None
        timers, standstill = self._config.timers, self._config.standstill
        self._core = Core(CoreConfig(voter, timers, standstill, self._verify), tip)
        self._mempool = Mempool()
        self._outbox = Outbox(key, tip.chain_id) if key else None
        self._sent: OrderedDict[bytes, _Sent] = OrderedDict()
        self._subscribers: set[trio.MemorySendChannel[Committed]] = set()
        self._random = random.Random(tip.chain_id + (key.account if key else b""))
        self._ahead: dict[str, int] = {}
        self._turn = trio.Lock()
        self._disk_limit = trio.CapacityLimiter(1)
        self._clock, self._signing, self._jobs = _Bell(), _Bell(), _Bell()
        self._publishing, self._sending, self._syncing = _Bell(), _Bell(), _Bell()
        self.reader = Reader(self._store, lambda: self.state)
