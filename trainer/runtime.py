"""Settings of a process that trains: torch threads, and an allocator that keeps its memory."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8
_KEPT_BYTES = 1 << 30
_LARGEST_KEPT = 1 << 25  # glibc takes no higher threshold
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
    mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT)
    mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
    mallopt(_M_TOP_PAD, _TOP_PAD)
