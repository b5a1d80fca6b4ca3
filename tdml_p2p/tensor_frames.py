"""Bytes of `/tdml/tensor/2`: what the sender of a stream writes, and what its receiver writes back.

Sender: `RECORD_BYTES` of fixed head (magic, version, kind, number of tensors, length of the header, total
length of the tensors, session), then for a frame the header, one 8-byte length per tensor, the tensors.
Receiver: `CONTROL_BYTES` each: kind, reason, value, session.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum

MAGIC = b"TDMT"
VERSION = 1
MAX_HEADER_BYTES = 64 * 1024
MAX_TENSORS = 64
SESSION_BYTES = 32

_RECORD = struct.Struct("!4sBBHIQ32s")
_CONTROL = struct.Struct("!BBxxxxxxQ32s")
_LENGTH = struct.Struct("!Q")
RECORD_BYTES = _RECORD.size
CONTROL_BYTES = _CONTROL.size


class FrameError(ValueError):
    """Bytes that are not a record of this protocol, or exceed its bounds; `reason` names why."""

    def __init__(self, reason: "FrameReason") -> None:
        super().__init__(reason.value)
        self.reason = reason


class FrameReason(StrEnum):
    """Why a record is refused; the stream that carried it is reset."""

    NOT_A_RECORD = "not-a-record"
    UNKNOWN_VERSION = "unknown-version"
    UNKNOWN_KIND = "unknown-kind"
    HEADER_TOO_LARGE = "header-too-large"
    TOO_MANY_TENSORS = "too-many-tensors"
    FRAME_TOO_LARGE = "frame-too-large"
    LENGTHS_DIFFER = "lengths-differ"
    SESSION_NOT_OPENED = "session-not-opened"
    CREDIT_EXCEEDED = "credit-exceeded"
    ANSWERS_UNREAD = "answers-unread"


class RecordKind(IntEnum):
    """What a sender's record is."""

    OPEN = 1
    FRAME = 2


class ControlKind(IntEnum):
    """What a receiver's record is: more credit in bytes, or a session taken or refused."""

    GRANT = 1
    ACCEPT = 2
    REFUSE = 3


class RefusalReason(StrEnum):
    """Why a receiver does not take a session's frames; the order below is the wire's numbering."""

    UNKNOWN_SESSION = "unknown-session"
    EVICTED = "evicted"
    TOO_MANY_SESSIONS = "too-many-sessions"
    BANNED = "banned"


_REFUSALS = tuple(RefusalReason)


@dataclass(frozen=True)
class Record:
    """The fixed head of what a sender writes."""

    kind: RecordKind
    session: bytes
    tensors: int = 0
    header: int = 0
    total: int = 0

    def encode(self) -> bytes:
        """Return `RECORD_BYTES` bytes."""
        return _RECORD.pack(MAGIC, VERSION, self.kind, self.tensors, self.header, self.total, self.session)

    @property
    def cost(self) -> int:
        """Bytes of credit that the record with its body takes; sender and receiver compute the same."""
        return RECORD_BYTES + self.header + _LENGTH.size * self.tensors + self.total


@dataclass(frozen=True)
class Control:
    """What a receiver writes back: `value` is the credit of a GRANT; `reason` belongs to a REFUSE."""

    kind: ControlKind
    session: bytes = bytes(SESSION_BYTES)
    value: int = 0
    reason: RefusalReason = RefusalReason.UNKNOWN_SESSION

    def encode(self) -> bytes:
        """Return `CONTROL_BYTES` bytes."""
        return _CONTROL.pack(self.kind, _REFUSALS.index(self.reason), self.value, self.session)


def decode_record(data: bytes, max_frame: int) -> Record:
    """Return the record of a fixed head whose body is within bounds; raise `FrameError`."""
    if len(data) != RECORD_BYTES:
        raise FrameError(FrameReason.NOT_A_RECORD)
    magic, version, kind, tensors, header, total, session = _RECORD.unpack(data)
    if magic != MAGIC:
        raise FrameError(FrameReason.NOT_A_RECORD)
    if version != VERSION:
        raise FrameError(FrameReason.UNKNOWN_VERSION)
    if kind not in tuple(RecordKind):
        raise FrameError(FrameReason.UNKNOWN_KIND)
    if kind == RecordKind.OPEN and (tensors or header or total):
        raise FrameError(FrameReason.NOT_A_RECORD)
    if header > MAX_HEADER_BYTES:
        raise FrameError(FrameReason.HEADER_TOO_LARGE)
    if tensors > MAX_TENSORS:
        raise FrameError(FrameReason.TOO_MANY_TENSORS)
    if total > max_frame:
        raise FrameError(FrameReason.FRAME_TOO_LARGE)
    return Record(RecordKind(kind), session, tensors, header, total)


def decode_control(data: bytes) -> Control:
    """Return the control record that `data` is; raise `FrameError`."""
    if len(data) != CONTROL_BYTES:
        raise FrameError(FrameReason.NOT_A_RECORD)
    kind, reason, value, session = _CONTROL.unpack(data)
    if kind not in tuple(ControlKind) or reason >= len(_REFUSALS):
        raise FrameError(FrameReason.UNKNOWN_KIND)
    return Control(ControlKind(kind), session, value, _REFUSALS[reason])


def encode_lengths(lengths: Sequence[int]) -> bytes:
    """Return the table of tensor lengths that follows a frame's header."""
    return b"".join(map(_LENGTH.pack, lengths))


def decode_lengths(data: bytes, record: Record) -> tuple[int, ...]:
    """Return the tensors' lengths; raise `FrameError` unless they are the record's number and total."""
    if len(data) != record.tensors * _LENGTH.size:
        raise FrameError(FrameReason.LENGTHS_DIFFER)
    lengths = tuple(length for (length,) in _LENGTH.iter_unpack(data))
    if sum(lengths) != record.total:
        raise FrameError(FrameReason.LENGTHS_DIFFER)
    return lengths
