"""What audits cost, and how the cost of a token grows with stages, replicas and micro-batches.

Swarms of real peers train a small model. `audits` compares rates of auditing: extra processor seconds of all processes
for a token, and tokens per second, over those without audits. Newcomers are drawn like everybody there, so that all
steps cost what they do in the long run; `audited` tells how many audits ended for each cell. `shapes` has the processor
seconds of a thousand tokens, and bytes of a cell on wire and chain, as the swarm grows. Processor time is of all
processes, chain and client included; it counts on a busy machine, tokens per second only within one run.

Prints one JSON object. Bytes on the wire are counted where peers can have network namespaces of their own.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from bench.support.links import Link, why_not
from bench.support.swarm_run import Training, run_swarm

RATES = (0.0, 0.1, 1.0)
SHAPES = ((1, 1, 8), (2, 1, 8), (4, 1, 8), (2, 2, 8), (2, 1, 4), (2, 1, 16))
_AUDIT_STEPS = 6
"""Steps after which as many audits end as are drawn."""
Run = dict[str, Any]


def audits(training: Training, rounds: int, rates: Sequence[float] = RATES) -> dict[str, Run]:
    """Return the cost of auditing at each rate, the first being none, in alternation."""
    runs: dict[float, list[Run]] = {rate: [] for rate in rates}
    for _ in range(rounds):
        for rate, found in runs.items():
            found.append(run_swarm(replace(training, audit_rate=rate, is_steady=True, warm_up=_AUDIT_STEPS)))
            print("audits", rate, statistics.median(found[-1]["seconds"]), file=sys.stderr, flush=True)
    rows = {rate: _row(training, found) for rate, found in runs.items()}
    bare = rows[rates[0]]
    for row in rows.values():
        row["extra_cpu"] = round(row["cpu_per_1000_tokens"] / bare["cpu_per_1000_tokens"] - 1, 3)
        row["speed"] = round(row["tokens_per_second"] / bare["tokens_per_second"], 3)
    return {str(rate): row for rate, row in rows.items()}


def shapes(training: Training, rounds: int) -> list[Run]:
    """Return the cost of a token in swarms of several shapes, without audits."""
    found = []
    for stages, replicas, microbatches in SHAPES:
        shape = replace(training, stages=stages, replicas=replicas, microbatches=microbatches)
        runs = [run_swarm(shape, None if why_not() else Link()) for _ in range(rounds)]
        sizes = {"stages": stages, "replicas": replicas, "microbatches": microbatches}
        found.append({**sizes, **_row(shape, runs)})
        print(found[-1], file=sys.stderr, flush=True)
    return found


def _row(training: Training, runs: list[Run]) -> Run:
    cells = (training.warm_up + training.steps) * training.microbatches * training.stages
    cpu, seconds = ([value for run in runs for value in run[key]] for key in ("cpu", "seconds"))
    carried = [run["wire_bytes"] / (training.microbatches * training.stages) for run in runs if "wire_bytes" in run]
    wire = {"wire_bytes_per_cell": round(statistics.median(carried))} if carried else {}
    return {
        "cpu_per_1000_tokens": round(1000 * statistics.mean(cpu) / training.tokens, 3),
        "tokens_per_second": round(training.tokens / statistics.median(seconds), 1),
        "chain_bytes_per_cell": round(statistics.median(run["chain_bytes"] for run in runs) / cells),
        **wire,
        "audits": [run["audits"] for run in runs],
        "audited": [run["audited"] for run in runs],
        "peak_memory": runs[-1]["peak_memory"],
    }


def main() -> None:
    """Measure, and print the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON, as is always done")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--model", default="llama-tiny")
    parser.add_argument("--only", nargs="+", choices=("audits", "shapes"), default=("audits", "shapes"))
    parser.add_argument("--batch", type=int, default=8, help="sequences of a cell")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES[1:], help="rates of auditing beside none")
    options = parser.parse_args()
    training = Training(options.model, steps=options.steps, batch=options.batch)
    started = time.monotonic()
    parts = {"audits": partial(audits, rates=(0.0, *options.rates)), "shapes": shapes}
    found = {name: parts[name](training, options.rounds) for name in options.only}
    load = {"seconds": round(time.monotonic() - started), "load_average": os.getloadavg()}
    print(json.dumps({**found, "model": options.model, "batch": options.batch, **load}))


if __name__ == "__main__":
    main()
