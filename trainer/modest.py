"""A thread of its own for work that gives way to everything else on the same cores."""

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from typing import TypeVar

NICENESS = 5
"""A thread with as much to do beside it gets a quarter of a core, where it would have half of it."""

T = TypeVar("T")


class ModestThread:
    """Runs one piece of work after another at a lower priority, which no privilege is needed for.

    The thread is kept: without privileges nobody gets a higher priority back, so threads that others use must not have
    it lowered. Where threads have no priority of their own, as outside Linux, it is a thread like any other.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, "audits", _give_way)

    def run(self, work: Callable[[], T]) -> T:
        """Return what `work` returns, run in the thread under the caller's context."""
        return self._executor.submit(copy_context().run, work).result()


def _give_way() -> None:
    if sys.platform.startswith("linux"):
        with suppress(OSError):
            thread = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, thread, min(os.getpriority(os.PRIO_PROCESS, thread) + NICENESS, 19))
