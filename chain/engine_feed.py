"""The final blocks as they pass, for whoever subscribes."""

import logging
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

import trio

from chain.engine_blocks import Step
from chain.engine_seam import Committed

SUBSCRIBER_BUFFER = 1024

_log = logging.getLogger("tdml.chain")


class Feed:
    """The subscribers of one engine."""

    def __init__(self) -> None:
        self._subscribers: set[trio.MemorySendChannel[Committed]] = set()
        self._passed = trio.Event()

    async def passed(self) -> None:
        """Wait until another block is final."""
        await self._passed.wait()

    @asynccontextmanager
    async def subscribe(self) -> AsyncIterator[trio.MemoryReceiveChannel[Committed]]:
        """Open a channel of the blocks that become final from now on."""
        send, receive = trio.open_memory_channel[Committed](SUBSCRIBER_BUFFER)
        self._subscribers.add(send)
        try:
            yield receive
        finally:
            self._subscribers.discard(send)
            send.close()
            receive.close()

    def tell(self, steps: Iterable[Step]) -> None:
        """Tell everybody of these blocks."""
        self._passed.set()
        self._passed = trio.Event()
        for step in steps:
            block, certificate = step.final.block, step.final.certificate
            committed = Committed(block, certificate, step.executed.receipts, step.executed.events)
            for subscriber in self._subscribers:
                try:
                    subscriber.send_nowait(committed)
                except trio.WouldBlock:
                    _log.warning("a subscriber is %d blocks behind and misses one", SUBSCRIBER_BUFFER)

    def close(self) -> None:
        """End every subscription."""
        for subscriber in self._subscribers:
            subscriber.close()
