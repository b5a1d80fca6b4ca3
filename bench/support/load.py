"""Load for a network of peers: signed transfers of many accounts, gossiped by a peer without a seat in the set.

Run as `python -m bench.support.load`; prints a JSON line when it is ready and one after each rate.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

import trio

from chain.engine_transactions import pack
from chain.genesis import Genesis
from chain.keys import PrivateKey
from chain.transactions import Transaction, Transfer, Unsigned, sign
from tdml_p2p.gossip import Disposition
from tdml_p2p.home import read_genesis
from tdml_p2p.host import Network, NetworkConfig
from tdml_p2p.invite import Invite
from tdml_p2p.logs import configure_logs

SLICE_SECONDS = 0.1
"""Between two messages of the load."""
WINDOW = 100_000
"""Heights for which the transfers are valid."""
JUNK = bytes(64)


def load_key(index: int) -> PrivateKey:
    """Return the key of one account of the load."""
    return PrivateKey(hashlib.blake2b(index.to_bytes(8, "big"), digest_size=32, person=b"tdml load").digest())


class Purses:
    """Accounts that take turns, each with its next nonce."""

    def __init__(self, genesis: Genesis, count: int) -> None:
        self._keys = [load_key(index) for index in range(count)]
        self._chain_id = genesis.chain_id
        self._made = 0

    def transfers(self, count: int, *, is_junk: bool = False) -> list[Transaction]:
        """Return the next signed transfers of one unit; junk ones bear no signature."""
        return list(self._transfers(count, is_junk))

    def _transfers(self, count: int, is_junk: bool) -> Iterator[Transaction]:
        for index in range(self._made, self._made + count):
            key = self._keys[index % len(self._keys)]
            to = self._keys[(index + 1) % len(self._keys)].account
            nonce = index // len(self._keys)
            body = Unsigned(1, self._chain_id, key.account, nonce, 0, WINDOW, 0, b"", Transfer(to, 1))
            yield Transaction(body, JUNK) if is_junk else sign(key, body)
        if not is_junk:
            self._made += count


def say(event: str, **fields: object) -> None:
    """Print one JSON line."""
    print(json.dumps({"event": event, **fields}), flush=True)


async def offer(network: Network, transfers: list[Transaction], rate: float) -> dict[str, float]:
    """Publish `transfers` at `rate` a second; return when and how fast that was."""
    begun, sent = time.time(), 0
    due = trio.current_time()
    while sent < len(transfers):
        count = max(1, round(rate * SLICE_SECONDS))
        for message in pack(transfers[sent : sent + count]):
            await network.publish("tx", message)
        sent += count
        due += SLICE_SECONDS
        await trio.sleep_until(max(due, trio.current_time()))
    ended = time.time()
    return {"begun": begun, "ended": ended, "sent": len(transfers), "offered": len(transfers) / (ended - begun)}


async def run(options: argparse.Namespace) -> None:
    """Join the network and go through the rates."""
    genesis = read_genesis(options.genesis.read_bytes(), str(options.genesis))
    purses = Purses(genesis, options.accounts)
    invite = Invite.parse(options.invite)
    stretches = [
        (rate, purses.transfers(int(rate * options.seconds), is_junk=options.junk))
        for rate in map(float, options.rates.split(","))
    ]
    async with Network.open(NetworkConfig(bootstrap=(invite.address,)), load_key(2**32), genesis.chain_id) as network:
        for topic in ("tx", "block", "vote"):
            network.on_topic(topic, lambda _sender, _data: Disposition.IGNORE)
        while not network.gossip.mesh("tx"):
            await trio.sleep(0.1)
        await trio.sleep(2.0)
        say("ready")
        for rate, transfers in stretches:
            say("rate", rate=rate, **await offer(network, transfers, rate))
            await trio.sleep(options.pause)
        say("end")


def main() -> None:
    """Run the load."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--invite", required=True)
    parser.add_argument("--genesis", type=Path, required=True)
    parser.add_argument("--accounts", type=int, default=1000)
    parser.add_argument("--rates", default="100")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--pause", type=float, default=5.0)
    parser.add_argument("--junk", action="store_true", help="transfers with false signatures")
    configure_logs("error")
    trio.run(run, parser.parse_args())


if __name__ == "__main__":
    main()
