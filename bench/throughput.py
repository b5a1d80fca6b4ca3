"""Tokens per second of a 2-stage swarm of real peers against plain PyTorch, and what audits cost it.

One run alternates: plain PyTorch with two threads, the swarm with hardly any audits, plain PyTorch with one
thread, the swarm with the usual audits. The model is `llama-8m`, the data Python's own standard library; a step
is 8 micro-batches of 8 sequences of 128 tokens. Each stage computes with one thread, so that the swarm and
plain PyTorch with two threads have the same two cores; a third peer only founds the network and audits.

Prints one JSON object. `tokens_per_second` counts the seconds of a step only, `with_waits` also those that a
step waits for settled audits before it starts. `per_cpu_second` divides by the processor time of all processes
of a run, chain and audits included, which a busy machine changes much less. `runs` has the medians, the load and
the audits of every run.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import trio

from chain.params import Params
from tdml_p2p.config import TrainConfig
from tdml_p2p.demo.network import DemoNetwork, create_network
from tdml_p2p.demo.processes import Child, child, stop_all
from tdml_p2p.swarm.preparation import prepare
from trainer.data import standard_library
from trainer.presets import preset_of

MODEL = "llama-8m"
BATCH, MICROBATCHES, SEQUENCE = 8, 8, 128
TOKENS = BATCH * MICROBATCHES * SEQUENCE
WARM_UP = 2
LOCAL = ("--listen", "/ip4/127.0.0.1/tcp/0", "--json")
FEW, USUAL = "swarm, hardly any audits", "swarm, usual audits"
# one basis point is the lowest rate for which a task's bond is defined
AUDITS = {FEW: (Params(newcomer_rate=1, floor_rate=1), "0.0001"), USUAL: (Params(), "0.1")}
LISTS = ("seconds", "waits", "cpu")
Run = dict[str, Any]


def plain(steps: int) -> Run:
    """Train with `transformers` and `torch.optim.AdamW` in this process; return the seconds of each step."""
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import LlamaConfig, LlamaForCausalLM

    train = TrainConfig(MODEL, (standard_library(),), steps=WARM_UP + steps)
    train = replace(train, batch=BATCH, microbatches=MICROBATCHES, sequence=SEQUENCE)
    batches = prepare(train).batches
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**preset_of(MODEL).config, max_position_embeddings=SEQUENCE))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    seconds, cpu = [], []
    for step in range(1, WARM_UP + steps + 1):
        started, used = time.perf_counter(), time.process_time()
        for cell in range(MICROBATCHES):
            tokens, labels = batches.batch(step, cell)
            logits = model(input_ids=tokens.long(), use_cache=False).logits
            (cross_entropy(logits.flatten(0, 1), labels.long().flatten()) / MICROBATCHES).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
        cpu.append(time.process_time() - used)
    return {"seconds": seconds[WARM_UP:], "cpu": cpu[WARM_UP:], "threads": torch.get_num_threads()}


def plain_apart(steps: int, threads: int) -> Run:
    """Return what `plain` measures in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "bench.throughput", "--plain", "--steps", str(steps)]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    found: Run = json.loads(done.stdout.splitlines()[-1])
    return found


async def swarm(folder: Path, params: Params, audit_rate: str, steps: int) -> Run:
    """Train on two workers and a peer that only audits; return seconds and waits of each step, and the audits."""
    network = create_network(folder, 3, 2, params)
    async with AsyncExitStack() as stack, trio.open_nursery() as nursery:
        peers: list[Child] = []
        invite = ""
        for home in network.homes:
            more = ["--join", invite] if invite else ["--no-work"]
            arguments = ["start", "--home", str(home), "--threads", "1", *LOCAL, *more]
            peers.append(await stack.enter_async_context(child(home.name, "cli.peer", arguments, home / "log.txt")))
            ready = await peers[-1].expect("ready", 120)
            invite = invite or str(ready["invite"])
            nursery.start_soon(peers[-1].drain)
        arguments = training(network, folder / "out", invite, audit_rate, WARM_UP + steps)
        client = await stack.enter_async_context(child("client", "cli.peer", arguments, folder / "client.txt"))
        events = [event | {"cpu": cpu_seconds([*peers, client])} async for event in client.events()]
        if await client.process.wait() != 0:
            raise RuntimeError(client.log.read_text()[-500:])
        await stop_all(peers)
    return of_steps([event for event in events if event["event"] == "step"])


def training(network: DemoNetwork, out: Path, invite: str, audit_rate: str, steps: int) -> list[str]:
    """Return the arguments of `tdml-peer` for the client."""
    return [
        "train", "--home", str(network.client_home), *LOCAL, "--join", invite, "--model", MODEL,
        "--data", str(standard_library()), "--out", str(out), "--stages", "2", "--replicas", "1",
        "--steps", str(steps), "--batch", str(BATCH), "--microbatches", str(MICROBATCHES),
        "--sequence", str(SEQUENCE), "--audit-rate", audit_rate, "--save-every", "0",
    ]  # fmt: skip


def cpu_seconds(children: list[Child]) -> float:
    """Return the processor time that running processes have used."""
    ticks = 0
    for one in children:
        fields = Path(f"/proc/{one.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def of_steps(events: list[dict[str, Any]]) -> Run:
    """Return the figures of a client's step events, but for the first steps."""
    counted = events[WARM_UP:]
    return {
        "seconds": [TOKENS / event["tokens_per_second"] for event in counted],
        "cpu": [later["cpu"] - earlier["cpu"] for earlier, later in pairwise(events[WARM_UP - 1 :])],
        "waits": [event["waited"] for event in counted],
        "audits": events[-1]["audits"],
        "generations": events[-1]["generation"] + 1,
    }


def summary(run: Run) -> Run:
    """Return a run's medians in place of its lists."""
    waits = run.get("waits", [0.0] * len(run["seconds"]))
    kept = {name: value for name, value in run.items() if name not in LISTS}
    return {
        "tokens_per_second": rate(run["seconds"]),
        "with_waits": rate([sum(pair) for pair in zip(run["seconds"], waits, strict=True)]),
        "per_cpu_second": round(TOKENS / statistics.mean(run["cpu"]), 1),
        **kept,
    }


def rate(seconds: list[float]) -> float:
    """Return the median of tokens per second."""
    return round(TOKENS / statistics.median(seconds), 1)


def once(name: str, steps: int) -> Run:
    """Train in the way called `name`; return its figures with the load of the machine before and after."""
    before = os.getloadavg()[0]
    if name in AUDITS:
        folder = Path(tempfile.mkdtemp(prefix="tdml-bench-"))
        try:
            run = trio.run(swarm, folder, *AUDITS[name], steps)
        finally:
            shutil.rmtree(folder)
    else:
        run = plain_apart(steps, int(name.split()[-1]))
    return {**run, "load": [round(before, 2), round(os.getloadavg()[0], 2)]}


def measure(rounds: int, steps: int) -> Run:
    """Alternate all ways of training; return medians over all steps, ratios, and every run."""
    runs: dict[str, list[Run]] = {name: [] for name in ("plain, threads: 2", FEW, "plain, threads: 1", USUAL)}
    started = time.monotonic()
    for _ in range(rounds):
        for name, found in runs.items():
            found.append(once(name, steps))
            print(name, summary(found[-1]), file=sys.stderr, flush=True)
    pooled = {
        name: summary({key: [x for run in found for x in run[key]] for key in LISTS if key in found[0]})
        for name, found in runs.items()
    }
    speeds, per_cpu = ({name: pooled[name][key] for name in pooled} for key in ("tokens_per_second", "per_cpu_second"))
    return {
        "tokens_per_second": speeds,
        "per_cpu_second": per_cpu,
        "with_waits": {name: pooled[name]["with_waits"] for name in AUDITS},
        "swarm_over_plain_2_threads": round(speeds[FEW] / speeds["plain, threads: 2"], 3),
        "swarm_over_plain_1_thread": round(speeds[FEW] / speeds["plain, threads: 1"], 3),
        "audited_over_unaudited": round(speeds[USUAL] / speeds[FEW], 3),
        "audited_over_unaudited_with_waits": round(pooled[USUAL]["with_waits"] / pooled[FEW]["with_waits"], 3),
        "swarm_over_plain_2_threads_per_cpu_second": round(per_cpu[FEW] / per_cpu["plain, threads: 2"], 3),
        "audited_over_unaudited_per_cpu_second": round(per_cpu[USUAL] / per_cpu[FEW], 3),
        "runs": {name: [summary(run) for run in found] for name, found in runs.items()},
        "rounds": rounds,
        "steps": steps,
        "cores": os.cpu_count(),
        "seconds": round(time.monotonic() - started),
        "load_average": os.getloadavg(),
    }


def main() -> None:
    """Measure, and print the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON, as is always done")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6, help="steps counted in each run, after two of warm-up")
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    print(json.dumps(plain(options.steps) if options.plain else measure(options.rounds, options.steps)))


if __name__ == "__main__":
    main()
