"""Material by content address, as work and audits ask for it."""

from collections.abc import Awaitable, Callable, Sequence

Buffer = bytes | memoryview
Fetch = Callable[[bytes, Sequence[str]], Awaitable[Buffer]]
"""Returns the blob of an address, from this peer or from one of the given ones; raises `Unavailable`."""


class Unavailable(ConnectionError):
    """Material that no peer gave."""
