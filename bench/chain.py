"""The chain's scoreboard: validators as processes on 127.0.0.1, measured from outside.

For each size of network: idle cost, then transfers one after the other. For one size: transfers offered
through gossip by a peer without a seat, at rising rates, counted in final blocks; then a flood. `final` is
from a block's timestamp to when a watcher at the first peer has it; `transfer` from submission to receipt.
Prints one JSON object.
"""

import argparse
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import trio

from bench import storage
from bench.support.network import (
    READY_SECONDS,
    Running,
    cpu_seconds,
    make_homes,
    maps_torch,
    quantiles,
    resident_megabytes,
    running,
    scratch,
)
from bench.sync import write
from cli.sources import DaemonSource
from tdml_p2p.demo.processes import child
from tdml_p2p.home import Home

SETTLE_SECONDS = 8.0
PURSES = 1000
RATES = (250, 500, 1000, 1500, 2000)
PAUSE_SECONDS = 6.0
DAY = 86_400
RECENT = 50
"""Blocks below the tip of the one that the joiner by snapshot trusts."""


async def idle(network: Running, seconds: float) -> dict[str, Any]:
    """Return what a network without transactions costs."""
    await trio.sleep(SETTLE_SECONDS)
    before, begun = cpu_seconds(network.peers), time.time()
    await trio.sleep(seconds)
    took = time.time() - begun
    shares = [(after - earlier) / took for after, earlier in zip(cpu_seconds(network.peers), before, strict=True)]
    blocks = network.watcher.between(begun, time.time())
    bytes_each = [block["bytes"] for block in network.source.ask("blocks", {"count": "3"})]
    return {
        "blocks_per_second": round(len(blocks) / took, 3),
        "final": quantiles([block.arrived - block.timestamp for block in blocks]),
        "core_share_per_peer": quantiles(shares),
        "block_bytes": max(bytes_each),
        "block_megabytes_per_day": round(max(bytes_each) * len(blocks) / took * DAY / 1e6, 2),
        "resident_megabytes": quantiles([resident_megabytes(one) for one in network.peers]),
        "torch_is_mapped": any(map(maps_torch, network.peers)),
    }


async def transfers(network: Running, seconds: float) -> dict[str, Any]:
    """Return what single transfers take, each sent when the one before is final."""
    waits: list[float] = []
    begun = time.time()
    receiver = str(network.source.ask("validators", {})[-1]["validator"])
    while time.time() - begun < seconds:
        sent = time.perf_counter()
        body = {"kind": "transfer", "to": receiver, "amount": "1"}
        await trio.to_thread.run_sync(network.source.post, "/transactions", body)
        waits.append(time.perf_counter() - sent)
    blocks = network.watcher.between(begun, time.time())
    return {
        "transfer": quantiles(waits),
        "final": quantiles([block.arrived - block.timestamp for block in blocks]),
    }


async def load(network: Running, folder: Path, *flags: str) -> list[dict[str, Any]]:
    """Return what became of the load at each of its rates."""
    arguments = ["--invite", network.invite, "--genesis", str(network.homes[0].genesis_path), *flags]
    found = []
    async with child("load", "bench.support.load", arguments, folder / "load.txt") as one:
        await one.expect("ready", 180)
        before = cpu_seconds(network.peers)
        async for said in one.events():
            if said["event"] != "rate":
                break
            after = cpu_seconds(network.peers)
            found.append(_stretch(network, said, sum(after) - sum(before)))
            await trio.sleep(PAUSE_SECONDS - 1.0)
            found[-1] |= _left(network, said)
            before = cpu_seconds(network.peers)
    return found


def _stretch(network: Running, said: dict[str, Any], cpu: float) -> dict[str, Any]:
    """Return the first peer's view of the time in which transfers were offered, less its first two seconds."""
    begun, ended = said["begun"] + 2.0, said["ended"]
    blocks = network.watcher.between(begun, ended)
    times = [block.timestamp for block in blocks]
    counted = sum(block.transactions for block in blocks[1:])
    return {
        "rate": said["rate"],
        "offered_per_second": round(said["offered"], 1),
        "final_per_second": round(counted / (times[-1] - times[0]), 1) if len(blocks) > 1 else 0.0,
        "final": quantiles([block.arrived - block.timestamp for block in blocks]),
        "blocks_per_second": round(len(blocks) / (ended - begun), 3),
        "cores_of_all_peers": round(cpu / (said["ended"] - said["begun"]), 2),
    }


def _left(network: Running, said: dict[str, Any]) -> dict[str, Any]:
    included = sum(block.transactions for block in network.watcher.between(said["begun"], time.time()))
    return {
        "missing_after_pause": int(said["sent"]) - included,
        "resident_megabytes": max(map(resident_megabytes, network.peers)),
    }


async def saturate(validators: int, seconds: float, rates: tuple[int, ...]) -> dict[str, Any]:
    """Return the sustained transfers a second at rising rates, and what a flood of true and false ones does."""
    with scratch() as folder:
        homes, _ = make_homes(folder, validators, PURSES)
        async with running(homes) as network:
            common = ["--accounts", str(PURSES), "--pause", str(PAUSE_SECONDS)]
            listed = ",".join(map(str, rates))
            steady = await load(network, folder, *common, "--rates", listed, "--seconds", str(seconds))
    return {"validators": validators, "rates": steady}


async def flood(validators: int, count: int, *flags: str) -> dict[str, Any]:
    """Return how a network bears `count` transfers offered as fast as they can be sent."""
    with scratch() as folder:
        homes, _ = make_homes(folder, validators, PURSES)
        async with running(homes) as network:
            found = await load(network, folder, "--rates", "10000", "--seconds", str(count / 10_000), *flags)
            await trio.sleep(20.0)
            last = network.watcher.blocks[-5:]
            found[0]["final_after"] = quantiles([block.arrived - block.timestamp for block in last])
            found[0]["mempool"] = len(network.source.ask("mempool", {}))
    return found[0]


async def quiet(validators: int, seconds: float) -> dict[str, Any]:
    """Return a network's idle cost and the times of single transfers."""
    with scratch() as folder:
        homes, _ = make_homes(folder, validators, 0)
        async with running(homes) as network:
            found = {"validators": validators, "idle": await idle(network, seconds)}
            return found | await transfers(network, seconds)


async def join(blocks: int, load: int) -> dict[str, Any]:
    """Return how fast a fresh process takes a chain from another block by block, and a third one by snapshot."""
    with scratch() as folder:
        start_ms = int((time.time() - blocks) * 1000)
        genesis = write(folder / "chain.db", 4, blocks, load, start_ms)
        homes = [Home(folder / f"peer-{index}") for index in range(3)]
        for home in homes:
            home.create()
            home.save_genesis(genesis)
        shutil.copy(folder / "chain.db", homes[0].chain_path)
        async with running(homes[:1], blocks) as network:
            block = network.source.ask("block", {"id": str(blocks - RECENT)})
            every = await _caught_up(network, homes[1], blocks)
            trust = ("--trust", f"{blocks - RECENT}:{block['hash']}")
            newest = await _caught_up(network, homes[2], blocks, "--snapshot", *trust)
            bytes_ = homes[0].chain_path.stat().st_size
    return {
        "blocks": blocks,
        "transfers_per_block": load,
        "seconds": round(every, 2),
        "blocks_per_second": round(blocks / every),
        "snapshot_seconds": round(newest, 2),
        "snapshot_blocks_per_second": round(blocks / newest),
        "database_bytes_per_block": round(bytes_ / blocks),
    }


async def _caught_up(network: Running, home: Home, height: int, *flags: str) -> float:
    """Return the seconds from a fresh peer's being ready to its reaching a height."""
    one = await network.add(home, *flags)
    await one.expect("ready", READY_SECONDS)
    begun, source = time.perf_counter(), DaemonSource(home.path)
    with trio.fail_after(READY_SECONDS):
        while source.ask("status", {})["height"] < height:
            await trio.sleep(0.02)
    return time.perf_counter() - begun


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Go through all measurements."""
    sizes = [options.validators] if options.quick else sorted({options.validators, 7, 20})
    rates = RATES[:3] if options.quick else RATES
    found: dict[str, Any] = {"networks": [trio.run(quiet, size, options.seconds) for size in sizes]}
    found["load"] = trio.run(saturate, options.validators, options.seconds, rates)
    found["sync"] = [trio.run(join, 2000, transfers) for transfers in (0, 10)]
    found["storage"] = storage.measure(2000 if options.quick else 100_000, 3)
    if not options.quick:
        found["flood"] = trio.run(flood, options.validators, 100_000)
        found["junk"] = trio.run(flood, options.validators, 100_000, "--junk")
    return found | {"load_average": os.getloadavg()}


def main() -> None:
    """Measure, and print the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON, as is always done")
    parser.add_argument("--validators", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each stretch")
    parser.add_argument("--quick", action="store_true", help="one size of network, three rates, no flood")
    print(json.dumps(measure(parser.parse_args())))


if __name__ == "__main__":
    main()
