"""`/tdml/blob/3`: content-addressed transfer from several providers, verified chunk by chunk on arrival."""

import errno
from collections.abc import Callable, Sequence
from pathlib import Path

import structlog
import trio
from blake3 import blake3

from tdml_p2p.blob_store import BlobStore, DiskFull, Source
from tdml_p2p.blob_transfer import (
    ABSENT,
    PROTOCOL,
    BlobUnavailable,
    Buffer,
    IndexReply,
    Transfer,
    WantIndex,
    decode_want,
    encode_index,
)
from tdml_p2p.limits import PeerLimits
from tdml_p2p.requests import Refused, Requests
from trainer.content import CHUNK_BYTES, MAX_BLOB_BYTES, BlobIndex

log = structlog.get_logger(__name__)

MAX_REQUEST_BYTES = 256


class Blobs:
    """Held blobs and transfers of one peer."""

    def __init__(self, requests: Requests, limits: PeerLimits, folder: Path | None) -> None:
        self.store = BlobStore(folder)
        self.bytes_fetched = 0
        self._requests = requests
        self._limits = limits
        self._may_have: Callable[[str, bytes], bool] = lambda _peer, _address: True
        requests.serve(PROTOCOL, self._serve, MAX_REQUEST_BYTES)

    async def put(self, data: bytes | memoryview) -> bytes:
        """Keep and serve `data`; return its address; raise `DiskFull`."""
        return await self.store.put(data)

    def provide(self, address: bytes, getter: Callable[[], memoryview | bytes | None]) -> None:
        """Serve `address` from memory for as long as `getter` returns its bytes."""
        self.store.provide(address, getter)

    def add_source(self, source: Source) -> None:
        """Serve whatever `source` returns for an address, and None for what it does not hold."""
        self.store.add_source(source)

    def guard(self, may_have: Callable[[str, bytes], bool]) -> None:
        """Serve a blob only to peers for which `may_have(peer, address)`; to others it is not here."""
        self._may_have = may_have

    async def fetch(self, address: bytes, providers: Sequence[str], limit: int = MAX_BLOB_BYTES) -> memoryview:
        """Return a blob of up to `limit` bytes, local or from `providers`; raise `BlobUnavailable`."""
        held = await self._read_local(address, limit)
        if held is not None:
            return held
        transfer = Transfer(self._requests, self._limits, address, providers, limit)
        index = await transfer.find()
        buffer = memoryview(bytearray(index.size))

        async def keep(number: int, chunk: Buffer) -> None:
            buffer[number * CHUNK_BYTES : number * CHUNK_BYTES + len(chunk)] = chunk
            self.bytes_fetched += len(chunk)

        await transfer.run(set(range(len(index.chunks))), keep)
        return buffer

    async def download(self, address: bytes, providers: Sequence[str], limit: int = MAX_BLOB_BYTES) -> Path:
        """Return the file of a blob, fetching what an earlier attempt left; raise like `fetch`, or `DiskFull`."""
        path = self.store.path(address)
        if path is not None:
            return path
        transfer = Transfer(self._requests, self._limits, address, providers, limit)
        index = await transfer.find()
        part = self.store.partial_path(address)
        missing = await trio.to_thread.run_sync(_missing_chunks, part, index)

        async def keep(number: int, chunk: Buffer) -> None:
            await trio.to_thread.run_sync(_write_at, part, number * CHUNK_BYTES, chunk)
            self.bytes_fetched += len(chunk)

        await transfer.run(missing, keep)
        return await trio.to_thread.run_sync(self.store.adopt, address, index, part)

    async def _read_local(self, address: bytes, limit: int) -> memoryview | None:
        """Return a held blob; None when it is not here, or no longer, or damaged: others may have it."""
        index = await self.store.index(address)
        if index is None:
            return None
        if index.size > limit:
            raise BlobUnavailable(f"{address.hex()} has {index.size} bytes, the limit is {limit}")
        buffer = memoryview(bytearray(index.size))
        for number, expected in enumerate(index.chunks):
            chunk = await self.store.chunk(address, number)
            if chunk is None:
                return None
            if blake3(chunk).digest() != expected:
                log.warning("a blob is damaged in the local store", address=address.hex())
                return None
            buffer[number * CHUNK_BYTES : number * CHUNK_BYTES + len(chunk)] = chunk
        return buffer

    async def _serve(self, sender: str, data: bytes) -> Buffer:
        want = decode_want(data)
        index = await self.store.index(want.address) if self._may_have(sender, want.address) else None
        if index is None:
            raise Refused(ABSENT)
        if isinstance(want, WantIndex):
            only = await self.store.chunk(want.address, 0) if len(index.chunks) == 1 else b""
            return encode_index(IndexReply(index, bytes(only or b"")))
        if want.number + want.count > len(index.chunks):
            raise Refused(ABSENT)
        chunks = await self.store.chunk(want.address, want.number, want.count)
        if chunks is None:
            raise Refused(ABSENT)
        return chunks


def _missing_chunks(part: Path, index: BlobIndex) -> set[int]:
    """Return the chunks that an earlier attempt did not leave whole in `part`."""
    missing = set(range(len(index.chunks)))
    if part.exists():
        with part.open("rb") as file:
            for number, expected in enumerate(index.chunks):
                if blake3(file.read(CHUNK_BYTES)).digest() == expected:
                    missing.discard(number)
    return missing


def _write_at(part: Path, offset: int, chunk: Buffer) -> None:
    part.touch()
    try:
        with part.open("r+b") as file:
            file.seek(offset)
            file.write(chunk)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(part.parent) from None
        raise
