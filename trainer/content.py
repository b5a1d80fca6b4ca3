"""Content addresses: the BLAKE3 name of a byte string, verifiable chunk by chunk while it arrives."""

from typing import Annotated

import msgspec
from blake3 import blake3

CHUNK_BYTES = 1 << 20
MAX_BLOB_BYTES = 64 << 30

Address = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]


class BlobIndex(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Size in bytes of a blob and the BLAKE3 hash of each of its 1 MiB chunks; its digest is the address."""

    size: Annotated[int, msgspec.Meta(ge=0, le=MAX_BLOB_BYTES)]
    chunks: tuple[Address, ...]

    def address(self) -> bytes:
        """Return the 32-byte address of the blob that this index describes."""
        return blake3(msgspec.msgpack.encode(self), derive_key_context="tdml 1 blob").digest()


def index_of(data: bytes | memoryview) -> BlobIndex:
    """Return the index of `data` (any contiguous buffer, read as bytes)."""
    view = memoryview(data).cast("B")
    return BlobIndex(
        len(view),
        tuple(blake3(view[i : i + CHUNK_BYTES]).digest() for i in range(0, len(view), CHUNK_BYTES)),
    )


def address_of(data: bytes | memoryview) -> bytes:
    """Return the 32-byte content address of `data`."""
    return index_of(data).address()
