"""The demonstration: a network of real peer processes on this machine, one of which may cheat.

Processes, sockets, chain, data and training are the product's own; only the cheat's stage is wrapped.
"""

from tdml_p2p.demo.run import DemoConfig, run_demo

__all__ = ["DemoConfig", "run_demo"]
