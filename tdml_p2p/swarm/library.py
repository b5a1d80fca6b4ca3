"""Where a peer finds material by content address: its own seats, its disk, named holders, the DHT."""

from collections.abc import Callable, Sequence

from tdml_p2p.blob_transfer import BlobUnavailable
from tdml_p2p.host import Network
from tdml_p2p.swarm.material import Buffer, Unavailable
from trainer.manifest import MAX_MANIFEST_BYTES, ManifestError, TaskManifest, decode_manifest

MAX_TENSOR_BYTES = 8 << 30
_MOST_REFUSED = 1024


class Library:
    """Blobs by address, and the task manifests read so far."""

    def __init__(self, network: Network, local: Callable[[bytes], memoryview | None]) -> None:
        self._network = network
        self._local = local
        self._manifests: dict[bytes, TaskManifest] = {}
        self._refused: dict[bytes, str] = {}
        """Why manifests of these addresses are none: they are not looked at again."""

    def manifest(self, address: bytes) -> TaskManifest | None:
        """Return a manifest that was learned before."""
        return self._manifests.get(address)

    def know(self, manifest: TaskManifest) -> None:
        """Remember a manifest that this peer made itself."""
        self._manifests[manifest.address] = manifest

    async def read(self, address: bytes, holders: Sequence[str]) -> TaskManifest:
        """Return a manifest, fetched from one of `holders` where it is not known; raise `Unavailable`."""
        found = self._manifests.get(address)
        if found is not None:
            return found
        if (refused := self._refused.get(address)) is not None:
            raise Unavailable(f"the manifest is refused: {refused}")
        data = await self.fetch(address, holders, MAX_MANIFEST_BYTES)
        try:
            return self._manifests.setdefault(address, decode_manifest(bytes(data)))
        except ManifestError as error:
            self._refused[address] = str(error)
            while len(self._refused) > _MOST_REFUSED:
                del self._refused[next(iter(self._refused))]
            raise Unavailable(f"the manifest is refused: {error}") from None

    async def learn(self, address: bytes, task: bytes, others: Sequence[str]) -> None:
        """Fetch and remember a manifest, from who announces the task or `others`; raise `Unavailable`."""
        holders = [record.peer for record in await self._network.discovery.find(f"task/{task.hex()}")]
        await self.read(address, [*holders, *others])

    async def fetch(self, address: bytes, holders: Sequence[str], limit: int = MAX_TENSOR_BYTES) -> Buffer:
        """Return a blob, from this peer's own memory if it is there; raise `Unavailable`."""
        found = self._local(address)
        if found is not None:
            return found
        others = tuple(dict.fromkeys(peer for peer in holders if peer != self._network.peer))
        try:
            return await self._network.blobs.fetch(address, others, limit)
        except BlobUnavailable as error:
            raise Unavailable(str(error)) from None
