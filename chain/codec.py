"""Canonical encoding of consensus objects: positional msgpack arrays that re-encode to themselves.

Every wire and storage object of the chain is a frozen, array-like `msgspec.Struct` made of integers,
byte strings, booleans and tuples of such; text, floats and maps never appear. `decode` refuses any
byte string that is not exactly what `encode` would produce (msgpack alone accepts several spellings
of one integer), so equal objects have equal bytes and equal hashes.
"""

from typing import Annotated, Any, TypeVar

import msgspec

MAX_OBJECT_BYTES = 4 * 1024 * 1024

Uint = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Hash = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
AccountId = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
"""A raw 32-byte ed25519 public key."""
SignatureBytes = Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]

T = TypeVar("T")

_encoder = msgspec.msgpack.Encoder()
_decoders: dict[Any, msgspec.msgpack.Decoder[Any]] = {}


class DecodeError(ValueError):
    """Bytes that are not the canonical encoding of the expected object."""


class Record(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base of every consensus object: immutable, positional, canonical."""


def encode(value: Any) -> bytes:
    """Return the canonical bytes of a `Record` (or of nested tuples of ints, bytes and bools)."""
    return _encoder.encode(value)


def decode(kind: type[T] | Any, data: bytes, limit: int = MAX_OBJECT_BYTES) -> T:
    """Return the `kind` that `data` canonically encodes; raise `DecodeError` for anything else."""
    if len(data) > limit:
        raise DecodeError(f"object of {len(data)} bytes exceeds the limit of {limit}")
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.msgpack.Decoder(kind)
    try:
        value: T = decoder.decode(data)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise DecodeError(str(error)) from None
    if _encoder.encode(value) != data:
        raise DecodeError("not the canonical encoding")
    return value
