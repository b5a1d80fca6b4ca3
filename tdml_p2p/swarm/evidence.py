"""What disputed audits rest on, kept on disk by those who judged them, so that anybody can re-execute later.

An audit's material is content-addressed: the task's manifest, the state's manifest and weights, both inputs, and
the claimed results that could be had. A small file per audit names them, with the senders' signatures.
"""

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import msgspec
import structlog
import trio

from chain.codec import Hash
from chain.records import Audit
from tdml_p2p.blob_store import BlobStore
from tdml_p2p.errors import UserError
from tdml_p2p.swarm.inputs import Descriptor, Input, Inputs, Wanted
from tdml_p2p.swarm.material import Buffer, Fetch, Unavailable
from tdml_p2p.swarm.reexecution import Cell
from trainer.content import address_of

log = structlog.get_logger(__name__)

MAX_AUDITS = 64
"""Audits whose material is kept; the oldest make room."""
_MAX_FILE_BYTES = 256 * 1024
_FETCH_SECONDS = 5.0


class Evidence(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The cell of a disputed audit, its inputs as they were signed for, and the addresses of all its material."""

    audit: Hash
    wanted: Wanted
    x: Input
    gy: Input
    blobs: Annotated[tuple[Hash, ...], msgspec.Meta(max_length=4096)]

    @property
    def descriptor(self) -> Descriptor:
        """The inputs, as they are told to whoever asks for them."""
        return Descriptor(self.x, self.gy)


_decoder = msgspec.msgpack.Decoder(Evidence)


class EvidenceStore:
    """Evidence of up to `limit` audits in a folder, its material in a blob store of the same home."""

    def __init__(self, folder: Path, blobs: BlobStore, limit: int = MAX_AUDITS) -> None:
        self._folder = folder
        self._blobs = blobs
        self._limit = limit

    async def keep(self, found: Evidence, material: Iterable[bytes | memoryview]) -> None:
        """Keep an audit's material, whose addresses `found` lists; raise `DiskFull`."""
        if self.of_audit(found.audit) is not None:
            return
        for data in material:
            await self._blobs.put(data)
        await trio.to_thread.run_sync(self._write, found)

    def of_audit(self, audit: bytes) -> Evidence | None:
        """Return the evidence of an audit that this peer judged."""
        return _read(self._folder / audit.hex())

    def describe(self, wanted: Wanted) -> Descriptor | None:
        """Return the signed inputs of a cell whose audit this peer judged."""
        return next((one.descriptor for one in self._all() if one.wanted == wanted), None)

    def _all(self) -> list[Evidence]:
        """Return all evidence, oldest first."""
        if not self._folder.is_dir():
            return []
        files = sorted(self._folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        return [found for path in files if (found := _read(path)) is not None]

    def _write(self, found: Evidence) -> None:
        self._folder.mkdir(exist_ok=True)
        draft = self._folder / f".{found.audit.hex()}.new"
        draft.write_bytes(msgspec.msgpack.encode(found))
        os.replace(draft, self._folder / found.audit.hex())
        held = self._all()
        kept = {address for one in held[-self._limit :] for address in one.blobs}
        for old in held[: -self._limit]:
            (self._folder / old.audit.hex()).unlink(missing_ok=True)
            for address in set(old.blobs) - kept:
                self._blobs.drop(address)


async def keep_evidence(
    store: EvidenceStore, fetch: Fetch, audit: Audit, cell: Cell, inputs: Inputs, material: Sequence[Buffer]
) -> None:
    """Keep what an opened audit rests on, with the claimed tensors that can be had; a full disk is only logged."""
    if audit.opening is None:
        return
    trace, found = audit.opening.trace, list(material)
    for address in (trace.y, trace.gx, trace.gw):
        with suppress(Unavailable, trio.TooSlowError), trio.fail_after(_FETCH_SECONDS):
            found.append(await fetch(address, cell.holders))
    blobs = await trio.to_thread.run_sync(lambda: tuple(map(address_of, found)))
    try:
        await store.keep(Evidence(audit.id, cell.wanted, inputs.x, inputs.gy, blobs), found)
    except (OSError, UserError) as error:
        log.warning("evidence is not kept", audit=audit.id.hex(), reason=str(error))


def _read(path: Path) -> Evidence | None:
    """Return what a file holds, None if it is not there or not whole."""
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            return None
        return _decoder.decode(path.read_bytes())
    except (OSError, msgspec.DecodeError):
        return None
