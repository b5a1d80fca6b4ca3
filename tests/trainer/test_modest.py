"""Work that gives way: at a lower priority, in one thread, under the caller's context."""

import os
import sys
import threading
from contextvars import ContextVar

import pytest

from trainer.modest import NICENESS, ModestThread

_said: ContextVar[str] = ContextVar("said", default="nothing")


def test_work_sees_the_callers_context_and_returns_or_raises() -> None:
    thread = ModestThread()
    token = _said.set("something")
    assert thread.run(_said.get) == "something"
    _said.reset(token)
    assert thread.run(_said.get) == "nothing"
    with pytest.raises(ZeroDivisionError):
        thread.run(lambda: 1 // 0)
    assert thread.run(threading.get_ident) == thread.run(threading.get_ident) != threading.get_ident()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads have priorities of their own on Linux only")
def test_only_its_own_thread_gives_way() -> None:
    before = os.getpriority(os.PRIO_PROCESS, 0)
    assert ModestThread().run(lambda: os.getpriority(os.PRIO_PROCESS, 0)) == min(before + NICENESS, 19)
    assert os.getpriority(os.PRIO_PROCESS, 0) == before
