"""Torch work of a peer off its event loop: one piece at a time, and audits where they are least in the way."""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

from trainer.modest import ModestThread
from trainer.runtime import prepare_process
from trainer.trace import lane
from trainer.worker_ports import ThreadCompute

T = TypeVar("T")


class TorchCompute(ThreadCompute):
    """Torch work in one thread; the first piece loads torch."""

    def __init__(self, threads: int) -> None:
        super().__init__()
        self._threads = threads
        self._is_ready = False

    async def __call__(self, work: Callable[[], T], /) -> T:
        """Return what `work` returns, run in a thread."""
        return await super().__call__(partial(self._prepared, work))

    def _prepared(self, work: Callable[[], T]) -> T:
        if not self._is_ready:
            prepare_process(self._threads)
            self._is_ready = True
        with lane("compute"):
            return work()


class ModestCompute(TorchCompute):
    """Audits of a peer that trains nothing: they fill what training on the same cores leaves, unless they are behind.

    Who waits for an audit is held up by it, so whoever owes many takes as much of the cores as everybody else.
    """

    def __init__(self, threads: int, is_behind: Callable[[], bool]) -> None:
        super().__init__(threads)
        self._modest = ModestThread()
        self._is_behind = is_behind

    def _prepared(self, work: Callable[[], T]) -> T:
        prepared = partial(super()._prepared, work)
        return prepared() if self._is_behind() else self._modest.run(prepared)
