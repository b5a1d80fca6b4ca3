"""What this peer serves over `/tdml/sync/1`: heights, ranges, light blocks, and the newest snapshots."""

from collections.abc import Callable, Sequence
from functools import partial

from chain.codec import encode
from chain.engine_blocks import Tip
from chain.engine_files import Files
from chain.engine_threads import Threads, one_at_a_time
from chain.snapshots import Snapshot
from chain.state import State
from chain.sync import (
    NOTHING,
    ChunkRequest,
    HeadersRequest,
    LightRequest,
    RangeRequest,
    SnapshotInfo,
    SnapshotRequest,
    StatusReply,
    StatusRequest,
    SyncRequest,
)

SNAPSHOT_EPOCHS = 10
"""Epochs from one snapshot to the next; a chain too young for one serves the state of its newest epoch."""
KEPT_SNAPSHOTS = 2
"""Snapshots served at once, so that who begins to fetch one can end it."""


class Server:
    """Answers sync requests. Snapshots share their records with the state, so keeping them costs little."""

    def __init__(self, files: Files, threads: Threads, tip: Callable[[], Tip]) -> None:
        self._files = files
        self._threads = threads
        self._tip = tip
        self._states: dict[int, State] = {}
        self._snapshots: dict[int, Snapshot] = {}
        self._cutting = one_at_a_time()

    def keep(self, tips: Sequence[Tip]) -> None:
        """Keep the states of these consecutive tips that are snapshots."""
        for tip in tips:
            epoch = tip.state.params.epoch_blocks
            if tip.height % epoch == 0:
                self._states[tip.height] = tip.state
                lasting = [height for height in self._states if height % (SNAPSHOT_EPOCHS * epoch) == 0]
                for old in self._states.keys() - set(sorted(lasting or self._states)[-KEPT_SNAPSHOTS:]):
                    del self._states[old]
                    self._snapshots.pop(old, None)

    async def answer(self, request: SyncRequest) -> bytes:
        """Return the answer, `NOTHING` for a light block or a chunk that is not here."""
        match request:
            case StatusRequest():
                tip = self._tip()
                return encode(StatusReply(tip.height, tip.hash, self._files.base))
            case RangeRequest(_, first, count):
                last = min(self._tip().height, first + count - 1)
                return await self._threads.disk(partial(self._files.range, first, last))
            case HeadersRequest(_, last, count):
                return await self._threads.disk(partial(self._files.headers, max(1, last - count + 1), last))
            case LightRequest(_, height):
                return await self._threads.disk(partial(self._files.light, height))
            case SnapshotRequest():
                newest = max(self._states, default=0)
                return encode(SnapshotInfo(newest, (await self._snapshot(newest)).depth if newest else 0))
            case ChunkRequest():
                return await self._chunk(request)

    async def _chunk(self, request: ChunkRequest) -> bytes:
        if request.height not in self._states:
            return NOTHING
        snapshot = await self._snapshot(request.height)
        if request.depth != snapshot.depth or request.index >> snapshot.depth:
            return NOTHING
        return await self._threads.compute(lambda: encode(snapshot.chunk(request.index)))

    async def _snapshot(self, height: int) -> Snapshot:
        """Return a kept state cut into chunks, cut when first asked for."""
        state = self._states[height]
        async with self._cutting:  # else everyone who asks meanwhile costs as much
            found = self._snapshots.get(height)
            if found is None:
                found = await self._threads.compute(partial(Snapshot, state))
                if height in self._states:
                    self._snapshots[height] = found
        return found
