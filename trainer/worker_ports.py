"""What a worker is given: its configuration, and its ways to compute, to fetch states and to report."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

import trio

from trainer.manifest import TaskManifest

if TYPE_CHECKING:
    from trainer.stage import StageLike
    from trainer.state import StageState
    from trainer.worker_step import StepRecord

T = TypeVar("T")

DEFAULT_MEMORY_LIMIT = 4 << 30
DEFAULT_EARLY_LIMIT = 256 << 20


class StateUnavailable(Exception):
    """No holder gave a state with the wanted root."""


class Compute(Protocol):
    """A way to run torch work outside the event loop, one piece at a time."""

    async def __call__(self, work: Callable[[], T], /) -> T:
        """Return what `work` returns."""


class ThreadCompute:
    """Torch work in one worker thread; audits that share the object take turns with training."""

    def __init__(self) -> None:
        self._limiter = trio.CapacityLimiter(1)

    async def __call__(self, work: Callable[[], T], /) -> T:
        """Return what `work` returns, run in a thread."""
        return await trio.to_thread.run_sync(work, limiter=self._limiter)


async def in_thread(work: Callable[[], T], /) -> T:
    """Return what `work` returns, run in any thread: what does not wait for the torch work."""
    return await trio.to_thread.run_sync(work)


@dataclass(frozen=True)
class WorkerConfig:
    """One worker's seat; `memory_limit` and `early_limit` are bytes of tensors kept for a step."""

    client: str
    stage: "StageLike"
    manifest: TaskManifest
    ring_depth: int
    memory_limit: int = DEFAULT_MEMORY_LIMIT
    early_limit: int = DEFAULT_EARLY_LIMIT


@dataclass(frozen=True)
class WorkerPorts:
    """A worker's surroundings; `fetch_state` raises `StateUnavailable`, `clock` counts seconds.

    `offload` runs what would hold the event loop and must not wait for a cell that is being computed.
    """

    compute: Compute
    fetch_state: Callable[[bytes, tuple[str, ...]], Awaitable["StageState"]]
    on_committed: Callable[["StepRecord"], Awaitable[None]]
    clock: Callable[[], float] = trio.current_time
    offload: Compute = in_thread
