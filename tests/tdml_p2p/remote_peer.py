"""A peer in a process of its own, for tests that freeze or kill it: prints its address, takes frames, reads none."""

import sys

import trio

from tdml_p2p.host import Network, NetworkConfig
from tests.tdml_p2p.network_kit import CHAIN, key

SESSION = bytes(range(32))


async def main() -> None:
    """Serve until killed."""
    async with Network.open(NetworkConfig(), key(int(sys.argv[1])), CHAIN) as network:
        unread = network.tensors.open_session(SESSION)
        print(network.addresses[0], flush=True)
        await trio.sleep_forever()
        del unread


if __name__ == "__main__":
    trio.run(main)
