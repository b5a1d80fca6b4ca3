"""Outgoing duty transactions, batched: many commits, openings and reveals under one signature."""

from collections.abc import Awaitable, Callable

import structlog
import trio

from chain.engine import SubmitRefused
from chain.reasons import Reason
from chain.transactions import (
    Claim,
    Commit,
    Commitment,
    Open,
    Opening,
    Payload,
    Reveal,
    RevealAll,
    SubmitClaims,
)

log = structlog.get_logger(__name__)

Entry = Claim | Commitment | Opening | Reveal
Batch = SubmitClaims | Commit | Open | RevealAll

_BATCH_SECONDS = 0.1
_RETRY_SECONDS = 1.0
_NO_ROOM = (Reason.MEMPOOL_FULL, Reason.WRONG_NONCE)
_PACKAGES: tuple[tuple[type, type, int], ...] = (
    (Claim, SubmitClaims, 16),
    (Commitment, Commit, 32),
    (Opening, Open, 16),
    (Reveal, RevealAll, 16),
)


class Outbox:
    """Collects duty entries for a tenth of a second and submits each kind in one transaction."""

    def __init__(self, submit: Callable[[Payload], Awaitable[bytes]]) -> None:
        self._submit = submit
        self._entries: list[Entry] = []
        self._filled = trio.Event()

    def put(self, entry: Entry) -> None:
        """Queue one entry for the next batch."""
        self._entries.append(entry)
        self._filled.set()

    async def run(self) -> None:
        """Submit batches until cancelled."""
        while True:
            await self._filled.wait()
            await trio.sleep(_BATCH_SECONDS)
            self._filled = trio.Event()
            entries, self._entries = self._entries, []
            for payload in _package(entries):
                await self._send(payload)

    async def _send(self, payload: Batch) -> None:
        """Submit one payload; what there is no room for goes into the next batch, what is not owed is dropped.

        The chain takes all of a payload or nothing: the entries of a refused one are submitted one by one, so that none
        is lost for what another task's client has had this peer do.
        """
        try:
            await self._submit(payload)
        except SubmitRefused as error:
            log.warning("duty refused", kind=type(payload).__name__, reason=error.reason)
            entries: tuple[Entry, ...] = payload.claims if isinstance(payload, SubmitClaims) else payload.entries
            if error.reason in _NO_ROOM:
                await trio.sleep(_RETRY_SECONDS)
                for entry in entries:
                    self.put(entry)
            elif len(entries) > 1:
                for single in (_package([entry]) for entry in entries):
                    await self._send(*single)


def _package(entries: list[Entry]) -> list[Batch]:
    """Return the payloads that carry `entries`, kind by kind, in order."""
    payloads: list[Batch] = []
    for kind, package, most in _PACKAGES:
        chosen = [entry for entry in entries if isinstance(entry, kind)]
        payloads += [package(tuple(chosen[i : i + most])) for i in range(0, len(chosen), most)]
    return payloads
