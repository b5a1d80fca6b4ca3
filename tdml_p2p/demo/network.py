"""Homes, keys and genesis of a demonstration network: every peer a validator of equal stake."""

import time
from dataclasses import dataclass
from pathlib import Path

from chain.genesis import Allocation, Genesis, GenesisValidator
from chain.keys import PrivateKey, peer_id
from chain.params import Params
from chain.randomness import onion_of
from tdml_p2p.home import Home

STAKE = 1_000_000
FUNDS = 1_000_000_000


@dataclass(frozen=True)
class DemoNetwork:
    """Peers by index; the first `workers` take seats, the others only audit; peer `cheat` may cheat."""

    homes: tuple[Path, ...]
    client_home: Path
    peers: tuple[str, ...]
    workers: int
    cheat: int

    @property
    def names(self) -> tuple[str, ...]:
        """Short names by index."""
        return tuple(home.name for home in self.homes)

    @property
    def names_by_peer(self) -> dict[str, str]:
        """Short names by peer id."""
        return dict(zip(self.peers, self.names, strict=True))

    def is_worker(self, index: int) -> bool:
        """Whether the peer takes seats."""
        return 0 < index <= self.workers

    def is_cheat(self, index: int, attack: str) -> bool:
        """Whether the peer runs `attack`."""
        return index == self.cheat and attack != "none"

    def role(self, index: int, attack: str) -> str:
        """What the peer does, in a word or two."""
        if self.is_cheat(index, attack):
            return f"worker ({attack})"
        return "worker" if self.is_worker(index) else "auditor"


def create_network(folder: Path, peers: int, workers: int, params: Params | None = None) -> DemoNetwork:
    """Return a fresh network of `peers` homes and a client's below `folder`, by default with the usual parameters."""
    homes = [Home(folder / f"peer-{index}") for index in range(peers)]
    client = Home(folder / "client")
    keys = [_key(home) for home in (*homes, client)]
    genesis = Genesis(
        name=b"demo",
        timestamp=int(time.time() * 1000),
        params=params or Params(),
        accounts=tuple(Allocation(key.account, FUNDS) for key in keys),
        validators=tuple(GenesisValidator(key.account, STAKE, onion_of(key).tip) for key in keys[:-1]),
    )
    for home in (*homes, client):
        home.save_genesis(genesis)
    return DemoNetwork(
        homes=tuple(home.path for home in homes),
        client_home=client.path,
        peers=tuple(peer_id(key.account) for key in keys[:-1]),
        workers=workers,
        cheat=2,
    )


def _key(home: Home) -> PrivateKey:
    home.create()
    return home.load_key()
