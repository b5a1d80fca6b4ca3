"""The course of the demonstration, from the genesis to the verdict on it."""

import math
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from tdml_p2p.demo.network import DemoNetwork, create_network
from tdml_p2p.demo.processes import Child, ChildFailed, child, stop_all
from tdml_p2p.errors import USAGE, UserError
from tdml_p2p.plain_errors import plain_errors
from trainer.data import standard_library

Report = Callable[[dict[str, Any]], None]

ATTACKS = ("sign-flip", "noise", "scale", "skip-layer", "stale")
STAGES = 2
REPLICAS = 2
CHEAT_FROM_STEP = 6
_START_SECONDS = 120.0
_LEAST_LOSS_DROP = 0.5
_SHOWN_ON_CHAIN = frozenset(
    ("seated", "drawn", "passed", "disputed", "opinion", "ballot", "convicted", "acquitted", "faulted",
     "undecided", "withheld", "absent", "evicted", "slashed", "settled", "equivocation", "jailed")
)  # fmt: skip


@dataclass(frozen=True)
class DemoConfig:
    """What to show: peers, steps, the attack (or `none`) and where the model goes."""

    peers: int = 6
    steps: int = 40
    cheat: str = "sign-flip"
    out: Path = Path("demo-out")


@dataclass
class Observed:
    """What the run has shown so far."""

    losses: list[float] = field(default_factory=list)
    evicted: set[str] = field(default_factory=set)
    slashed: set[str] = field(default_factory=set)
    is_done: bool = False
    audits: int = 0


async def run_demo(config: DemoConfig, report: Report) -> int:
    """Run the demonstration; return 0 only if the loss fell and exactly the cheat was evicted."""
    _check(config)
    _make_room(config.out)
    with plain_errors():
        return await _until_signal(config, report)


async def _until_signal(config: DemoConfig, report: Report) -> int:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            outcome: list[int] = []

            async def course() -> None:
                outcome.append(await _course(config, report))
                nursery.cancel_scope.cancel()

            nursery.start_soon(course)
            async for _ in signals:
                nursery.cancel_scope.cancel()
                break
    return outcome[0] if outcome else 1


async def _course(config: DemoConfig, report: Report) -> int:
    started = trio.current_time()
    folder = Path(tempfile.mkdtemp(prefix="tdml-demo-"))
    try:
        network = create_network(folder, config.peers, STAGES * REPLICAS)
        observed = Observed()
        async with _peers(config, network, report) as invite:
            ready = trio.current_time()
            report({"event": "network", "peers": config.peers, "seconds": ready - started})
            await _train(config, network, invite, observed, report)
        trained = trio.current_time()
        return _judge(config, network, observed, report, {"start": ready - started, "train": trained - ready})
    finally:
        _keep_logs(folder, config.out)
        shutil.rmtree(folder, ignore_errors=True)


@asynccontextmanager
async def _peers(config: DemoConfig, network: DemoNetwork, report: Report) -> AsyncIterator[str]:
    """Run all peer processes; give the invite of the first."""
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(_peer(network, 0, "", config))
        invite = await _ready(first, network, 0, config, report)
        others = [
            await stack.enter_async_context(_peer(network, index, invite, config)) for index in range(1, config.peers)
        ]
        for index, other in enumerate(others, 1):
            await _ready(other, network, index, config, report)
        async with trio.open_nursery() as nursery:
            for one in (first, *others):
                nursery.start_soon(one.drain)
            try:
                yield invite
            finally:
                nursery.cancel_scope.cancel()
                with trio.CancelScope(shield=True):
                    await stop_all((first, *others))


async def _ready(running: Child, network: DemoNetwork, index: int, config: DemoConfig, report: Report) -> str:
    """Wait until a peer serves, report it, and return its invite."""
    event = await running.expect("ready", _START_SECONDS)
    about = {"name": network.names[index], "role": network.role(index, config.cheat)}
    report({"event": "peer", **about, "peer": event["peer"], "height": event["height"]})
    return str(event["invite"])


def _peer(network: DemoNetwork, index: int, invite: str, config: DemoConfig) -> Any:
    home = network.homes[index]
    log = home / "log.txt"
    common = ["--home", str(home), "--listen", "/ip4/127.0.0.1/tcp/0"]
    if network.is_cheat(index, config.cheat):
        attack = ["--join", invite, "--attack", config.cheat, "--from-step", str(CHEAT_FROM_STEP)]
        return child(network.names[index], "tdml_p2p.demo.cheat", [*common, *attack], log)
    joining = ["--join", invite] if invite else []
    idle = [] if network.is_worker(index) else ["--no-work"]
    return child(network.names[index], "cli.peer", ["start", *common, *joining, *idle, "--threads", "1", "--json"], log)


async def _train(config: DemoConfig, network: DemoNetwork, invite: str, observed: Observed, report: Report) -> None:
    """Run `tdml-peer train` and `tdml-chain watch` and pass on what they print."""
    arguments = [
        "train", "--model", "llama-tiny", "--data", str(standard_library()), "--out", str(config.out),
        "--home", str(network.client_home), "--join", invite, "--steps", str(config.steps),
        "--stages", str(STAGES), "--replicas", str(REPLICAS), "--batch", "4", "--microbatches", "8",
        "--sequence", "128", "--learning-rate", "0.003", "--json",
    ]  # fmt: skip
    watching = ["watch", "--home", str(network.homes[0]), "-o", "json", "--from", "1"]
    async with (
        child("client", "cli.peer", arguments, network.client_home / "log.txt") as client,
        child("watch", "cli.chain", watching, network.client_home / "watch.txt") as watch,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(_follow_chain, watch, network, observed, report)
        async for event in client.events():
            _note(event, observed)
            report(event)
        if await client.process.wait() != 0:
            raise ChildFailed("client", "did not finish the training", client.log)
        nursery.cancel_scope.cancel()


async def _follow_chain(watch: Child, network: DemoNetwork, observed: Observed, report: Report) -> None:
    async for event in watch.events():
        kind = str(event.get("kind", ""))
        if kind not in _SHOWN_ON_CHAIN:
            continue
        if kind in ("passed", "disputed"):
            observed.audits += 1
        if kind == "evicted":
            observed.evicted.add(str(event["data"]["worker"]))
        if kind == "slashed":
            observed.slashed.add(str(event["data"]["worker"]))
        report({"event": "chain", **event, "names": network.names_by_peer})


def _note(event: dict[str, Any], observed: Observed) -> None:
    if event.get("event") == "step":
        observed.losses.append(math.nan if event["loss"] is None else float(event["loss"]))
    if event.get("event") == "done":
        observed.is_done = True


def _judge(
    config: DemoConfig, network: DemoNetwork, observed: Observed, report: Report, parts: dict[str, float]
) -> int:
    cheat = {network.peers[network.cheat]} if config.cheat != "none" else set()
    first = sum(observed.losses[:3]) / max(1, len(observed.losses[:3]))
    last = sum(observed.losses[-3:]) / max(1, len(observed.losses[-3:]))
    has_learned = observed.is_done and first - last > _LEAST_LOSS_DROP
    is_just = observed.evicted == cheat and observed.slashed == cheat
    report(
        {
            "event": "result",
            "ok": has_learned and is_just,
            "loss_first": first,
            "loss_last": last,
            "evicted": sorted(observed.evicted),
            "expected": sorted(cheat),
            "audits": observed.audits,
            "seconds": parts,
            "out": str(config.out),
        }
    )
    return 0 if has_learned and is_just else 1


def _keep_logs(folder: Path, out: Path) -> None:
    """Copy the processes' logs beside the model."""
    for log in sorted(folder.rglob("*.txt")):
        target = out / "logs" / f"{log.parent.name}-{log.name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(log, target)


def _make_room(out: Path) -> None:
    """Take away what a former demonstration left to resume from; raise `UserError` for another run's."""
    if (out / "state").exists() and not (out / "logs").is_dir():
        raise UserError(f"{out} holds the model of another run.", "choose another folder with --out", USAGE)
    shutil.rmtree(out / "state", ignore_errors=True)


def _check(config: DemoConfig) -> None:
    if config.cheat not in (*ATTACKS, "none"):
        raise UserError(f"There is no attack {config.cheat!r}.", f"choose one of: {', '.join(ATTACKS)}, none", USAGE)
    if config.peers < STAGES * REPLICAS + 2:
        raise UserError(
            f"{config.peers} peers are too few.",
            f"{STAGES} stages of {REPLICAS} replicas and two auditors need {STAGES * REPLICAS + 2}",
            USAGE,
        )
    if config.steps < CHEAT_FROM_STEP + 4:
        raise UserError(f"{config.steps} steps are too few.", f"give at least {CHEAT_FROM_STEP + 4}", USAGE)
