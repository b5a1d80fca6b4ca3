"""Tokens per second of a 2-stage swarm of real peers against plain PyTorch, and what audits cost it.

One run alternates: plain PyTorch with one and with two threads, the swarm without audits, the swarm with
the usual ones. The model is `llama-8m`; a step is 8 micro-batches of 8 sequences of 128 tokens. Each stage
computes with one thread, so that the swarm and plain PyTorch with two threads have the same two cores.
Prints one JSON object: the median of the steps' tokens per second of each, and the ratios.
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
from pathlib import Path
from typing import Any

import trio

from chain.params import Params
from tdml_p2p.demo.network import create_network
from tdml_p2p.demo.processes import Child, child, stop_all
from trainer.data import standard_library
from trainer.presets import preset_of

MODEL = "llama-8m"
BATCH, MICROBATCHES, SEQUENCE = 8, 8, 128
TOKENS = BATCH * MICROBATCHES * SEQUENCE
WARM_UP = 2
LOCAL = ("--listen", "/ip4/127.0.0.1/tcp/0", "--json")
AUDITS = {"no audits": Params(newcomer_rate=0, floor_rate=0), "audits": Params()}


def plain(steps: int) -> list[float]:
    """Train with `transformers` and `torch.optim.AdamW` in this process; return tokens per second of each step."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**preset_of(MODEL).config, max_position_embeddings=SEQUENCE)
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    rates = []
    for _ in range(WARM_UP + steps):
        started = time.perf_counter()
        for _ in range(MICROBATCHES):
            tokens = torch.randint(config.vocab_size, (BATCH, SEQUENCE))
            (model(input_ids=tokens, labels=tokens).loss / MICROBATCHES).backward()
        optimizer.step()
        optimizer.zero_grad()
        rates.append(TOKENS / (time.perf_counter() - started))
    return rates[WARM_UP:]


def plain_apart(steps: int, threads: int) -> list[float]:
    """Return what `plain` measures in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    command = [sys.executable, __file__, "--plain", "--steps", str(steps)]
    found: list[float] = json.loads(subprocess.run(command, env=environment, check=True, capture_output=True).stdout)
    return found


async def swarm(folder: Path, params: Params, steps: int) -> list[float]:
    """Train on two workers and a peer that only audits; return tokens per second of each step."""
    network = create_network(folder, 3, 2, params)
    async with AsyncExitStack() as stack:
        peers: list[Child] = []
        invite = ""
        for index, home in enumerate(network.homes):
            more = ["--join", invite] if invite else ["--no-work"]
            arguments = ["start", "--home", str(home), "--threads", "1", *LOCAL, *more]
            peers.append(await stack.enter_async_context(child(home.name, "cli.peer", arguments, home / "log.txt")))
            ready = await peers[index].expect("ready", 120)
            invite = invite or str(ready["invite"])
        arguments = [
            "train", "--home", str(network.client_home), *LOCAL, "--join", invite, "--model", MODEL,
            "--data", str(standard_library()), "--out", str(folder / "out"), "--stages", "2", "--replicas", "1",
            "--steps", str(WARM_UP + steps), "--batch", str(BATCH), "--microbatches", str(MICROBATCHES),
            "--sequence", str(SEQUENCE), "--audit-rate", "0" if not params.floor_rate else "0.1",
        ]  # fmt: skip
        client = await stack.enter_async_context(child("client", "cli.peer", arguments, folder / "client.txt"))
        events = [event async for event in client.events()]
        if await client.process.wait() != 0:
            raise RuntimeError(client.log.read_text()[-500:])
        await stop_all(peers)
    return [event["tokens_per_second"] for event in events if event["event"] == "step"][WARM_UP:]


def measure(rounds: int, steps: int) -> dict[str, Any]:
    """Alternate all ways of training; return medians and ratios."""
    rates: dict[str, list[float]] = {}
    for _ in range(rounds):
        for threads in (1, 2):
            rates.setdefault(f"plain, {threads} threads", []).extend(plain_apart(steps, threads))
        for name, params in AUDITS.items():
            folder = Path(tempfile.mkdtemp(prefix="tdml-bench-"))
            try:
                rates.setdefault(f"swarm, {name}", []).extend(trio.run(swarm, folder, params, steps))
            finally:
                shutil.rmtree(folder)
    medians = {name: round(statistics.median(found), 1) for name, found in rates.items()}
    return {
        "tokens_per_second": medians,
        "swarm_over_plain": round(medians["swarm, no audits"] / medians["plain, 2 threads"], 3),
        "audited_over_unaudited": round(medians["swarm, audits"] / medians["swarm, no audits"], 3),
        "rounds": rounds,
        "steps": steps,
        "load_average": os.getloadavg(),
    }


def main() -> None:
    """Measure, and print the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON, as is always done")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--plain", action="store_true", help="only train with plain PyTorch here")
    options = parser.parse_args()
    print(json.dumps(plain(options.steps) if options.plain else measure(options.rounds, options.steps)))


if __name__ == "__main__":
    main()
