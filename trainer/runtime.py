"""Settings of a process that trains: torch threads, and an allocator that keeps its memory."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
_KEPT_BYTES = (1 << 31) - 1  # an int's largest
_TOP_PAD = 1 << 26


def prepare_process(threads: int) -> None:
    """Load torch with `threads` threads, and keep freed memory for the next tensors; see `prepare_memory`."""
    import torch

    torch.set_num_threads(threads)
    prepare_memory()


def prepare_memory() -> None:
    """Keep freed memory for the next tensors instead of returning it.

    Activations come and go in megabytes; given back to the kernel each time, they cost page faults, which on
    virtual machines can take longer than the arithmetic. Without glibc nothing is done.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(_M_ARENA_MAX, 1)  # torch runs in worker threads, whose own arenas cannot grow large enough
    mallopt(_M_MMAP_MAX, 0)  # a threshold could not be as large as a stage's vectors are
    mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
    mallopt(_M_TOP_PAD, _TOP_PAD)


def release_memory() -> None:
    """Return to the kernel what `prepare_memory` has kept: the work it was for is over."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:
        trim(0)
