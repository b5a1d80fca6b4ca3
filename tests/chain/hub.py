"""An in-memory network of chain engines for tests: full mesh, with partitions, on any trio clock."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

import trio
from msgspec import structs

from chain.engine import Action, ChainEngine, Disposition, EngineConfig, RequestFailed
from chain.engine_threads import Threads
from chain.engine_transactions import Transactions
from chain.genesis import Allocation, Genesis, GenesisValidator
from chain.keys import PrivateKey, peer_id
from chain.params import Params
from chain.randomness import onion_of
from chain.state import State

START_MS = 1_700_000_000_000
DELAY = 0.01
Twist = Callable[[str, str, bytes], bytes | None]


def keys(count: int) -> list[PrivateKey]:
    """Return the same keys in every run."""
    return [PrivateKey(bytes([i + 1]) * 32) for i in range(count)]


def genesis_of(
    validators: list[PrivateKey], others: list[PrivateKey], stakes: Sequence[int] = (), **params: int
) -> Genesis:
    """Return a network with equal or these stakes and 1,000,000 for everybody."""
    powers = stakes or [10_000] * len(validators)
    return Genesis(
        b"test",
        START_MS,
        structs.replace(Params(), **params),
        tuple(Allocation(key.account, 1_000_000) for key in [*validators, *others]),
        tuple(GenesisValidator(k.account, power, onion_of(k).tip) for k, power in zip(validators, powers, strict=True)),
    )


def clock_ms() -> int:
    """Return the virtual time as a wall clock."""
    return START_MS + int(trio.current_time() * 1000) + 1


def _clock_ahead() -> int:
    return clock_ms() + 5


CONFIG = EngineConfig(offload=False, clock_ms=clock_ms)


@dataclass
class Hub:
    """Delivers gossip and requests between the engines that run, unless their groups differ."""

    engines: dict[str, ChainEngine] = field(default_factory=dict)
    group: dict[str, int] = field(default_factory=dict)
    twists: dict[str, Twist] = field(default_factory=dict)
    """What becomes of a peer's gossip on its way: (topic, receiver, data) to data or nothing."""
    loss: float = 0.0
    """Share of gossip that is lost, by `dice`."""
    dice: Random = field(default_factory=lambda: Random(1))
    config: EngineConfig = CONFIG
    penalized: list[tuple[str, str]] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)

    def reaches(self, first: str, second: str) -> bool:
        """Whether two peers are connected."""
        return self.group.get(first, 0) == self.group.get(second, 0)


@dataclass
class Link:
    """One engine's `ChainNetwork` on a hub."""

    hub: Hub
    peer: str

    async def publish(self, topic: str, data: bytes) -> None:
        """Deliver to every reachable engine after a delay."""
        await trio.sleep(DELAY)
        for peer, engine in list(self.hub.engines.items()):
            if peer != self.peer and self.hub.reaches(peer, self.peer):
                await self._deliver(engine, topic, peer, data)

    async def _deliver(self, engine: ChainEngine, topic: str, peer: str, data: bytes) -> None:
        twist = self.hub.twists.get(self.peer)
        changed = twist(topic, peer, data) if twist else data
        if changed is None or self.hub.dice.random() < self.hub.loss:
            return
        disposition = await engine.take(changed) if topic == "tx" else engine.deliver(topic, self.peer, changed)
        if disposition.action == Action.REJECT:
            self.hub.refused.append((topic, disposition.reason))

    def peers(self) -> tuple[str, ...]:
        """Return the reachable engines."""
        return tuple(p for p in self.hub.engines if p != self.peer and self.hub.reaches(p, self.peer))

    async def request(self, peer: str, data: bytes) -> bytes:
        """Ask an engine."""
        await trio.sleep(DELAY)
        if peer not in self.hub.engines or not self.hub.reaches(peer, self.peer):
            raise RequestFailed("not connected")
        return await self.hub.engines[peer].serve(self.peer, data)

    def penalize(self, peer: str, reason: str) -> None:
        """Remember it."""
        self.hub.penalized.append((peer, reason))


@asynccontextmanager
async def running(
    hub: Hub, home: Path, genesis: Genesis, key: PrivateKey, *, validate: bool = True, name: str = ""
) -> AsyncIterator[ChainEngine]:
    """Run one engine on the hub while the block lasts; leaving is as sudden as a crash.

    A `name` is for the second instance of a key: its clock is 5 ms ahead, so that it builds other blocks.
    """
    peer = name or peer_id(key.account)
    config = replace(hub.config, validate=validate, clock_ms=_clock_ahead if name else hub.config.clock_ms)
    engine = ChainEngine(_made(home), genesis, key, Link(hub, peer), config)
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.run)
        hub.engines[peer] = engine
        try:
            yield engine
        finally:
            hub.engines.pop(peer, None)
            nursery.cancel_scope.cancel()


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


async def until_height(engine: ChainEngine, height: int) -> None:
    """Wait until the engine has a final block of `height`."""
    async with engine.subscribe() as blocks:
        while engine.state.height < height:
            await blocks.receive()


async def take(transactions: Transactions, data: bytes, state: State) -> Disposition:
    """Give a gossiped batch to a mempool, its signatures checked at once."""
    return await transactions.take(data, lambda: state, Threads(offload=False))
