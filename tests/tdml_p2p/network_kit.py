"""Networks of several peers in one process, on real sockets of this machine."""

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import trio

from chain.keys import PrivateKey
from tdml_p2p.host import Network, NetworkConfig

CHAIN = bytes(range(32))
QUICK = NetworkConfig(round_seconds=0.3)


def key(number: int) -> PrivateKey:
    """Return the key of peer `number`."""
    return PrivateKey(bytes([number + 1]) * 32)


@asynccontextmanager
async def networks(
    count: int, config: NetworkConfig = QUICK, chain: bytes = CHAIN, home: Path | None = None
) -> AsyncIterator[list[Network]]:
    """Run `count` peers, each connected to the first; what fails inside is raised as it is, in no group."""
    failure: Exception | None = None
    async with AsyncExitStack() as stack:
        peers: list[Network] = []
        for number in range(count):
            own = replace(config, home=home / str(number)) if home else config
            if own.home is not None:
                own.home.mkdir(parents=True)
            peer = await stack.enter_async_context(Network.open(own, key(number), chain))
            if peers:
                await peer.connect(peers[0].addresses[0])
            peers.append(peer)
        try:
            yield peers
        except Exception as error:  # noqa: BLE001
            failure = error
    if failure is not None:
        raise failure


async def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Wait until `condition` holds; raise `trio.TooSlowError`."""
    with trio.fail_after(seconds):
        while not condition():
            await trio.sleep(0.005)


@asynccontextmanager
async def meshed(count: int, config: NetworkConfig = QUICK) -> AsyncIterator[list[Network]]:
    """Run `count` peers and wait until each is connected to each."""
    async with networks(count, config) as peers:
        await until(lambda: all(len(peer.peers()) == count - 1 for peer in peers))
        yield peers
