"""Run a module in a network namespace: `python -m bench.support.inside NAMESPACE MODULE ARGUMENTS…`; needs root."""

import ctypes
import os
import runpy
import sys

_NEWNET = 0x40000000


def main() -> None:
    """Enter the namespace, and become the module."""
    namespace, module = sys.argv[1:3]
    handle = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).setns(handle, _NEWNET):
        raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
    os.close(handle)
    sys.argv = [module, *sys.argv[3:]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
