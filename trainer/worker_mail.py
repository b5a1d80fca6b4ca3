"""A worker's mail: messages on their way out, one queue a peer, and messages that came ahead of time."""

import math
from collections import Counter
from collections.abc import Callable

import trio

from trainer.messages import Activation, Gradient, Message, Partial, Tied, payload_of
from trainer.payloads import MessageError, Reason
from trainer.trace import lane
from trainer.transport import PeerLost, Received, Transport


class Outbox:
    """Messages on their way out: one queue and one task a peer, so that a slow link delays only itself.

    The queues hold no tensors beyond those that the step keeps anyway.
    """

    def __init__(self, transport: Transport, on_lost: Callable[[str, Message], None]) -> None:
        self._transport = transport
        self._on_lost = on_lost
        self._queues: dict[str, trio.MemorySendChannel[Message]] = {}
        self._nursery: trio.Nursery | None = None
        self._unsent = 0
        self._is_empty = trio.Event()

    def open(self, nursery: trio.Nursery) -> None:
        """Deliver in tasks of `nursery` from now on."""
        self._nursery = nursery

    def post(self, to: str, message: Message) -> None:
        """Queue a message; order to one peer is kept."""
        if to not in self._queues:
            if self._nursery is None:
                raise RuntimeError("the outbox is not open")
            self._queues[to], arrivals = trio.open_memory_channel[Message](math.inf)
            self._nursery.start_soon(self._deliver, to, arrivals)
        self._queues[to].send_nowait(message)
        self._unsent += 1

    async def flush(self) -> None:
        """Wait until everything queued is delivered or lost."""
        while self._unsent:
            self._is_empty = trio.Event()
            await self._is_empty.wait()

    async def _deliver(self, to: str, queue: trio.MemoryReceiveChannel[Message]) -> None:
        with lane(f"to {to}"):
            async for message in queue:
                try:
                    await self._transport.send(to, message)
                except PeerLost:
                    self._on_lost(to, message)
                self._unsent -= 1
                if not self._unsent:
                    self._is_empty.set()


class EarlyMail:
    """Tensors that came before their step was opened or their sender was on the route.

    Bounded by `limit` bytes, of which one sender takes at most half: none can crowd out the others.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held: dict[tuple[object, ...], Received] = {}
        self._bytes: Counter[str] = Counter()

    def hold(self, received: Received, message: Activation | Gradient | Partial | Tied) -> None:
        """Keep a message; raise `MessageError` for a second of its kind or when the room is taken."""
        item = message.attempt if isinstance(message, Partial | Tied) else message.cell
        key = (received.sender, type(message), message.generation, message.step, item)
        if key in self._held:
            raise MessageError(Reason.DUPLICATE, f"from {received.sender}")
        size = sum(p.nbytes for p in payload_of(message))
        sender_bytes = self._bytes[received.sender] + size
        if sender_bytes > self._limit // 2 or self._bytes.total() + size > self._limit:
            raise MessageError(Reason.TOO_EARLY, f"{size} bytes of {received.sender}")
        self._bytes[received.sender] = sender_bytes
        self._held[key] = received

    def take(self) -> tuple[Received, ...]:
        """Return and release everything, in order of arrival, to be looked at again."""
        taken = tuple(self._held.values())
        self._held.clear()
        self._bytes.clear()
        return taken
