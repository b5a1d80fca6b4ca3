"""A network of validators for a benchmark, each a process on 127.0.0.1, and what it shows from outside."""

import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

from bench.support.load import load_key
from chain.genesis import Allocation, Genesis, GenesisValidator
from chain.params import Params
from chain.randomness import onion_of
from cli.sources import DaemonSource
from tdml_p2p.demo.processes import Child, child, stop_all
from tdml_p2p.errors import UserError
from tdml_p2p.home import Home

LOCAL = ("--listen", "/ip4/127.0.0.1/tcp/0", "--json", "--no-work", "--log-level", "warning")
READY_SECONDS = 180
_TICKS = os.sysconf("SC_CLK_TCK")
_FUNDS = 1_000_000


@contextmanager
def scratch() -> Iterator[Path]:
    """Make a folder that goes when the block ends."""
    folder = Path(tempfile.mkdtemp(prefix="tdml-bench-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def make_homes(folder: Path, validators: int, purses: int) -> tuple[list[Home], Genesis]:
    """Return validators' homes below `folder` and their genesis, which also funds the load's accounts."""
    homes = [Home(folder / f"peer-{index}") for index in range(validators)]
    for home in homes:
        home.create()
    keys = [home.load_key() for home in homes]
    genesis = Genesis(
        name=b"bench",
        timestamp=time.time_ns() // 1_000_000,
        params=Params(),
        accounts=tuple(
            Allocation(key.account, _FUNDS) for key in (*keys, *(load_key(index) for index in range(purses)))
        ),
        validators=tuple(GenesisValidator(key.account, _FUNDS, onion_of(key).tip) for key in keys),
    )
    for home in homes:
        home.save_genesis(genesis)
    return homes, genesis


@dataclass
class Seen:
    """One final block as a watcher at a peer saw it; times are Unix seconds."""

    height: int
    timestamp: float
    arrived: float
    transactions: int


@dataclass
class Watcher:
    """Notes every block that becomes final at a peer, in a thread that ends with the peer."""

    home: Path
    blocks: list[Seen] = field(default_factory=list)

    def start(self) -> None:
        """Begin to watch."""
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        try:
            for line in DaemonSource(self.home).watch({"topics": "block"}):
                found = Seen(line["height"], line["time"] / 1000, time.time(), line["data"]["transactions"])
                self.blocks.append(found)
        except UserError:
            return

    def between(self, begun: float, ended: float) -> list[Seen]:
        """Return the blocks that became final within a time."""
        return [seen for seen in self.blocks if begun <= seen.arrived < ended]


@dataclass
class Running:
    """The processes of a network; the watcher is at the first one."""

    homes: list[Home]
    peers: list[Child]
    invite: str
    watcher: Watcher
    stack: AsyncExitStack

    @property
    def source(self) -> DaemonSource:
        """The first peer's control interface."""
        return DaemonSource(self.homes[0].path)

    def height(self) -> int:
        """Return the first peer's final height."""
        return int(self.source.ask("status", {})["height"])

    async def add(self, home: Home, *flags: str) -> Child:
        """Start one more peer that joins by invite; it may not be ready yet."""
        arguments = ["start", "--home", str(home.path), *LOCAL, "--join", self.invite, *flags]
        one = await self.stack.enter_async_context(child(home.path.name, "cli.peer", arguments, home.path / "log.txt"))
        self.peers.append(one)
        return one


@asynccontextmanager
async def running(homes: Sequence[Home], height: int = 3) -> AsyncIterator[Running]:
    """Run a peer in every home until the block ends; the first has reached `height` when it begins."""
    async with AsyncExitStack() as stack:
        first = ["start", "--home", str(homes[0].path), *LOCAL]
        one = await stack.enter_async_context(child(homes[0].path.name, "cli.peer", first, homes[0].path / "log.txt"))
        invite = str((await one.expect("ready", READY_SECONDS))["invite"])
        network = Running(list(homes), [one], invite, Watcher(homes[0].path), stack)
        try:
            for home in homes[1:]:
                await network.add(home)
            for peer in network.peers[1:]:
                await peer.expect("ready", READY_SECONDS)
            network.watcher.start()
            with trio.fail_after(READY_SECONDS):
                while network.height() < height:
                    await trio.sleep(0.5)
            yield network
        finally:
            with trio.CancelScope(shield=True):
                await stop_all(network.peers)


def cpu_seconds(peers: Sequence[Child]) -> list[float]:
    """Return the CPU time that each process has taken."""
    found = []
    for one in peers:
        fields = Path(f"/proc/{one.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        found.append((int(fields[11]) + int(fields[12])) / _TICKS)
    return found


def resident_megabytes(one: Child) -> float:
    """Return the resident memory of a process."""
    lines = Path(f"/proc/{one.process.pid}/status").read_text().splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024, 1)


def maps_torch(one: Child) -> bool:
    """Whether a process has a library of torch in its memory."""
    return "libtorch" in Path(f"/proc/{one.process.pid}/maps").read_text()


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Return the median and the 99th percentile."""
    ordered = sorted(values) or [float("nan")]
    return {
        "p50": round(statistics.median(ordered), 3),
        "p99": round(ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))], 3),
        "count": len(values),
    }
