"""The receiving end of tensor streams: sessions, bounded assembly of frames, and credit."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import structlog
import trio

from tdml_p2p.limits import Offence, PeerLimits
from tdml_p2p.streams import Reader, StreamEnded, abandon, write
from tdml_p2p.tensor_frames import (
    RECORD_BYTES,
    Control,
    ControlKind,
    FrameError,
    FrameReason,
    Record,
    RecordKind,
    RefusalReason,
    decode_lengths,
    decode_record,
)
from tdml_p2p.tensor_sessions import Frame, Sessions

log = structlog.get_logger(__name__)

MAX_SESSIONS_PER_LINK = 256
_STALL_SECONDS = 60.0
_LENGTH_BYTES = 8
_PIECE_BYTES = 1 << 20
_MAX_OUTBOX = 2 * MAX_SESSIONS_PER_LINK


@dataclass
class InboundLink:
    """One peer's stream towards this one: what it may still send, and the sessions it was let into."""

    peer: str
    stream: Any
    window: int
    credit: int = 0
    owed: int = 0
    debt: int = 0
    accepted: set[bytes] = field(default_factory=set)
    waiting: set[bytes] = field(default_factory=set)
    outbox: list[Control] = field(default_factory=list)
    wake: trio.Event = field(default_factory=trio.Event)

    def __post_init__(self) -> None:
        self.reader = Reader(self.stream)

    def say(self, control: Control) -> None:
        """Queue a control record; raise `FrameError` when the peer reads none of them."""
        if len(self.outbox) >= _MAX_OUTBOX:
            raise FrameError(FrameReason.ANSWERS_UNREAD)
        self.outbox.append(control)
        self.wake.set()

    def give_back(self, count: int) -> None:
        """Return `count` bytes of credit to the peer, in batches."""
        self.owed += count
        if self.owed >= self.window // 8:
            self.wake.set()

    def take_outbox(self) -> list[Control]:
        """Return what must be written now."""
        controls, self.outbox = self.outbox, []
        if self.owed >= self.window // 8:
            controls.append(Control(ControlKind.GRANT, value=self.owed))
            self.credit += self.owed
            self.owed = 0
        self.wake = trio.Event()
        return controls


class Inbound:
    """Every stream that peers opened towards this one."""

    def __init__(
        self,
        sessions: Sessions,
        limits: PeerLimits,
        window: int,
        max_frame: int,
        on_lost: Callable[[str], None],
    ) -> None:
        self.refused: Counter[str] = Counter()
        self.bytes_received = 0
        self._sessions = sessions
        self._limits = limits
        self._window = window
        self._max_frame = max_frame
        self._on_lost = on_lost
        self._links: dict[int, InboundLink] = {}
        self._unread: Counter[str] = Counter()

    async def accept(self, stream: Any) -> None:
        """Serve one stream until it ends."""
        peer = str(stream.muxed_conn.peer_id)
        # Frames that came over earlier streams and are still unread count: reconnecting buys no memory.
        debt = min(self._unread[peer], self._window)
        link = InboundLink(peer, stream, self._window, owed=self._window - debt, debt=debt)
        if sum(other.peer == link.peer for other in self._links.values()) >= self._limits.config.connections:
            self._limits.charge(link.peer, Offence.TOO_MANY_STREAMS)
            await abandon(stream)
            return
        self._links[id(link)] = link
        try:
            await self._serve(link)
        finally:
            del self._links[id(link)]
            self._on_lost(link.peer)
            await abandon(stream)

    def on_session_opened(self, session: bytes) -> None:
        """Let in the peers that asked for the session before it was open here."""
        for link in self._links.values():
            if session in link.waiting:
                link.waiting.discard(session)
                self._answer_open(link, session)

    def on_evicted(self, session: bytes, peer: str) -> None:
        """Tell an evicted peer that its frames are refused from now on."""
        for link in self._links.values():
            if link.peer == peer:
                link.say(Control(ControlKind.REFUSE, session, reason=RefusalReason.EVICTED))

    async def _serve(self, link: InboundLink) -> None:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write_controls, link)
                while True:
                    await self._read_record(link)
        except* StreamEnded as ended:
            log.debug("tensor stream ended", peer=link.peer, reason=str(ended.exceptions[0]))
        except* FrameError as errors:
            reason = str(errors.exceptions[0])
            self.refused[reason] += 1
            self._limits.charge(link.peer, Offence.PROTOCOL_VIOLATION)
            log.info("tensor stream refused", peer=link.peer, reason=reason)

    async def _write_controls(self, link: InboundLink) -> None:
        link.wake.set()
        while True:
            await link.wake.wait()
            for control in link.take_outbox():
                await write(link.stream, control.encode())

    async def _read_record(self, link: InboundLink) -> None:
        head = await link.reader.exactly(RECORD_BYTES)
        began = time.perf_counter_ns()
        record = decode_record(head, self._max_frame)
        if record.kind is RecordKind.OPEN:
            self._answer_open(link, record.session)
            return
        if record.session not in link.accepted:
            raise FrameError(FrameReason.SESSION_NOT_OPENED)
        # A peer that stops in the middle of a frame loses the stream, not this peer's patience.
        with trio.move_on_after(_STALL_SECONDS) as stalled:
            await self._read_frame(link, record, began, stalled)
        if stalled.cancelled_caught:
            raise StreamEnded("stalled within a frame")

    def _answer_open(self, link: InboundLink, session: bytes) -> None:
        refusal = self._sessions.refusal(session, link.peer)
        if len(link.accepted) + len(link.waiting) >= MAX_SESSIONS_PER_LINK:
            link.accepted = {known for known in link.accepted if self._sessions.is_open(known)}
        if len(link.accepted) + len(link.waiting) >= MAX_SESSIONS_PER_LINK:
            refusal = RefusalReason.TOO_MANY_SESSIONS
        if refusal is None:
            link.accepted.add(session)
            link.say(Control(ControlKind.ACCEPT, session))
            return
        if refusal is RefusalReason.UNKNOWN_SESSION:
            link.waiting.add(session)
        self.refused[refusal] += 1
        link.say(Control(ControlKind.REFUSE, session, reason=refusal))

    async def _read_frame(self, link: InboundLink, record: Record, began: int, stalled: trio.CancelScope) -> None:
        header = await link.reader.exactly(record.header)
        table = await link.reader.exactly(record.tensors * _LENGTH_BYTES)
        lengths = decode_lengths(table, record)
        refusal = self._sessions.refusal(record.session, link.peer)
        # Half a window stays charged to a frame until it is read; the rest returns as it arrives.
        kept = min(record.cost, link.window // 2) if refusal is None else 0
        meter = _Meter(link, kept, stalled)
        meter.count(record.cost - record.total)
        if refusal is not None:
            self.refused[refusal] += 1
            link.say(Control(ControlKind.REFUSE, record.session, reason=refusal))
            await _skip(meter, record.total)
            return
        tensors = tuple([await _read_tensor(meter, length) for length in lengths])
        self.bytes_received += record.total
        self._unread[link.peer] += kept
        frame = Frame(link.peer, header, tensors, (began, time.perf_counter_ns()))
        self._sessions.deliver(record.session, frame, lambda: self._on_read(link, kept))

    def _on_read(self, link: InboundLink, kept: int) -> None:
        """Give a frame's credit back to its link or, when that is gone, to the peer's later ones."""
        self._unread[link.peer] -= kept
        if not self._unread[link.peer]:
            del self._unread[link.peer]
        if id(link) in self._links:
            link.give_back(kept)
            return
        for other in self._links.values():
            if other.peer == link.peer:
                paid = min(kept, other.debt)
                other.debt -= paid
                kept -= paid
                other.give_back(paid)


class _Meter:
    """Credit and patience of one frame while it arrives."""

    def __init__(self, link: InboundLink, kept: int, stalled: trio.CancelScope) -> None:
        self.link = link
        # A piece must fit into the credit that is left beside an unread frame.
        self.piece = min(_PIECE_BYTES, link.window // 8)
        self._kept = kept
        self._stalled = stalled
        self._arrived = 0
        self._returned = 0

    def count(self, size: int) -> None:
        """Charge `size` bytes that arrived; return what exceeds the share that the frame keeps."""
        self.link.credit -= size
        if self.link.credit < 0:
            raise FrameError(FrameReason.CREDIT_EXCEEDED)
        self._arrived += size
        excess = self._arrived - self._kept - self._returned
        if excess > 0:
            self._returned += excess
            self.link.give_back(excess)
        self._stalled.deadline = trio.current_time() + _STALL_SECONDS


async def _read_tensor(meter: _Meter, length: int) -> memoryview:
    view = memoryview(bytearray(length))
    for start in range(0, length, meter.piece):
        piece = view[start : start + meter.piece]
        await meter.link.reader.into(piece)
        meter.count(len(piece))
    return view


async def _skip(meter: _Meter, total: int) -> None:
    for start in range(0, total, meter.piece):
        count = min(meter.piece, total - start)
        await meter.link.reader.exactly(count)
        meter.count(count)
