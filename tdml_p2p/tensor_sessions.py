"""Sessions of the tensor protocol on the receiving side: who may send into which, and their queues."""

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from tdml_p2p.limits import PeerLimits
from tdml_p2p.tensor_frames import SESSION_BYTES, RefusalReason

_MAX_EVICTION_LISTS = 1024


@dataclass(frozen=True)
class Frame:
    """One message of a peer: its header and its tensors as raw little-endian bytes.

    `times` are when its first and its last byte came, in nanoseconds of `time.perf_counter_ns`.
    """

    sender: str
    header: bytes
    tensors: tuple[memoryview, ...]
    times: tuple[int, int] = field(default=(0, 0), compare=False)


@dataclass(frozen=True)
class LinkLost:
    """The link to a peer that took part in the session died; frames of either direction may be lost."""

    peer: str


_Queued = tuple[Frame | LinkLost, Callable[[], None]]


class FrameChannel(trio.abc.ReceiveChannel[Frame | LinkLost]):
    """A session's frames and losses in order of arrival; taking a frame gives its credit back."""

    def __init__(self, queue: trio.MemoryReceiveChannel[_Queued]) -> None:
        self._queue = queue

    async def receive(self) -> Frame | LinkLost:
        """Return the next frame or loss; raise `trio.EndOfChannel` when the session was closed."""
        item, release = await self._queue.receive()
        release()
        return item

    async def aclose(self) -> None:
        """Close this end."""
        self.release()

    def release(self) -> None:
        """Drop what is queued and give its credit back."""
        while True:
            try:
                _, release = self._queue.receive_nowait()
            except (trio.WouldBlock, trio.EndOfChannel, trio.ClosedResourceError):
                break
            release()
        self._queue.close()


@dataclass
class _Session:
    send: trio.MemorySendChannel[_Queued]
    channel: FrameChannel
    peers: set[str] = field(default_factory=set)


class Sessions:
    """Open sessions by their 32-byte ids, and the peers that are refused in each."""

    def __init__(self, limits: PeerLimits) -> None:
        self._limits = limits
        self._open: dict[bytes, _Session] = {}
        self._evicted: OrderedDict[bytes, set[str]] = OrderedDict()

    def open(self, session: bytes) -> FrameChannel:
        """Return the channel of a new session; raise `ValueError` if it is open or not 32 bytes."""
        if len(session) != SESSION_BYTES:
            raise ValueError(f"a session id has {SESSION_BYTES} bytes, not {len(session)}")
        if session in self._open:
            raise ValueError(f"session {session.hex()} is open already")
        # Unbounded in number only: senders' credit bounds the bytes, and losses come once per peer.
        send, receive = trio.open_memory_channel[_Queued](math.inf)
        self._open[session] = _Session(send, FrameChannel(receive))
        return self._open[session].channel

    def close(self, session: bytes) -> None:
        """End a session; frames that are still queued or under way are dropped."""
        closed = self._open.pop(session, None)
        if closed is not None:
            closed.send.close()
            closed.channel.release()

    def is_open(self, session: bytes) -> bool:
        """Whether the session takes frames."""
        return session in self._open

    def refusal(self, session: bytes, peer: str) -> RefusalReason | None:
        """Return why `peer` may not send into `session`, or None."""
        if self._limits.is_banned(peer):
            return RefusalReason.BANNED
        if peer in self._evicted.get(session, ()):
            return RefusalReason.EVICTED
        return None if session in self._open else RefusalReason.UNKNOWN_SESSION

    def evict(self, session: bytes, peer: str) -> None:
        """Refuse `peer` in `session` from now on."""
        self._evicted.setdefault(session, set()).add(peer)
        self._evicted.move_to_end(session)
        while len(self._evicted) > _MAX_EVICTION_LISTS:
            self._evicted.popitem(last=False)

    def deliver(self, session: bytes, frame: Frame, release: Callable[[], None]) -> None:
        """Queue a frame, or drop it when its session closed while it arrived."""
        to = self._open.get(session)
        if to is None:
            release()
            return
        to.peers.add(frame.sender)
        try:
            to.send.send_nowait((frame, release))
        except trio.BrokenResourceError:
            release()

    def note(self, session: bytes, peer: str) -> None:
        """Remember that `peer` takes part in `session`, so that its loss is told there."""
        if session in self._open:
            self._open[session].peers.add(peer)

    def lose(self, peer: str) -> None:
        """Tell every session that used the link that it died."""
        for session in self._open.values():
            if peer in session.peers:
                session.peers.discard(peer)
                try:
                    session.send.send_nowait((LinkLost(peer), _nothing))
                except trio.BrokenResourceError:
                    continue


def _nothing() -> None:
    return None
