"""Start-up time of the commands, against that of Python itself, in alternation. Prints one JSON object."""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

import trio

from chain.store import Store
from tdml_p2p.demo.network import create_network
from tdml_p2p.demo.processes import child, stop_all
from tdml_p2p.home import Home


def seconds(command: list[str]) -> float:
    """Return the wall time of a command that must succeed."""
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


async def started(home: Path) -> float:
    """Return the seconds until `tdml-peer start` serves."""
    arguments = ["start", "--home", str(home), "--listen", "/ip4/127.0.0.1/tcp/0", "--json"]
    begun = time.perf_counter()
    async with child("peer", "cli.peer", arguments, home / "log.txt") as running:
        await running.expect("ready", 120)
        took = time.perf_counter() - begun
        await stop_all([running])
    return took


def measure(runs: int) -> dict[str, object]:
    """Run every command `runs` times in turn."""
    folder = Path(tempfile.mkdtemp(prefix="tdml-bench-"))
    found: dict[str, list[float]] = {}
    try:
        home = create_network(folder, 1, 0).homes[0]
        database = folder / "chain.db"
        genesis = Home(home).load_genesis()
        assert genesis is not None  # it was made a moment ago
        with closing(Store.open(database, genesis)):
            pass
        commands = {
            "python -c pass": ["-c", "pass"],
            "tdml-peer --help": ["-m", "cli.peer", "--help"],
            "tdml-chain --help": ["-m", "cli.chain", "--help"],
            "tdml-chain status --db": ["-m", "cli.chain", "status", "--db", str(database)],
        }
        for _ in range(runs):
            for name, arguments in commands.items():
                found.setdefault(name, []).append(seconds([sys.executable, *arguments]))
            found.setdefault("tdml-peer start until ready", []).append(trio.run(started, home))
    finally:
        shutil.rmtree(folder)
    medians = {name: round(statistics.median(took), 3) for name, took in found.items()}
    return {"seconds": medians, "runs": runs, "load_average": os.getloadavg()}


def main() -> None:
    """Measure, and print the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON, as is always done")
    parser.add_argument("--runs", type=int, default=7)
    options = parser.parse_args()
    print(json.dumps(measure(options.runs)))


if __name__ == "__main__":
    main()
