"""Discovery records: what a peer says about itself under a key, signed, bounded and expiring."""

import re
from collections import OrderedDict
from collections.abc import Callable, Iterable
from enum import StrEnum
from typing import Annotated

import msgspec

from chain.codec import SignatureBytes
from chain.hashing import digest
from chain.keys import PrivateKey, account_of, peer_id, verify

MAX_RECORD_BYTES = 4096
MAX_RECORD_SECONDS = 3600
MAX_KEYS = 4096
MAX_RECORDS_PER_KEY = 64
MAX_KEYS_PER_PEER = 512
_SKEW_SECONDS = 120
_KEY = re.compile(r"tasks|task/[0-9a-f]{64}|task/[0-9a-f]{64}/stage/(0|[1-9][0-9]{0,3})|blob/[0-9a-f]{64}")


class RecordReason(StrEnum):
    """Why a record or key is refused."""

    BAD_KEY = "bad-key"
    TOO_LARGE = "record-too-large"
    BAD_PEER = "bad-peer"
    BAD_SIGNATURE = "bad-signature"
    EXPIRED = "record-expired"
    FROM_THE_FUTURE = "record-from-the-future"
    LIVES_TOO_LONG = "record-lives-too-long"
    MALFORMED = "malformed-record"
    FULL = "too-many-records"


class RecordError(ValueError):
    """A refused record; `reason` is a `RecordReason`."""

    def __init__(self, reason: RecordReason) -> None:
        super().__init__(reason.value)
        self.reason = reason


class SignedRecord(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """`record` bytes of `peer` under `key`, valid from `issued` to `expires` (Unix seconds)."""

    key: Annotated[str, msgspec.Meta(max_length=96)]
    peer: Annotated[str, msgspec.Meta(max_length=64)]
    record: Annotated[bytes, msgspec.Meta(max_length=MAX_RECORD_BYTES)]
    issued: Annotated[int, msgspec.Meta(ge=0, le=2**40)]
    expires: Annotated[int, msgspec.Meta(ge=0, le=2**40)]
    signature: SignatureBytes

    def statement(self) -> bytes:
        """Return what the peer signs."""
        fields = (self.key, self.peer, self.record, self.issued, self.expires)
        return digest("discovery record", msgspec.msgpack.encode(fields))


def check_key(key: str) -> None:
    """Raise `RecordError` unless `key` is one of the kinds that this network uses."""
    if _KEY.fullmatch(key) is None:
        raise RecordError(RecordReason.BAD_KEY)


def sign_record(key: PrivateKey, name: str, record: bytes, now: int, seconds: int) -> SignedRecord:
    """Return `key`'s record under `name`; raise `RecordError` beyond the bounds."""
    check_key(name)
    if len(record) > MAX_RECORD_BYTES:
        raise RecordError(RecordReason.TOO_LARGE)
    unsigned = SignedRecord(name, peer_id(key.account), record, now, now + seconds, bytes(64))
    return msgspec.structs.replace(unsigned, signature=key.sign(unsigned.statement()))


def check_record(record: SignedRecord, now: int) -> None:
    """Raise `RecordError` unless the record is signed by the peer it names and valid `now`."""
    check_key(record.key)
    try:
        account = account_of(record.peer)
    except ValueError:
        raise RecordError(RecordReason.BAD_PEER) from None
    if record.expires <= now:
        raise RecordError(RecordReason.EXPIRED)
    if record.issued > now + _SKEW_SECONDS:
        raise RecordError(RecordReason.FROM_THE_FUTURE)
    if not 0 < record.expires - record.issued <= MAX_RECORD_SECONDS:
        raise RecordError(RecordReason.LIVES_TOO_LONG)
    if not verify(account, record.statement(), record.signature):
        raise RecordError(RecordReason.BAD_SIGNATURE)


class RecordBook:
    """Verified records of others and of this peer, the newest per key and peer, within bounds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._keys: OrderedDict[str, dict[str, SignedRecord]] = OrderedDict()
        self._of_peer: dict[str, int] = {}

    def add(self, record: SignedRecord) -> None:
        """Keep a record; raise `RecordError` when it is refused."""
        check_record(record, int(self._clock()))
        held = self._keys.get(record.key, {}).get(record.peer)
        if held is not None:
            if record.issued >= held.issued:
                self._keys[record.key][record.peer] = record
            return
        self._make_room(record)
        self._keys.setdefault(record.key, {})[record.peer] = record
        self._of_peer[record.peer] = self._of_peer.get(record.peer, 0) + 1

    def get(self, key: str) -> tuple[SignedRecord, ...]:
        """Return the valid records under `key`."""
        now = self._clock()
        return tuple(record for record in self._keys.get(key, {}).values() if record.expires > now)

    def all(self) -> Iterable[SignedRecord]:
        """Return every held record."""
        return [record for held in self._keys.values() for record in held.values()]

    def remove(self, key: str, peer: str) -> None:
        """Forget one record."""
        held = self._keys.get(key, {})
        if held.pop(peer, None) is not None:
            self._of_peer[peer] -= 1
            if not self._of_peer[peer]:
                del self._of_peer[peer]
        if key in self._keys and not held:
            del self._keys[key]

    def expire(self) -> None:
        """Forget what is no longer valid."""
        now = self._clock()
        for record in self.all():
            if record.expires <= now:
                self.remove(record.key, record.peer)

    def _make_room(self, record: SignedRecord) -> None:
        if self._is_full(record):
            self.expire()
        if self._is_full(record):
            raise RecordError(RecordReason.FULL)

    def _is_full(self, record: SignedRecord) -> bool:
        return (
            len(self._keys.get(record.key, ())) >= MAX_RECORDS_PER_KEY
            or (record.key not in self._keys and len(self._keys) >= MAX_KEYS)
            or self._of_peer.get(record.peer, 0) >= MAX_KEYS_PER_PEER
        )
