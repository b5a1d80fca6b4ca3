"""A swarm of real peer processes that trains on this machine, watched from outside: what the training benches run."""

import os
import shutil
import signal
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import trio

from bench.support.halves import Job
from bench.support.links import Link, Switch
from bench.support.stalls import Counts, stalls_of
from bench.support.stalls import figures as stall_figures
from chain.params import Params
from tdml_p2p.demo.network import DemoNetwork, create_network
from tdml_p2p.demo.processes import Child, child, stop_all
from trainer.data import standard_library
from trainer.manifest import TaskManifest, complete
from trainer.presets import preset_of

Run = dict[str, Any]
_INSIDE = "bench.support.inside"
_BEAT_SECONDS = 0.2
_BASIS_POINTS = 10_000


@dataclass(frozen=True)
class Training:
    """A run: model, shape of the swarm and of a step, steps before and while measuring, audits, further flags.

    An audit rate of 0 stands for one cell in ten thousand, the lowest for which a task's bond is defined. Newcomers are
    audited as often as the chain's usual parameters say, or, where `is_steady`, like everybody. `duty` is the share of
    the time in which the last worker is let run, from when it serves.
    """

    model: str = "llama-8m"
    stages: int = 2
    replicas: int = 1
    batch: int = 8
    microbatches: int = 8
    sequence: int = 128
    warm_up: int = 2
    steps: int = 4
    audit_rate: float = 0.0
    is_steady: bool = False
    flags: tuple[str, ...] = ()
    duty: float = 1.0

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch * self.microbatches * self.sequence

    @property
    def params(self) -> Params:
        """The chain's parameters: the usual ones, or such that newcomers, or all, are audited less."""
        usual, rate = Params(), max(1, round(_BASIS_POINTS * self.audit_rate))
        if self.audit_rate and not self.is_steady:
            return usual
        return Params(newcomer_rate=rate, floor_rate=min(rate, usual.floor_rate))

    def job(self) -> Job:
        """Return the same work for a rival, cut as the swarm cuts it."""
        preset = preset_of(self.model)
        draft = TaskManifest(preset.family, preset.config, stages=self.stages, sequence=self.sequence)
        cuts = complete(draft).cuts
        config = dict(preset.config)
        return Job(config, cuts, self.batch, self.microbatches, self.sequence, self.warm_up, self.steps)


def run_swarm(training: Training, link: Link | None = None) -> Run:
    """Return the figures of a run in a fresh network below a folder of its own, peers joined by links like `link`."""
    folder = Path(tempfile.mkdtemp(prefix="tdml-bench-"))
    try:
        return trio.run(_swarm, folder, training, link)
    finally:
        shutil.rmtree(folder)


async def _swarm(folder: Path, training: Training, link: Link | None) -> Run:
    """Train on workers and a peer that only audits."""
    workers = training.stages * training.replicas
    network = create_network(folder, workers + 1, workers, training.params)
    async with AsyncExitStack() as stack:
        switch = None if link is None else Switch(workers + 2, link)
        if switch is not None:
            await stack.enter_async_context(switch.running())
        return await _watched(network, training, stack, switch)


async def _watched(network: DemoNetwork, training: Training, stack: AsyncExitStack, switch: Switch | None) -> Run:
    folder = network.client_home.parent

    async def start(index: int, name: str, log: Path, *arguments: str) -> Child:
        where = "127.0.0.1" if switch is None else switch.address(index)
        module, inside = ("cli.peer", []) if switch is None else (_INSIDE, [switch.namespace(index), "cli.peer"])
        listening = [*inside, *arguments, "--listen", f"/ip4/{where}/tcp/0", "--json"]
        return await stack.enter_async_context(child(name, module, listening, log))

    async with trio.open_nursery() as nursery:
        peers: list[Child] = []
        invite = ""
        for index, home in enumerate(network.homes):
            more = ["--join", invite] if invite else ["--no-work"]
            arguments = ["start", "--home", str(home), "--threads", "1", *more]
            peers.append(await start(index, home.name, home / "log.txt", *arguments))
            ready = await peers[-1].expect("ready", 120)
            invite = invite or str(ready["invite"])
            nursery.start_soon(peers[-1].drain)
        nursery.start_soon(throttle, peers[-1], training.duty)
        wanted = _arguments(network, folder / "out", invite, training)
        client = await start(len(peers), "client", folder / "client.txt", *wanted)
        everyone = [*peers, client]
        events: list[dict[str, Any]] = []
        stalls: list[Counts] = []
        async for event in client.events():
            if event["event"] == "step":
                seen = {"cpu": cpu_seconds(everyone), "memory": peak_memory(peers[1:]), "links": _carried(switch)}
                events.append(event | seen)
                if len(events) in (training.warm_up, training.warm_up + training.steps):
                    stalls.append(await stalls_of(network.homes[1:]))
        if await client.process.wait() != 0:
            raise RuntimeError(client.log.read_text()[-500:])
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            await stop_all(peers)
        chain = sum(path.stat().st_size for path in network.client_home.glob("chain.db*"))
    return _figures(events, training) | {"chain_bytes": chain, "stalls": stall_figures(stalls[0], stalls[-1])}


def _arguments(network: DemoNetwork, out: Path, invite: str, training: Training) -> list[str]:
    return [
        "train", "--home", str(network.client_home), "--join", invite, "--model", training.model,
        "--data", str(standard_library()), "--out", str(out),
        "--stages", str(training.stages), "--replicas", str(training.replicas),
        "--steps", str(training.warm_up + training.steps), "--batch", str(training.batch),
        "--microbatches", str(training.microbatches), "--sequence", str(training.sequence),
        "--audit-rate", str(training.audit_rate or 0.0001), "--save-every", "0", *training.flags,
    ]  # fmt: skip


async def throttle(one: Child, duty: float) -> None:
    """Stop a process and let it go on, so that it runs for this share of the time, until cancelled."""
    while duty < 1:
        one.process.send_signal(signal.SIGSTOP)
        try:
            await trio.sleep((1 - duty) * _BEAT_SECONDS)
        finally:
            one.process.send_signal(signal.SIGCONT)
        await trio.sleep(duty * _BEAT_SECONDS)


def cpu_seconds(children: Sequence[Child]) -> float:
    """Return the processor time that running processes have used."""
    ticks = 0
    for one in children:
        fields = Path(f"/proc/{one.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def peak_memory(children: Sequence[Child]) -> list[int]:
    """Return the most bytes that each running process has held in memory."""
    found = []
    for one in children:
        lines = Path(f"/proc/{one.process.pid}/status").read_text().splitlines()
        found += [1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    return found


def _figures(events: list[dict[str, Any]], training: Training) -> Run:
    """Return what the client's step events say; `early` is of the steps before those that count."""
    early, counted = events[1 : training.warm_up], events[training.warm_up :]
    return {
        "seconds": [event["seconds"] for event in counted],
        "early": [event["seconds"] for event in early],
        "cpu": [later["cpu"] - earlier["cpu"] for earlier, later in pairwise(events[training.warm_up - 1 :])],
        "waits": [event["waited"] for event in counted],
        "losses": [event["loss"] for event in events],
        "audits": events[-1]["audits"],
        "audited": _audited(events, training),
        "generations": events[-1]["generation"] + 1,
        "peak_memory": events[-1]["memory"],
        **_of_links([event["links"] for event in events[training.warm_up - 1 :]]),
    }


def _audited(events: list[dict[str, Any]], training: Training) -> float:
    """Return how many audits ended for a cell of the steps that count: more than the rate while newcomers' still do."""
    before = events[training.warm_up - 1]["audits"] if training.warm_up else 0
    cells = len(events[training.warm_up :]) * training.microbatches * training.stages
    return round((events[-1]["audits"] - before) / max(cells, 1), 3)


def _carried(switch: Switch | None) -> list[int]:
    """Return the bytes that each peer's link has carried, up and down apart."""
    if switch is None:
        return []
    peers = range(switch.count)
    return [*(switch.sent[peer] for peer in peers), *(switch.received[peer] for peer in peers)]


def _of_links(counts: list[list[int]]) -> Run:
    """Return the bytes of a usual step on the busiest direction of a link, and on all links together.

    Medians over steps: after the last one, and beside some, states travel.
    """
    steps = [[b - a for a, b in zip(before, after, strict=True)] for before, after in pairwise(counts)]
    usual = [statistics.median(of_step) for of_step in zip(*steps, strict=True)]
    if not usual:
        return {}
    return {"link_bytes": max(usual), "wire_bytes": sum(usual[: len(usual) // 2])}
