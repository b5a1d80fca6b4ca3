"""Runs a testnet: starts its processes, does to them what the manifest says, sends transfers, asks the judge."""

import shutil
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from chain.genesis import Allocation, Genesis, GenesisValidator
from chain.keys import PrivateKey, peer_id
from chain.params import Params
from chain.randomness import onion_of
from cli.sources import DaemonSource
from tdml_p2p.demo.processes import Child, child
from tdml_p2p.errors import UserError
from tdml_p2p.home import Home
from tests.testnet.judge import Case, judge
from tests.testnet.manifest import EPOCH_BLOCKS, Fault, Manifest, PeerPlan

QUICK = Params(block_interval_ms=500, heartbeat_ms=1000, epoch_blocks=EPOCH_BLOCKS, unbonding_blocks=10_000)
FUNDS = 10**9
READY_SECONDS = 60.0
POLL_SECONDS = 0.4
PROVABLE = ("equivocate", "two-faced")


@dataclass
class Testnet:
    """The state of one run."""

    manifest: Manifest
    homes: list[Home]
    accounts: list[str]
    invites: dict[int, str] = field(default_factory=dict)
    """Every peer's newest; its port changes with each start."""
    heights: dict[int, int] = field(default_factory=dict)
    busy: set[int] = field(default_factory=set)
    """Peers whose plan has something left to do."""
    receipts: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    over: trio.Event = field(default_factory=trio.Event)

    @property
    def height(self) -> int:
        """The greatest height that an honest peer has reached."""
        return max((self.heights.get(index, 0) for index in self.manifest.honest), default=0)

    def case(self) -> Case:
        """Return what the judge is asked."""
        plans = self.manifest.peer
        names = [name_of(index) for index in range(len(plans))]
        return Case(
            databases={name: home.path / "chain.db" for name, home in zip(names, self.homes, strict=True)},
            accounts=dict(zip(names, self.accounts, strict=True)),
            liars=frozenset(name for name, plan in zip(names, plans, strict=True) if plan.attack),
            provable=frozenset(name for name, plan in zip(names, plans, strict=True) if plan.attack in PROVABLE),
            snapshots=frozenset(name for name, plan in zip(names, plans, strict=True) if plan.snapshot),
            blocks=self.manifest.blocks,
            receipts=tuple(self.receipts),
        )

    async def reached(self, height: int) -> None:
        """Wait until the chain has a height, or the run is over."""
        while self.height < height and not self.over.is_set():
            await trio.sleep(POLL_SECONDS)


def name_of(index: int) -> str:
    """Return a peer's name."""
    return f"peer-{index}"


def begin(manifest: Manifest, folder: Path) -> Testnet:
    """Return a fresh network of homes with one genesis."""
    homes = [Home(folder / name_of(index)) for index in range(len(manifest.peer))]
    keys: list[PrivateKey] = []
    for home in homes:
        home.create()
        keys.append(home.load_key())
    genesis = Genesis(
        b"testnet",
        int(time.time() * 1000),
        QUICK,
        tuple(Allocation(key.account, FUNDS) for key in keys),
        tuple(
            GenesisValidator(key.account, plan.stake, onion_of(key).tip)
            for key, plan in zip(keys, manifest.peer, strict=True)
            if plan.stake
        ),
    )
    for home in homes:
        home.save_genesis(genesis)
    return Testnet(manifest, homes, [peer_id(key.account) for key in keys])


@asynccontextmanager
async def process(net: Testnet, index: int, plan: PeerPlan) -> AsyncIterator[Child]:
    """Run one peer's process from when it is ready until the block ends."""
    home = net.homes[index].path
    cut = max((fault.seconds for fault in plan.faults), default=1.0)
    words = [plan.attack or "none", str(cut), "start", "--home", str(home), "--no-work", "--json"]
    words += ["--listen", "/ip4/127.0.0.1/tcp/0", "--status-port", "-1"]
    words += [word for known, invite in net.invites.items() if known != index for word in ("--join", invite)]
    words += ["--snapshot"] if plan.snapshot else []
    async with child(name_of(index), "tests.testnet.process", words, home / "log.txt") as running:
        ready = await running.expect("ready", READY_SECONDS)
        net.invites[index] = str(ready["invite"])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(running.drain)
            yield running
            nursery.cancel_scope.cancel()


async def live(net: Testnet, index: int) -> None:
    """Do a peer's plan: start it, hurt it at its heights, and stop it politely when the run is over."""
    plan = net.manifest.peer[index]
    await net.reached(plan.start)
    waiting = sorted(plan.faults, key=lambda fault: fault.at)
    while True:
        async with process(net, index, plan) as running:
            fault = await _suffer(net, running, waiting)
            if fault is None:
                net.busy.discard(index)
                await net.over.wait()
        code = running.process.returncode
        if fault is None or fault.kind == "restart":
            net.faults += [f"{name_of(index)} ended with {code} on SIGTERM"] if code != 0 else []
        if fault is None:
            return
        await trio.sleep(fault.seconds)


async def _suffer(net: Testnet, running: Child, waiting: list[Fault]) -> Fault | None:
    """Pause and cut off a running peer; return the fault that ends its process, None when none is left."""
    while waiting:
        fault = waiting.pop(0)
        await net.reached(fault.at)
        if fault.kind == "pause":
            running.process.send_signal(signal.SIGSTOP)
            await trio.sleep(fault.seconds)
            running.process.send_signal(signal.SIGCONT)
        elif fault.kind == "disconnect":
            running.process.send_signal(signal.SIGUSR1)
            await trio.sleep(fault.seconds)
        else:
            if fault.kind == "kill":
                running.process.kill()
                await running.process.wait()
            return fault
    return None


async def watch(net: Testnet) -> None:
    """Keep the heights of the peers that answer; end the run when all is done."""
    while True:
        for index in range(len(net.homes)):
            try:
                status = await trio.to_thread.run_sync(DaemonSource(net.homes[index].path).ask, "status", {})
                net.heights[index] = int(status["height"])
            except UserError:
                continue
        done = all(net.heights.get(index, 0) >= net.manifest.blocks for index in net.manifest.honest)
        if done and not net.busy & set(net.manifest.honest):
            net.over.set()
            return
        await trio.sleep(POLL_SECONDS)


async def load(net: Testnet) -> None:
    """Send transfers through honest peers in turn and keep the ids of those that were acknowledged."""
    turn = 0
    async with trio.open_nursery() as nursery:
        while not net.over.is_set() and net.manifest.transfers > 0:
            sender = net.manifest.honest[turn % len(net.manifest.honest)]
            nursery.start_soon(_transfer, net, sender, net.accounts[(sender + 1) % len(net.accounts)])
            turn += 1
            await trio.sleep(1 / net.manifest.transfers)
        nursery.cancel_scope.cancel()


async def _transfer(net: Testnet, sender: int, to: str) -> None:
    source = DaemonSource(net.homes[sender].path)
    body = {"kind": "transfer", "to": to, "amount": "1"}
    try:
        sent = await trio.to_thread.run_sync(source.post, "/transactions", body, abandon_on_cancel=True)  # type: ignore[call-arg]
    except UserError:
        return  # it is down, or cut off: nothing was acknowledged
    net.receipts.append(str(sent["id"]))


async def run(manifest: Manifest, folder: Path) -> dict[str, Any]:
    """Run a testnet below `folder` and return the verdict: `ok`, `faults` and what happened."""
    begun = time.monotonic()
    net = begin(manifest, folder)
    net.busy = set(range(len(manifest.peer)))
    with trio.move_on_after(manifest.deadline) as patience:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch, net)
            nursery.start_soon(load, net)
            nursery.start_soon(live, net, 0)
            while not net.invites:
                await trio.sleep(0.05)
            for index in range(1, len(manifest.peer)):
                nursery.start_soon(live, net, index)
    if patience.cancelled_caught:
        net.faults.append(f"not done after {manifest.deadline:.0f} s: heights {dict(sorted(net.heights.items()))}")
    net.faults += await trio.to_thread.run_sync(judge, net.case())
    return {
        "ok": not net.faults,
        "faults": net.faults,
        "seed": manifest.seed,
        "heights": [net.heights.get(index, 0) for index in range(len(net.homes))],
        "accounts": net.case().accounts,
        "transfers": len(net.receipts),
        "seconds": round(time.monotonic() - begun, 1),
        "logs": [str(home.path / "log.txt") for home in net.homes] if net.faults else [],
    }


def cleaned(folder: Path) -> None:
    """Remove what a run has written."""
    shutil.rmtree(folder)
