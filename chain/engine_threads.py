"""Where the engine's work runs: inline, in its one disk thread or in a thread of its own; and its bells."""

from collections.abc import Callable
from typing import TypeVar

import trio

T = TypeVar("T")


class Bell:
    """Wakes one loop; ringing twice before it listens wakes it once."""

    def __init__(self) -> None:
        self._event = trio.Event()

    def ring(self) -> None:
        """Wake the loop that listens, or that listens next."""
        self._event.set()

    async def heard(self) -> None:
        """Wait until the bell is rung."""
        await self._event.wait()
        self._event = trio.Event()


def one_at_a_time() -> trio.Lock:
    """Return a lock for work that all who want it at once need done only once."""
    return trio.Lock()


class Threads:
    """Runs blocking work; in threads only where `offload` says so, which a virtual clock does not bear."""

    def __init__(self, *, offload: bool) -> None:
        self._offload = offload
        self._disk = trio.CapacityLimiter(1)
        self._processor = trio.CapacityLimiter(2)
        self._verifier = trio.CapacityLimiter(1)

    async def disk(self, work: Callable[[], T]) -> T:
        """Run `work` on the databases, one at a time, to its end."""
        if not self._offload:
            await trio.lowlevel.checkpoint()
            return work()
        return await trio.to_thread.run_sync(work, limiter=self._disk)

    async def compute(self, work: Callable[[], T], *, is_large: bool = True) -> T:
        """Run `work` that computes, in a thread when it is large."""
        if not self._offload or not is_large:
            return work()
        return await trio.to_thread.run_sync(work, limiter=self._processor)

    async def verify(self, work: Callable[[], T], *, is_large: bool) -> T:
        """Run `work` that checks signatures, in a thread of its own when it is large: no block waits for it."""
        if not self._offload or not is_large:
            return work()
        return await trio.to_thread.run_sync(work, limiter=self._verifier)
