"""Networks of real peer processes on 127.0.0.1, a training client, and the check that nothing is left of them."""

import json
import os
import signal
import sqlite3
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import trio

from chain.params import Params
from tdml_p2p.config import TrainConfig
from tdml_p2p.demo.network import DemoNetwork, create_network
from tdml_p2p.demo.processes import Child, child, stop_all
from tdml_p2p.home import Home
from tdml_p2p.swarm.preparation import Prepared, prepare
from trainer.local import train_locally

PATIENCE = 90.0
QUICK = Params(block_interval_ms=600, heartbeat_ms=1200, reaudit_rate=3000, step_share=10_000)
LOCAL = ("--listen", "/ip4/127.0.0.1/tcp/0", "--json")
CONFIG = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 128,
    "num_attention_heads": 4,
}
SHAPE = {"batch": 2, "microbatches": 4, "sequence": 64, "learning_rate": 0.003}


Machine = tuple[tuple[str, ...], dict[str, str]]
"""Further flags of a peer, and variables of its environment."""


@dataclass
class Swarm:
    """Running peers by index; the first `network.workers` after the founder take seats.

    `cheats` run the demonstration's dishonest peer, with these flags; `modules` are run instead of `tdml-peer`.
    """

    folder: Path
    network: DemoNetwork
    peers: dict[int, Child] = field(default_factory=dict)
    invite: str = ""
    machines: Mapping[int, Machine] = field(default_factory=dict)
    cheats: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    modules: Mapping[int, str] = field(default_factory=dict)

    def home(self, index: int) -> Path:
        """Return the home of a peer."""
        return self.network.homes[index]

    def ask(self, index: int, query: str, **arguments: str) -> Any:
        """Return what a running peer answers."""
        from cli.sources import DaemonSource

        return DaemonSource(self.home(index)).ask(query, arguments)


def start(swarm: Swarm, index: int) -> AbstractAsyncContextManager[Child]:
    """Return one peer of the network, to be run; the first one's invite must be known for the others."""
    if index in swarm.cheats:
        arguments = ["--home", str(swarm.home(index)), "--join", swarm.invite, *swarm.cheats[index]]
        return child(f"peer-{index}", "tdml_p2p.demo.cheat", arguments, swarm.home(index) / "log.txt")
    flags, variables = swarm.machines.get(index, ((), {}))
    works = [] if swarm.network.is_worker(index) else ["--no-work"]
    joining = ["--join", swarm.invite] if swarm.invite else []
    arguments = ["start", "--home", str(swarm.home(index)), *LOCAL, *joining, *works, *flags]
    module = swarm.modules.get(index, "cli.peer")
    return child(f"peer-{index}", module, arguments, swarm.home(index) / "log.txt", variables)


@asynccontextmanager
async def peer(swarm: Swarm, index: int) -> AsyncIterator[Child]:
    """Run one peer of the network, from when it is ready, until the block ends."""
    async with start(swarm, index) as running:
        swarm.invite = str((await running.expect("ready", PATIENCE))["invite"])
        swarm.peers[index] = running
        async with trio.open_nursery() as nursery:
            nursery.start_soon(running.drain)
            yield running
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def network(
    folder: Path,
    peers: int,
    workers: int,
    machines: Mapping[int, Machine] | None = None,
    cheats: Mapping[int, tuple[str, ...]] | None = None,
    apart: Collection[int] = (),
    modules: Mapping[int, str] | None = None,
) -> AsyncIterator[Swarm]:
    """Run a network of validators of equal stake but those `apart`; afterwards nothing of it may be left."""
    swarm = Swarm(
        folder,
        create_network(folder, peers, workers, QUICK),
        machines=machines or {},
        cheats=cheats or {},
        modules=modules or {},
    )
    async with AsyncExitStack() as stack, peer(swarm, 0), trio.open_nursery() as nursery:
        others = [index for index in range(1, peers) if index not in apart]
        for index in others:
            swarm.peers[index] = await stack.enter_async_context(start(swarm, index))
        for index in others:
            await swarm.peers[index].expect("ready", PATIENCE)
            nursery.start_soon(swarm.peers[index].drain)
        yield swarm
        await stop_all(list(swarm.peers.values()))
        nursery.cancel_scope.cancel()
    killed = [index for index, running in swarm.peers.items() if running.process.returncode == -signal.SIGKILL]
    assert_nothing_left(swarm.network.homes, [swarm.home(index) for index in killed])


def assert_nothing_left(homes: Sequence[Path], killed: Sequence[Path] = ()) -> None:
    """Check that no process, socket or lock of these homes is left; a killed process leaves its socket's file."""
    for home in homes:
        assert home in killed or not Home(home).socket_path.exists()
        with Home(home).lock():
            pass
    assert not [line for line in commands() if any(str(home) in line for home in homes)]


def commands() -> list[str]:
    """Return the command lines of all processes that this user can see."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return [line for line in found if f"pid {os.getpid()}" not in line]


def training(folder: Path, steps: int, **changes: Any) -> TrainConfig:
    """Return the settings of a small run on a small text."""
    config, text = folder / "model.json", folder / "text.txt"
    if not config.exists():
        config.write_text(json.dumps(CONFIG))
        text.write_text("".join(f"Line {n}: the swarm trains what nobody owns, {n * n} times.\n" for n in range(4000)))
    return TrainConfig(model=str(config), data=(text,), out=folder / "out", steps=steps, **(SHAPE | changes))


@asynccontextmanager
async def client(swarm: Swarm, train: TrainConfig) -> AsyncIterator[Child]:
    """Run `tdml-peer train` with these settings."""
    shape = [part for name in SHAPE for part in (f"--{name.replace('_', '-')}", str(getattr(train, name)))]
    resuming = ["--resume"] if train.resume else []
    arguments = [
        "train", "--home", str(swarm.network.client_home), *LOCAL, "--join", swarm.invite,
        "--model", train.model, "--data", str(train.data[0]), "--out", str(train.out), "--steps", str(train.steps),
        "--precision", train.precision, "--stages", str(train.stages), "--replicas", str(train.replicas),
        "--redundancy", str(train.redundancy), "--save-every", str(train.save_every), *shape, *resuming,
    ]  # fmt: skip
    async with child("client", "cli.peer", arguments, swarm.folder / "client.txt") as running:
        yield running


async def finished(running: Child, events: list[dict[str, Any]]) -> int:
    """Collect what the client still prints, and return its exit code."""
    events.extend([event async for event in running.events()])
    return int(await running.process.wait())


async def step_of(running: Child, events: list[dict[str, Any]], step: int) -> None:
    """Collect events until `step` is done."""
    async for event in running.events():
        events.append(event)
        if event["event"] == "step" and event["step"] >= step:
            return
    raise AssertionError(f"the run ended before step {step}: {running.log.read_text()[-2000:]}")


async def printed(*arguments: str) -> Any:
    """Return what a command prints as JSON."""
    async with child("command", arguments[0], arguments[1:], Path("/dev/null")) as running:
        assert running.process.stdout is not None
        text = b"".join([part async for part in running.process.stdout])
        assert await running.process.wait() == 0, text
    return json.loads(text)


def losses(events: list[dict[str, Any]]) -> list[float]:
    """Return the newest loss of every step, in order."""
    return [loss for _, loss in sorted({e["step"]: e["loss"] for e in events if e["event"] == "step"}.items())]


def undisturbed(train: TrainConfig) -> list[float]:
    """Return the losses of the same run in this process."""
    # the folder of the run itself is taken
    prepared: Prepared = prepare(replace(train, out=train.out.with_name("undisturbed"), resume=False))
    found: list[float] = []
    train_locally(prepared.manifest, prepared.batches, train.steps, lambda step: found.append(step.loss))
    return found


def model_opens(folder: Path) -> None:
    """Check that a folder holds a model for everybody's tools."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert sum(parameter.numel() for parameter in model.parameters()) > 10_000


def events_on_chain(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return kind and data of every event in a chain's database."""
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        rows = connection.execute("SELECT kind, data FROM events ORDER BY height, place").fetchall()
    finally:
        connection.close()
    return [(kind, json.loads(data)) for kind, data in rows]
