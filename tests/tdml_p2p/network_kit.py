"""Networks of real hosts on 127.0.0.1 for tests."""

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import trio

from chain.keys import PrivateKey
from tdml_p2p.host import Network, NetworkConfig

CHAIN_ID = bytes(range(32))


def key_of(index: int) -> PrivateKey:
    """Return the key of the test peer `index`."""
    return PrivateKey(bytes([index + 1]) * 32)


@asynccontextmanager
async def open_networks(
    count: int, config: Callable[[int], NetworkConfig] | None = None
) -> AsyncIterator[list[Network]]:
    """Open `count` peers, each started from the first one, and wait until all are connected to all."""
    async with AsyncExitStack() as stack:
        networks: list[Network] = []
        for index in range(count):
            bootstrap = (networks[0].addresses[0],) if networks else ()
            settings = config(index) if config else NetworkConfig()
            settings = NetworkConfig(**{**settings.__dict__, "bootstrap": bootstrap})
            networks.append(await stack.enter_async_context(Network.open(settings, key_of(index), CHAIN_ID)))
        await until(lambda: all(len(network.peers()) == count - 1 for network in networks))
        yield networks


async def until(is_true: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait for a condition that other tasks bring about."""
    with trio.fail_after(seconds):
        while not is_true():  # noqa: ASYNC110
            await trio.sleep(0.005)
