"""Where audits compute: beside training they give way, until they are behind."""

import os
import sys
import threading

import pytest

from tdml_p2p.swarm.computing import ModestCompute, TorchCompute
from trainer.modest import NICENESS


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads have priorities of their own on Linux only")
async def test_audits_give_way_unless_they_are_behind() -> None:
    usual, owed = os.getpriority(os.PRIO_PROCESS, 0), list[int]()
    compute = ModestCompute(1, lambda: bool(owed))
    assert await compute(_priority) == min(usual + NICENESS, 19)
    owed.append(1)
    assert await compute(_priority) == usual
    owed.clear()
    assert await compute(_priority) == min(usual + NICENESS, 19)
    assert await TorchCompute(1)(_priority) == usual


@pytest.mark.parametrize("is_behind", [False, True])
async def test_a_failure_is_the_callers(is_behind: bool) -> None:
    with pytest.raises(ZeroDivisionError):
        await ModestCompute(1, lambda: is_behind)(lambda: 1 // 0)


def _priority() -> int:
    assert threading.current_thread() is not threading.main_thread()
    return os.getpriority(os.PRIO_PROCESS, 0)
