"""What the death of workers costs a swarm of real peers: kill -9 at a random moment of a random step.

`replica`: one of two replicas of a stage dies; the longest step afterwards against the usual one. `last`: the only
worker of a stage dies while a peer waits for a seat; seconds until the next step, steps that are done again, and
what the client spends on keeping verified states. `leave`: one of two replicas is told to stop with SIGTERM, which
nobody should notice. In all, every step must be in the loss curve once at the end, with the losses of an undisturbed
run. --seeds N repeats each with N seeds. Prints a table, or one JSON object with --json.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from signal import SIGKILL, SIGTERM, Signals
from typing import Any

import trio

from bench.support.swarm_run import Training
from chain.params import Params
from tdml_p2p.config import TrainConfig
from tdml_p2p.demo.network import DemoNetwork, create_network
from tdml_p2p.demo.processes import Child, child, stop_all
from tdml_p2p.swarm.preparation import prepare
from trainer.data import standard_library
from trainer.local import train_locally

Figures = dict[str, Any]
Event = dict[str, Any]
LOCAL = ("--listen", "/ip4/127.0.0.1/tcp/0", "--json")
CASES = ("replica", "last", "leave")
TARGET_SECONDS = 3.0
TARGET_NEXT_STEP = 15.0


@dataclass(frozen=True)
class Case:
    """A swarm, how many workers have no seat, and after which step one with a seat is killed."""

    training: Training
    spares: int
    kill_after: int
    seed: int
    signal: Signals = SIGKILL

    @property
    def steps(self) -> int:
        """Steps in all."""
        return self.training.warm_up + self.training.steps


def run(case: Case) -> Figures:
    """Return the figures of one run in a fresh network."""
    folder = Path(tempfile.mkdtemp(prefix="tdml-recovery-"))
    try:
        events, killed_at = trio.run(_train, folder, case)
        return figures(events, killed_at) | {"wrong_losses": wrong_losses(folder, case, events)}
    finally:
        shutil.rmtree(folder)


async def _train(folder: Path, case: Case) -> tuple[list[Event], float]:
    workers = case.training.stages * case.training.replicas + case.spares
    network = create_network(folder, workers + 2, workers, Params())
    async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
        peers: list[Child] = []
        invite = ""
        for index, home in enumerate(network.homes):
            more = (["--join", invite] if invite else []) + ([] if network.is_worker(index) else ["--no-work"])
            arguments = ["start", "--home", str(home), "--threads", "1", *LOCAL, *more]
            peers.append(await stack.enter_async_context(child(home.name, "cli.peer", arguments, home / "log.txt")))
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


async def _watch(client: Child, network: DemoNetwork, peers: list[Child], case: Case) -> tuple[list[Event], float]:
    """Collect the client's events with their times; kill a worker of the last stage on the way."""
    dice, events, killed_at = random.Random(case.seed), [], 0.0
    seats: list[list[str]] = []
    async for event in client.events():
        events.append(event | {"at": time.monotonic()})
        if event["event"] == "formed" and not seats:
            seats = event["stages"]
        if event["event"] == "step" and event["step"] >= case.kill_after and not killed_at:
            await trio.sleep(dice.random() * event["seconds"])
            victim = dice.choice(seats[-1])
            peers[network.peers.index(victim)].process.send_signal(case.signal)
            killed_at = time.monotonic()
    return events, killed_at


def _arguments(network: DemoNetwork, out: Path, invite: str, case: Case) -> list[str]:
    training = case.training
    return [
        "train", "--home", str(network.client_home), *LOCAL, "--join", invite, "--model", training.model,
        "--data", str(standard_library()), "--out", str(out), "--stages", str(training.stages),
        "--replicas", str(training.replicas), "--steps", str(case.steps), "--batch", str(training.batch),
        "--microbatches", str(training.microbatches), "--sequence", str(training.sequence), "--save-every", "0",
        "--eval-every", "0",
    ]  # fmt: skip


def figures(events: list[Event], killed_at: float) -> Figures:
    """Return what the events say: times of steps before and after the death, and how often each step was done."""
    steps = [event for event in events if event["event"] == "step"]
    usual = statistics.median(step["seconds"] for step in steps[1:] if step["at"] < killed_at)
    after = [step for step in steps if step["at"] > killed_at]
    moved = [event for event in events if event["event"] == "moved"]
    reached = max(step["step"] for step in steps if step["at"] < killed_at)
    newer = next(step["at"] for step in after if step["step"] > reached)
    return {
        "usual_step": round(usual, 2),
        "longest_step": round(max(step["seconds"] for step in after), 2),
        "waited_for_audits": round(max(step["waited"] for step in after), 2),
        "until_next_step": round(after[0]["at"] - killed_at, 2),
        "until_next_new_step": round(newer - killed_at, 2),
        "killed_after_step": reached,
        "resumed_after_step": moved[0]["step"] if moved else None,
        "steps_done_again": len(steps) - len({step["step"] for step in steps}),
        "events": [event["event"] for event in events if event["event"] not in ("step", "chain")],
    }


def wrong_losses(folder: Path, case: Case, events: list[Event]) -> int:
    """Return how many steps are missing or have another loss than in one process."""
    train = TrainConfig(
        model=case.training.model, data=(standard_library(),), out=folder / "same", steps=case.steps,
        batch=case.training.batch, microbatches=case.training.microbatches, sequence=case.training.sequence,
        stages=case.training.stages, replicas=case.training.replicas,
    )  # fmt: skip
    prepared = prepare(train)
    expected: dict[int, float] = {}
    train_locally(prepared.manifest, prepared.batches, case.steps, lambda step: expected.update({step.step: step.loss}))
    found = {event["step"]: event["loss"] for event in events if event["event"] == "step"}
    return sum(abs(found.get(step, 0.0) - loss) > 1e-4 * abs(loss) for step, loss in expected.items())


def table(found: dict[str, list[Figures]]) -> str:
    """Return the figures as lines of text."""
    lines = [f"{'case':<10}{'usual':>8}{'longest':>9}{'next step':>11}{'next new':>10}{'again':>7}{'wrong':>7}"]
    for name, runs in found.items():
        for one in runs:
            times = f"{one['usual_step']:>8.2f}{one['longest_step']:>9.2f}{one['until_next_step']:>11.2f}"
            counts = f"{one['until_next_new_step']:>10.2f}{one['steps_done_again']:>7}{one['wrong_losses']:>7}"
            lines.append(f"{name:<10}{times}{counts}")
    return "\n".join(lines)


def main() -> None:
    """Measure, and print the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--model", default="llama-tiny")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--kill-after", type=int, default=24)
    parser.add_argument("--only", nargs="+", choices=CASES, default=CASES)
    options = parser.parse_args()
    training = Training(options.model, batch=2, microbatches=4, warm_up=0, steps=options.steps)
    found: dict[str, list[Figures]] = {}
    for seed in range(options.seeds):
        cases = {
            "replica": Case(replace(training, replicas=2), 0, options.kill_after, seed),
            "last": Case(training, 1, options.kill_after, seed),
            "leave": Case(replace(training, replicas=2), 0, options.kill_after, seed, SIGTERM),
        }
        for name in options.only:
            found.setdefault(name, []).append(run(cases[name]))
            print(name, found[name][-1], file=sys.stderr, flush=True)
    targets = {"replica_seconds": TARGET_SECONDS, "next_step_seconds": TARGET_NEXT_STEP}
    more = {"targets": targets, "cores": os.cpu_count(), "load_average": os.getloadavg()}
    print(json.dumps(found | more) if options.json else table(found))


if __name__ == "__main__":
    main()
