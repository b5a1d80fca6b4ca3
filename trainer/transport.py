"""The seam between a swarm's members and the network, and an in-memory network with scripted faults.

`Transport` is all that worker and coordinator know of a network. `InMemoryHub` joins any number of them
inside one trio program; `Faults` says who crashes, which links are cut and which are slow.
"""

import math
from collections.abc import Callable
from typing import Protocol, TypeAlias

import msgspec
import trio

from trainer.messages import Message

Proof: TypeAlias = tuple[tuple[bytes, bytes], ...]
"""For each tensor of a message its content address and the sender's signature; empty in memory."""


class PeerLost(ConnectionError):
    """A message could not be delivered because the link to `peer` is gone."""

    def __init__(self, peer: str) -> None:
        super().__init__(f"the link to {peer} is gone")
        self.peer = peer


class Lost(msgspec.Struct, frozen=True):
    """A local event, never on the wire: the link to `peer` died."""

    peer: str


class Received(msgspec.Struct, frozen=True):
    """A message with its authenticated sender and the proof of its tensors."""

    sender: str
    message: Message | Lost
    proof: Proof = ()


class Transport(Protocol):
    """One member's ends of its links to the others; order is kept between any two peers."""

    @property
    def peer(self) -> str:
        """The member's own name."""

    async def send(self, to: str, message: Message) -> None:
        """Deliver a message; raise `PeerLost` when the link is gone."""

    async def receive(self) -> Received:
        """Return the next message or loss."""


class _Crash(msgspec.Struct):
    peer: str
    of: type | None
    left: int
    before: bool


class Faults:
    """A script of faults, each named after what happens."""

    def __init__(self) -> None:
        self._crashes: list[_Crash] = []
        self._cut: set[frozenset[str]] = set()
        self._delays: dict[tuple[str, str], float] = {}

    def crash(self, peer: str, *, after: int, of: type | None = None, before: bool = False) -> "Faults":
        """Kill `peer` at its `after`-th message (of type `of`), once sent, or `before` it leaves."""
        self._crashes.append(_Crash(peer, of, after, before))
        return self

    def cut(self, first: str, second: str) -> "Faults":
        """Drop the link between two peers; both are told."""
        self._cut.add(frozenset((first, second)))
        return self

    def mend(self, first: str, second: str) -> "Faults":
        """Restore a link that was cut."""
        self._cut.discard(frozenset((first, second)))
        return self

    def delay(self, sender: str, receiver: str, seconds: float) -> "Faults":
        """Hold every message from `sender` to `receiver` for `seconds`."""
        self._delays[sender, receiver] = seconds
        return self

    def is_cut(self, first: str, second: str) -> bool:
        """Whether the link between two peers is dropped."""
        return frozenset((first, second)) in self._cut

    def seconds(self, sender: str, receiver: str) -> float:
        """Delay of messages on the way from `sender` to `receiver`."""
        return self._delays.get((sender, receiver), 0.0)

    def is_fatal(self, peer: str, message: Message, *, before: bool) -> bool:
        """Whether the script kills `peer` right before or after it sends `message`; counts the message."""
        fatal = False
        for crash in self._crashes:
            if crash.peer == peer and crash.before == before and isinstance(message, crash.of or object):
                crash.left -= 1
                fatal |= crash.left == 0
        return fatal


class InMemoryHub:
    """Links between all members of one program; messages keep their order and share their tensors."""

    def __init__(self, faults: Faults | None = None) -> None:
        self.faults = faults or Faults()
        self.log: list[tuple[str, str, Message]] = []
        self._inboxes: dict[str, trio.MemorySendChannel[Received]] = {}
        self._on_crash: dict[str, Callable[[], None]] = {}

    def join(self, peer: str, on_crash: Callable[[], None] = lambda: None) -> "InMemoryTransport":
        """Add a member (again); `on_crash` is called when the script kills it."""
        send, receive = trio.open_memory_channel[Received](math.inf)
        self._inboxes[peer] = send
        self._on_crash[peer] = on_crash
        return InMemoryTransport(peer, self, receive)

    def has(self, peer: str) -> bool:
        """Whether a member is alive."""
        return peer in self._inboxes

    def crash(self, peer: str) -> None:
        """Kill a member: its inbox is gone, and every other member is told that the link died."""
        if self._inboxes.pop(peer, None) is None:
            return
        self._on_crash.pop(peer)()
        for inbox in self._inboxes.values():
            inbox.send_nowait(Received(peer, Lost(peer)))

    def cut(self, first: str, second: str) -> None:
        """Drop the link between two members now, and tell both."""
        self.faults.cut(first, second)
        self._inboxes[first].send_nowait(Received(second, Lost(second)))
        self._inboxes[second].send_nowait(Received(first, Lost(first)))

    def inject(self, sender: str, to: str, message: Message) -> None:
        """Deliver a message that `sender` never sent through its own transport."""
        self._inboxes[to].send_nowait(Received(sender, message))

    async def carry(self, sender: str, to: str, message: Message) -> None:
        """Deliver one message as the script of faults says."""
        await trio.lowlevel.checkpoint()
        if self.faults.is_fatal(sender, message, before=True):
            self.crash(sender)
        if seconds := self.faults.seconds(sender, to):
            await trio.sleep(seconds)
        if sender not in self._inboxes or to not in self._inboxes or self.faults.is_cut(sender, to):
            raise PeerLost(to)
        self.log.append((sender, to, message))
        self._inboxes[to].send_nowait(Received(sender, message))
        if self.faults.is_fatal(sender, message, before=False):
            self.crash(sender)


class InMemoryTransport:
    """One member's end of an `InMemoryHub`."""

    def __init__(self, peer: str, hub: InMemoryHub, inbox: trio.MemoryReceiveChannel[Received]) -> None:
        self.peer = peer
        self._hub = hub
        self._inbox = inbox

    async def send(self, to: str, message: Message) -> None:
        """Deliver a message; raise `PeerLost` when the link is gone."""
        await self._hub.carry(self.peer, to, message)

    async def receive(self) -> Received:
        """Return the next message or loss."""
        return await self._inbox.receive()
