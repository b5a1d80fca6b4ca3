"""Stage states over the network: a root leads to a manifest, the manifest to three vectors."""

from collections.abc import Sequence

import trio

from tdml_p2p.swarm.material import Fetch, Unavailable
from trainer.errors import StageError
from trainer.state import StageState, decode_state_manifest, restored_state
from trainer.worker_ports import StateUnavailable


async def fetch_state(fetch: Fetch, root: bytes, holders: Sequence[str], size: int | None = None) -> StageState:
    """Return the state with this root, of `size` parameters if that is known; raise `StateUnavailable`."""
    try:
        manifest = decode_state_manifest(bytes(await fetch(root, holders)), root)
        addresses = (manifest.weights, manifest.m, manifest.v)
        blobs = {address: await fetch(address, holders) for address in addresses}
    except (Unavailable, StageError) as error:
        raise StateUnavailable(str(error)) from None
    count = len(blobs[manifest.weights]) // 4 if size is None else size
    try:
        return await trio.to_thread.run_sync(restored_state, manifest, count, blobs.__getitem__)
    except StageError as error:
        raise StateUnavailable(str(error)) from None
