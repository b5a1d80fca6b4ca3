"""A whole run with a quarter of its workers cheating, in mixed ways: what is left of the model, and what it costs.

Real peer processes train a small model: `bare` with hardly any audits, `clean` with the usual ones, and `siege` with
the usual ones while a quarter of the workers cheat, every other one from the first step, the rest after half of the
run. All end with the loss on text that was never trained on. Several seeds of `clean` give the spread that the model
has anyway. Costs are processor seconds of all processes, chain, client, audits and the steps that are done again
included, against `bare`. Of each cheat: the cells that it has claimed from its first cheated step to its eviction,
those in flight included, and the seconds from the beginning of that step to the news of the eviction.

Prints a row a run and a cheat as they end, and the summary so far after each seed, on stderr; then one JSON object.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, closing
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import trio

from bench.support.swarm_run import Training, cpu_seconds
from chain.store import Store
from tdml_p2p.demo.faults import ATTACKS
from tdml_p2p.demo.network import DemoNetwork, create_network
from tdml_p2p.demo.processes import Child, child, stop_all
from trainer.data import standard_library

Run = dict[str, Any]
LOCAL = ("--listen", "/ip4/127.0.0.1/tcp/0")
BARE, CLEAN, SIEGE = "bare", "clean", "siege"


@dataclass(frozen=True)
class Case:
    """A run: its shape, its seed, and how many workers cheat."""

    training: Training
    seed: int
    cheats: int

    @property
    def workers(self) -> int:
        """Seats of the task."""
        return self.training.stages * self.training.replicas

    def attack(self, index: int) -> tuple[str, int] | None:
        """Return what the peer of that index does, and from which step on; None for an honest one."""
        # one cheat a quarter of the workers: never a whole stage, of which nobody honest would be left
        places = range(2, self.workers + 1, self.workers // self.cheats) if self.cheats else range(0)
        if index not in places[: self.cheats]:
            return None
        number = places.index(index)
        kind = next(islice(cycle(sorted(ATTACKS)), self.seed + number, None))
        return kind, 1 if number % 2 == 0 else self.training.steps // 2


def run(case: Case) -> Run:
    """Return the figures of one run in a fresh network."""
    folder = Path(tempfile.mkdtemp(prefix="tdml-siege-"))
    started = time.monotonic()
    try:
        found = trio.run(_train, folder, case)
    finally:
        shutil.rmtree(folder)
    return found | {"seed": case.seed, "seconds": round(time.monotonic() - started)}


async def _train(folder: Path, case: Case) -> Run:
    network = create_network(folder, case.workers + 1, case.workers, case.training.params)
    async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
        peers: list[Child] = []
        invite = ""
        for index in range(len(network.homes)):
            peers.append(await stack.enter_async_context(_peer(network, case, index, invite)))
            invite = invite or str((await peers[-1].expect("ready", 120))["invite"])
            nursery.start_soon(peers[-1].drain)
        arguments = _arguments(network, folder / "out", invite, case)
        client = await stack.enter_async_context(child("client", "cli.peer", arguments, folder / "client.txt"))
        found = await _watch(client, network, peers, case)
        if await client.process.wait() != 0:
            raise RuntimeError(client.log.read_text()[-800:])
        await stop_all(peers)
        nursery.cancel_scope.cancel()
    return found


def _peer(network: DemoNetwork, case: Case, index: int, invite: str) -> Any:
    home = network.homes[index]
    common, log = ["--home", str(home), *LOCAL], home / "log.txt"
    attack = case.attack(index)
    if attack is not None:
        kind, start = attack
        faulty = ["--join", invite, "--attack", kind, "--from-step", str(start)]
        return child(home.name, "tdml_p2p.demo.cheat", [*common, *faulty], log)
    more = (["--join", invite] if invite else []) + ([] if network.is_worker(index) else ["--no-work"])
    return child(home.name, "cli.peer", ["start", *common, "--threads", "1", "--json", *more], log)


def _arguments(network: DemoNetwork, out: Path, invite: str, case: Case) -> list[str]:
    training = case.training
    return [
        "train", "--home", str(network.client_home), *LOCAL, "--json", "--join", invite, "--model", training.model,
        "--data", str(standard_library()), "--out", str(out), "--stages", str(training.stages),
        "--replicas", str(training.replicas), "--steps", str(training.steps), "--batch", str(training.batch),
        "--microbatches", str(training.microbatches), "--sequence", str(training.sequence), "--save-every", "0",
        "--audit-rate", str(training.audit_rate or 0.0001), "--seed", str(case.seed), "--validation", "0.002",
        "--eval-every", str(training.steps), "--learning-rate", "0.001",
    ]  # fmt: skip


async def _watch(client: Child, network: DemoNetwork, peers: list[Child], case: Case) -> Run:
    """Return what the client says until it is done, and the processor time until its last step."""
    begun = seen = 0.0
    losses: dict[int, float] = {}
    ends = {0: time.monotonic()}
    evicted, done, validation = [], 0, None
    gone: dict[str, float] = {}
    names = network.names_by_peer
    async for event in client.events():
        if event["event"] == "formed":
            ends[0] = time.monotonic()
        elif event["event"] == "step":
            if not losses:
                begun = cpu_seconds([*peers, client])
            done, losses[event["step"]] = done + 1, event["loss"]
            ends.setdefault(event["step"], time.monotonic())
            seen = cpu_seconds([*peers, client])
        elif event["event"] == "validation":
            validation = event["loss"]
        elif event["event"] == "evicted":
            evicted.append((names[event["peer"]], event.get("step")))
            gone[names[event["peer"]]] = time.monotonic()
    cheats = {network.names[index] for index in range(len(peers)) if case.attack(index)}
    return {
        "attacks": {network.names[index]: case.attack(index) for index in range(len(peers)) if case.attack(index)},
        "evicted": evicted,
        "caught": _caught(network, case, ends, gone),
        "missed": sorted(cheats - {name for name, _ in evicted}),
        "honest_evicted": sorted({name for name, _ in evicted} - cheats),
        "validation_loss": validation,
        "last_loss": losses[max(losses)],
        "steps": len(losses),
        "steps_done_again": done - len(losses),
        "cpu": round(seen - begun, 1),
    }


def _caught(network: DemoNetwork, case: Case, ends: dict[int, float], gone: dict[str, float]) -> list[Run]:
    """Return of each evicted cheat the cells and the seconds from its first cheated cell on.

    `ends` are the moments in which steps ended for the first time, `gone` those of the evictions.
    """
    found = []
    for index, name in enumerate(network.names):
        attack = case.attack(index)
        if attack is not None and name in gone:
            kind, start = attack
            cells = _cheated_cells(network.client_home / "chain.db", network.peers[index], start)
            seconds = round(gone[name] - ends[start - 1], 1)
            found.append({"cheat": name, "attack": kind, "from_step": start, "cells": cells, "seconds": seconds})
    return found


def _cheated_cells(database: Path, peer: str, start: int) -> int:
    """Return how many cells a peer has claimed in steps from `start` on: after its eviction it can claim none."""
    with closing(Store.open_read_only(database)) as store:
        claims = [event.data for _, event in store.events(1, store.tip()[0].height, ["claimed"], 1 << 30)]
    return sum(len(one["cells"]) for one in claims if one["worker"] == peer and one["step"] >= start)


def cases(shape: Training, seeds: int) -> Iterator[tuple[str, Case]]:
    """Yield the runs in alternation."""
    quarter = shape.stages * shape.replicas // 4
    bare = Training(**{**vars(shape), "audit_rate": 0.0})
    for seed in range(1, seeds + 1):
        yield CLEAN, Case(shape, seed, 0)
        yield SIEGE, Case(shape, seed, quarter)
        yield BARE, Case(bare, seed, 0)


def summary(runs: dict[str, list[Run]]) -> Run:
    """Return losses, their spread, and the cost over that of bare runs."""
    ends = {name: [one["validation_loss"] for one in found] for name, found in runs.items()}
    caught = [cheat for one in runs[SIEGE] for cheat in one["caught"]]
    cost = {name: sum(one["cpu"] for one in found) for name, found in runs.items()}
    return {
        "validation_loss": ends,
        "worst_gap_of_a_seed": max(abs(a - b) for a, b in zip(ends[CLEAN], ends[SIEGE], strict=True)),
        "spread_of_clean_seeds": max(ends[CLEAN]) - min(ends[CLEAN]),
        "overhead": {name: round(cost[name] / cost[BARE] - 1, 3) for name in (CLEAN, SIEGE)},
        "until_evicted": {unit: _spread([cheat[unit] for cheat in caught]) for unit in ("cells", "seconds")},
        "missed": sum(len(one["missed"]) for one in runs[SIEGE]),
        "honest_evicted": sum(len(one["honest_evicted"]) for found in runs.values() for one in found),
    }


def _spread(values: list[float]) -> dict[str, float]:
    """Return mean and maximum; nothing of nothing."""
    return {"mean": round(sum(values) / len(values), 1), "max": max(values)} if values else {}


def show(name: str, one: Run) -> None:
    """Print a row of a run, and one of each of its cheats."""
    print(
        f"{name:6} seed {one['seed']} loss {one['validation_loss']:.4f} cpu {one['cpu']:8.1f} s in {one['seconds']} s,"
        f" {one['steps_done_again']} steps again, missed {one['missed']}, honest evicted {one['honest_evicted']}",
        file=sys.stderr,
        flush=True,
    )
    for cheat in one["caught"]:
        print(
            f"       {cheat['cheat']} {cheat['attack']:10} from step {cheat['from_step']:3}:"
            f" out after {cheat['cells']:4} cells, {cheat['seconds']:6.1f} s",
            file=sys.stderr,
            flush=True,
        )


def main() -> None:
    """Measure, and print the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON, as is always done")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--model", default="llama-tiny")
    options = parser.parse_args()
    shape = Training(
        options.model, replicas=options.replicas, batch=4, microbatches=8, sequence=64, steps=options.steps,
        warm_up=0, audit_rate=0.1,
    )  # fmt: skip
    runs: dict[str, list[Run]] = {CLEAN: [], SIEGE: [], BARE: []}
    for name, case in cases(shape, options.seeds):
        runs[name].append(run(case))
        show(name, runs[name][-1])
        if name == BARE:  # a seed's last run
            print(json.dumps({"so_far": summary(runs)}), file=sys.stderr, flush=True)
    print(json.dumps({"summary": summary(runs), "runs": runs}))


if __name__ == "__main__":
    main()
