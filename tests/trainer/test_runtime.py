"""An allocator that keeps what is freed for the next tensors, and gives it back when the work is over."""

import subprocess
import sys

import pytest

_PROGRAM = """
import ctypes
from pathlib import Path
from trainer.runtime import prepare_memory, release_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def resident():
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1]) >> 20

def use(size):
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    libc.free(block)

prepare_memory()
before = resident()
use(96 << 20)
kept = resident()
release_memory()
print(kept - before, resident() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's settings")
def test_freed_memory_is_kept_until_it_is_released() -> None:
    done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=True)
    kept, left = (int(number) for number in done.stdout.split())
    assert kept >= 90
    assert left < 10
