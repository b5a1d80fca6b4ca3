"""Blobs that this peer holds: files of the home folder by address, memory, and others' own sources."""

import errno
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import msgspec
import trio

from tdml_p2p.errors import UserError
from trainer.content import CHUNK_BYTES, BlobIndex, index_of

Source = Callable[[bytes], memoryview | bytes | None]
_MAX_INDEXES = 4096
_INLINE_BYTES = 1 << 20


class DiskFull(UserError):
    """The blob folder cannot take more bytes."""

    def __init__(self, folder: Path) -> None:
        super().__init__(f"No space is left for blobs in {folder}.", "free some space, or move the home folder")


class BlobStore:
    """Held blobs by address. A folder keeps them as `HEX` beside `HEX.index`; without one, memory does."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._memory: dict[bytes, bytes] = {}
        self._getters: dict[bytes, Callable[[], memoryview | bytes | None]] = {}
        self._sources: list[Source] = []
        self._indexes: OrderedDict[bytes, BlobIndex] = OrderedDict()

    def provide(self, address: bytes, getter: Callable[[], memoryview | bytes | None]) -> None:
        """Serve `address` from what `getter` returns while it returns something."""
        self._getters[address] = getter

    def withdraw(self, address: bytes) -> None:
        """Stop serving `address` from a getter."""
        self._getters.pop(address, None)

    def add_source(self, source: Source) -> None:
        """Ask `source` for addresses that are not here."""
        self._sources.append(source)

    async def put(self, data: bytes | memoryview) -> bytes:
        """Keep `data` and return its address; raise `DiskFull`."""
        index = await _index(memoryview(data).cast("B"))
        address = index.address()
        self._remember(address, index)
        if self._folder is None:
            self._memory[address] = bytes(data)
        else:
            await trio.to_thread.run_sync(self._write, self._folder, address, index, data)
        return address

    async def index(self, address: bytes) -> BlobIndex | None:
        """Return the index of a held blob."""
        held = self._in_memory(address)
        if held is None and self.path(address) is None:
            # What a source held a moment ago may be gone.
            self._indexes.pop(address, None)
            return None
        if address in self._indexes:
            self._indexes.move_to_end(address)
            return self._indexes[address]
        if held is not None:
            index = await _index(memoryview(held).cast("B"))
            # A source that returns other bytes than it was asked for holds nothing.
            if index.address() != address:
                return None
            self._remember(address, index)
            return index
        return await trio.to_thread.run_sync(self._read_index, address)

    async def chunk(self, address: bytes, number: int, count: int = 1) -> bytes | memoryview | None:
        """Return one chunk of a held blob, up to 1 MiB, or `count` that follow each other; not copied from memory."""
        held = self._in_memory(address)
        if held is not None:
            return memoryview(held).cast("B")[number * CHUNK_BYTES : (number + count) * CHUNK_BYTES]
        return await trio.to_thread.run_sync(self._read_chunks, address, number, count)

    def path(self, address: bytes) -> Path | None:
        """Return the file of a blob held on disk."""
        path = self._folder / address.hex() if self._folder is not None else None
        return path if path is not None and path.exists() else None

    def drop(self, address: bytes) -> None:
        """Let go of a blob that `put` has kept."""
        self._memory.pop(address, None)
        self._indexes.pop(address, None)
        if self._folder is not None:
            for path in (self._folder / address.hex(), self._folder / f"{address.hex()}.index"):
                path.unlink(missing_ok=True)

    def partial_path(self, address: bytes) -> Path:
        """Return where a download of `address` collects its chunks; needs a folder."""
        if self._folder is None:
            raise ValueError("this store has no folder")
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder / f"{address.hex()}.part"

    def adopt(self, address: bytes, index: BlobIndex, part: Path) -> Path:
        """Turn a complete download into a held blob (blocking); raise `DiskFull`."""
        assert self._folder is not None
        _guarded(self._folder, lambda: _write_whole(part.with_suffix(".index"), msgspec.msgpack.encode(index)))
        path = part.with_suffix("")
        part.replace(path)
        return path

    def _in_memory(self, address: bytes) -> memoryview | bytes | None:
        if address in self._memory:
            return self._memory[address]
        getter = self._getters.get(address)
        held = getter() if getter is not None else None
        for source in self._sources if held is None else ():
            held = source(address)
            if held is not None:
                break
        return held

    def _remember(self, address: bytes, index: BlobIndex) -> None:
        self._indexes[address] = index
        if len(self._indexes) > _MAX_INDEXES:
            self._indexes.popitem(last=False)

    def _write(self, folder: Path, address: bytes, index: BlobIndex, data: bytes | memoryview) -> None:
        def work() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            _write_whole(folder / f"{address.hex()}.index", msgspec.msgpack.encode(index))
            _write_whole(folder / address.hex(), data)

        _guarded(folder, work)

    def _read_index(self, address: bytes) -> BlobIndex | None:
        path = self.path(address)
        if path is None:
            return None
        try:
            index = msgspec.msgpack.decode(path.with_suffix(".index").read_bytes(), type=BlobIndex)
        except (OSError, msgspec.DecodeError):
            return None
        return index if index.address() == address else None

    def _read_chunks(self, address: bytes, number: int, count: int) -> bytes | None:
        path = self.path(address)
        if path is None:
            return None
        with path.open("rb") as file:
            file.seek(number * CHUNK_BYTES)
            return file.read(count * CHUNK_BYTES)


def _guarded(folder: Path, work: Callable[[], None]) -> None:
    try:
        work()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(folder) from None
        raise


def _write_whole(path: Path, data: bytes | memoryview) -> None:
    """Write a file so that it is there whole or not at all."""
    scratch = path.with_name(f".{path.name}.new")
    try:
        with scratch.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


async def _index(view: memoryview) -> BlobIndex:
    """Return the index of `view`, hashed off the event loop when large."""
    if len(view) <= _INLINE_BYTES:
        return index_of(view)
    return await trio.to_thread.run_sync(index_of, view)
