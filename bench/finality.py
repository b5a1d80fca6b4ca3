"""Finality, block size and CPU time of a network of validators, each a process on 127.0.0.1.

First the network idles, then transfers go to it one after the other, each as soon as the one before is final. A
transfer waits for the next block, of which there is one a second; `block_seconds` is from when a validator sees a
proposal to when the block is final there. Prints one JSON object.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import trio

from cli.sources import DaemonSource
from tdml_p2p.demo.network import DemoNetwork, create_network
from tdml_p2p.demo.processes import Child, child, stop_all

LOCAL = ("--listen", "/ip4/127.0.0.1/tcp/0", "--json", "--no-work")
SETTLE_SECONDS = 10.0
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


async def started(network: DemoNetwork, stack: AsyncExitStack) -> list[Child]:
    """Start all validators."""
    peers: list[Child] = []
    invite = ""
    for home in network.homes:
        joining = ["--join", invite] if invite else []
        arguments = ["start", "--home", str(home), *LOCAL, *joining]
        peers.append(await stack.enter_async_context(child(home.name, "cli.peer", arguments, home / "log.txt")))
        invite = invite or str((await peers[0].expect("ready", 120))["invite"])
    for one in peers[1:]:
        await one.expect("ready", 120)
    return peers


def cpu_seconds(peers: list[Child]) -> float:
    """Return the CPU time that the processes have taken."""
    total = 0
    for one in peers:
        fields = Path(f"/proc/{one.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        total += int(fields[11]) + int(fields[12])
    return total / _TICKS


def resident_bytes(peers: list[Child]) -> int:
    """Return the largest resident memory of a process."""
    return max(int(Path(f"/proc/{one.process.pid}/statm").read_text().split()[1]) * _PAGE for one in peers)


async def phase(peers: list[Child], source: DaemonSource, seconds: float, receiver: str | None) -> dict[str, Any]:
    """Return what a stretch of time cost, with or without transfers."""
    waits: list[float] = []
    first, before, begun = source.ask("status", {})["height"], cpu_seconds(peers), time.perf_counter()
    while time.perf_counter() - begun < seconds:
        if receiver is None:
            await trio.sleep(0.5)
            continue
        sent = time.perf_counter()
        body = {"kind": "transfer", "to": receiver, "amount": "1"}
        await trio.to_thread.run_sync(source.post, "/transactions", body)
        waits.append(time.perf_counter() - sent)
    blocks, took = source.ask("status", {})["height"] - first, time.perf_counter() - begun
    spent = cpu_seconds(peers) - before
    found = {
        "blocks_per_second": round(blocks / took, 3),
        "cpu_seconds_per_block": round(spent / max(1, blocks), 3),
        "core_share_per_peer": round(spent / took / len(peers), 4),
    }
    if waits:
        found["transfer_seconds"] = quantiles(waits)
    return found


def quantiles(values: list[float]) -> dict[str, float]:
    """Return the median and the 99th percentile."""
    ordered = sorted(values)
    return {
        "p50": round(statistics.median(ordered), 3),
        "p99": round(ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))], 3),
        "count": len(ordered),
    }


async def measure(validators: int, seconds: float) -> dict[str, Any]:
    """Run a network through both phases."""
    folder = Path(tempfile.mkdtemp(prefix="tdml-bench-"))
    try:
        network = create_network(folder, validators, 0)
        async with AsyncExitStack() as stack:
            peers = await started(network, stack)
            source = DaemonSource(network.homes[0])
            await trio.sleep(SETTLE_SECONDS)
            idle = await phase(peers, source, seconds, None)
            busy = await phase(peers, source, seconds, network.peers[1])
            status = source.get("/status.json")
            sizes = [block["bytes"] for block in source.ask("blocks", {"count": "20"})]
            memory = resident_bytes(peers)
            await stop_all(peers)
    finally:
        shutil.rmtree(folder)
    return {
        "validators": validators,
        "block_seconds": {name: status["finality"][name] for name in ("p50", "p99")},
        "idle": idle,
        "transfers": busy,
        "block_bytes": {"least": min(sizes), "most": max(sizes)},
        "resident_megabytes": round(memory / 1e6),
        "load_average": os.getloadavg(),
    }


def main() -> None:
    """Measure, and print the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON, as is always done")
    parser.add_argument("--validators", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=30.0)
    options = parser.parse_args()
    print(json.dumps(trio.run(measure, options.validators, options.seconds)))


if __name__ == "__main__":
    main()
