"""Tensor streams between peers: one long-lived stream per direction, sessions, credit and deadlines.

The sender opens a session once per link and waits to be let in; then frames flow as far as the receiver's
credit reaches. Frames of one link are sent one at a time, in the order of `send` calls.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import structlog
import trio
from libp2p.exceptions import BaseLibp2pError
from libp2p.peer.id import ID

from tdml_p2p.limits import PeerLimits
from tdml_p2p.streams import WRITE_BYTES, StreamEnded, abandon, read_exactly, write
from tdml_p2p.tensor_frames import (
    CONTROL_BYTES,
    MAX_HEADER_BYTES,
    MAX_TENSORS,
    Control,
    ControlKind,
    FrameError,
    Record,
    RecordKind,
    RefusalReason,
    decode_control,
    encode_lengths,
)
from tdml_p2p.tensor_inbound import Inbound
from tdml_p2p.tensor_sessions import Frame, FrameChannel, LinkLost, Sessions
from trainer.trace import span

log = structlog.get_logger(__name__)

PROTOCOL = "/tdml/tensor/2"
_MAX_CREDIT = 1 << 40
_JOINED_BYTES = 60 * 1024
_PROGRESS_BYTES = 64 * 1024
"""Bytes that a link must take for its deadlines to begin again: a few at a time are no progress."""


class PeerLost(Exception):
    """The frame may not have arrived, because the link to `peer` is gone."""

    def __init__(self, peer: str, reason: str = "link lost") -> None:
        super().__init__(f"{peer}: {reason}")
        self.peer = peer
        self.reason = reason


class SendTimeout(PeerLost):
    """The peer took the frame too slowly; the link was given up."""


class SendRefused(PeerLost):
    """The peer does not take frames of this session; `reason` is its `RefusalReason`."""


@dataclass(frozen=True)
class TensorConfig:
    """Bounds of the tensor protocol, in bytes and seconds."""

    max_frame: int = 1 << 30
    window: int = 64 << 20
    open_seconds: float = 10.0


@dataclass
class _Link:
    """This peer's stream towards another one."""

    peer: str
    stream: Any
    credit: int = 0
    is_lost: bool = False
    asked: set[bytes] = field(default_factory=set)
    accepted: set[bytes] = field(default_factory=set)
    refused: dict[bytes, RefusalReason] = field(default_factory=dict)
    lock: trio.Lock = field(default_factory=trio.Lock)
    changed: trio.Event = field(default_factory=trio.Event)
    waiting: dict[trio.CancelScope, float] = field(default_factory=dict)
    taken: int = 0

    def on_control(self, control: Control) -> None:
        if control.kind is ControlKind.GRANT:
            self.credit = min(self.credit + control.value, _MAX_CREDIT)
        elif control.session not in self.asked:
            return
        elif control.kind is ControlKind.ACCEPT:
            self.refused.pop(control.session, None)
            self.accepted.add(control.session)
        else:
            self.accepted.discard(control.session)
            self.refused[control.session] = control.reason
        self.wake()

    def progress(self, count: int) -> None:
        """Let everybody who waits for this link wait anew: it took bytes."""
        self.taken += count
        if self.taken >= _PROGRESS_BYTES:
            self.taken = 0
            for scope, seconds in self.waiting.items():
                scope.deadline = trio.current_time() + seconds

    def wake(self) -> None:
        self.changed.set()
        self.changed = trio.Event()


class TensorStreams:
    """All tensor streams of one host; `start` it before use."""

    def __init__(self, host: Any, limits: PeerLimits, config: TensorConfig) -> None:
        self.bytes_sent = 0
        self._host = host
        self._config = config
        self._links: dict[str, _Link] = {}
        self._dialling: dict[str, trio.Lock] = {}
        self._sessions = Sessions(limits)
        self._nursery: trio.Nursery | None = None
        self.inbound = Inbound(self._sessions, limits, config.window, config.max_frame, self._sessions.lose)
        host.set_stream_handler(PROTOCOL, self.inbound.accept)

    def start(self, nursery: trio.Nursery) -> None:
        """Read what receivers write back in `nursery`; before that nothing can be sent."""
        self._nursery = nursery

    def open_session(self, session: bytes) -> FrameChannel:
        """Return the channel of a session's frames; raise `ValueError` if it is open already."""
        channel = self._sessions.open(session)
        self.inbound.on_session_opened(session)
        return channel

    def close_session(self, session: bytes) -> None:
        """End a session here; its frames are refused from now on."""
        self._sessions.close(session)

    def evict(self, session: bytes, peer: str) -> None:
        """Refuse `peer`'s frames of `session` from now on."""
        self._sessions.evict(session, peer)
        self.inbound.on_evicted(session, peer)

    async def send(
        self, peer: str, session: bytes, header: bytes, tensors: Sequence[memoryview], deadline: float
    ) -> None:
        """Hand one frame to `peer`, whose link may make no progress for `deadline` seconds.

        Raises `SendRefused` when the peer has not opened the session or evicted us, `SendTimeout` after the
        deadline, `PeerLost` when the link broke, and `ValueError` for a frame beyond the bounds.
        """
        views = [memoryview(tensor).cast("B") for tensor in tensors]
        record = self._record(session, header, views)
        with trio.move_on_after(deadline) as scope:
            with span("link"):
                link = await self._link(peer)
            link.waiting[scope] = deadline
            try:
                await self._send_on(link, record, header, views)
            finally:
                del link.waiting[scope]
            if session in link.refused:
                raise SendRefused(peer, link.refused[session])
        if scope.cancelled_caught:
            raise SendTimeout(peer, f"the link took nothing for {deadline:g} s")

    async def _send_on(self, link: _Link, record: Record, header: bytes, views: list[memoryview]) -> None:
        with span("link"):
            self._sessions.note(record.session, link.peer)
            await self._enter(link, record.session)
            await link.lock.acquire()
        try:
            await self._write_frame(link, record, header, views)
        finally:
            link.lock.release()

    def _record(self, session: bytes, header: bytes, views: list[memoryview]) -> Record:
        total = sum(map(len, views))
        if len(header) > MAX_HEADER_BYTES or len(views) > MAX_TENSORS or total > self._config.max_frame:
            raise ValueError(f"a frame of {len(header)}+{total} bytes in {len(views)} tensors is too large")
        return Record(RecordKind.FRAME, session, len(views), len(header), total)

    async def _link(self, peer: str) -> _Link:
        async with self._dialling.setdefault(peer, trio.Lock()):
            link = self._links.get(peer)
            if link is not None and not link.is_lost:
                return link
            try:
                stream = await self._host.new_stream(ID.from_string(peer), [PROTOCOL])
            except (BaseLibp2pError, OSError) as error:
                raise PeerLost(peer, f"unreachable: {type(error).__name__}") from None
            link = self._links[peer] = _Link(peer, stream)
            assert self._nursery is not None
            self._nursery.start_soon(self._read_controls, link)
            return link

    async def _enter(self, link: _Link, session: bytes) -> None:
        """Be let into the session, waiting a little for a receiver that has not opened it yet."""
        if session in link.accepted:
            return
        link.asked.add(session)
        link.refused.pop(session, None)
        async with link.lock:
            await self._write(link, Record(RecordKind.OPEN, session).encode())
        with trio.move_on_after(self._config.open_seconds):
            while session not in link.accepted and _may_change(link, session):
                await link.changed.wait()
        if link.is_lost:
            raise PeerLost(link.peer)
        if session not in link.accepted:
            raise SendRefused(link.peer, link.refused.get(session, RefusalReason.UNKNOWN_SESSION))

    async def _write_frame(self, link: _Link, record: Record, header: bytes, views: list[memoryview]) -> None:
        head = record.encode() + header + encode_lengths([len(view) for view in views])
        await self._credit(link, len(head), len(head))
        is_whole = False
        try:
            small = bytearray(head)
            for view in views:
                start = 0
                while start < len(view):
                    size = await self._credit(link, 1, min(WRITE_BYTES, len(view) - start))
                    piece = view[start : start + size]
                    start += size
                    if len(small) + size <= _JOINED_BYTES:
                        small += piece
                        continue
                    await self._write(link, bytes(small))
                    small.clear()
                    await self._write(link, piece)
            await self._write(link, bytes(small))
            is_whole = True
            self.bytes_sent += record.total
        finally:
            if not is_whole:
                # Half a frame leaves the stream without a next record.
                await self._give_up(link)

    async def _credit(self, link: _Link, least: int, most: int) -> int:
        """Take between `least` and `most` bytes of credit, waiting for the receiver's grants."""
        if link.credit < least and not link.is_lost:
            with span("credit"):
                while link.credit < least and not link.is_lost:
                    await link.changed.wait()
        if link.is_lost:
            raise PeerLost(link.peer)
        taken = min(link.credit, most)
        link.credit -= taken
        return taken

    async def _write(self, link: _Link, data: bytes | memoryview) -> None:
        if not data:
            return
        try:
            with span("encrypt and write"):
                await write(link.stream, data)
            link.progress(len(data))
        except StreamEnded as error:
            await self._give_up(link)
            raise PeerLost(link.peer, str(error)) from None

    async def _read_controls(self, link: _Link) -> None:
        try:
            while True:
                link.on_control(decode_control(await read_exactly(link.stream, CONTROL_BYTES)))
        except (StreamEnded, FrameError) as error:
            log.debug("tensor link ended", peer=link.peer, reason=str(error))
        finally:
            await self._give_up(link)

    async def _give_up(self, link: _Link) -> None:
        if link.is_lost:
            return
        link.is_lost = True
        link.wake()
        if self._links.get(link.peer) is link:
            del self._links[link.peer]
        self._sessions.lose(link.peer)
        await abandon(link.stream)


def _may_change(link: _Link, session: bytes) -> bool:
    return not link.is_lost and link.refused.get(session) in (None, RefusalReason.UNKNOWN_SESSION)


__all__ = [
    "PROTOCOL",
    "Frame",
    "FrameChannel",
    "LinkLost",
    "PeerLost",
    "SendRefused",
    "SendTimeout",
    "TensorConfig",
    "TensorStreams",
]
