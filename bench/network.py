"""Training over slow links, with each compression: how near the speed is to what compute or bandwidth allow.

Every peer is a process in a network namespace of its own behind a link of `--mbits` each way and `--milliseconds`
there and back; a run over links without limits gives the speed that computing allows. The bound of a run is the lesser
of that speed and of tokens / (bytes of the busiest direction of a link / bandwidth); `of_bound` is the speed over it.
Where namespaces cannot be made, the runs are not measured and the result says why.

`equal_tokens` is apart from links and load: the same small model trained on the same tokens in one process, its
two stages exchanging what the encoding leaves, with the loss of the last steps and the bytes of a token.
"""

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import replace
from typing import Any

from bench.support.links import Link, why_not
from bench.support.lossy import equal_tokens
from bench.support.swarm_run import Training, run_swarm
from trainer.payloads import WIRE

Run = dict[str, Any]


def measure(training: Training, link: Link, rounds: int) -> Run:
    """Return speeds over free and over slow links, in alternation."""
    if problem := why_not():
        return {"links": f"not measured: {problem}"}
    free: list[Run] = []
    slow: dict[str, list[Run]] = {name: [] for name in WIRE}
    for _ in range(rounds):
        free.append(run_swarm(training, Link()))
        for name, found in slow.items():
            found.append(run_swarm(replace(training, flags=("--compress", name)), link))
            print(name, statistics.median(found[-1]["seconds"]), file=sys.stderr, flush=True)
    computing = _speed(training, free)
    return {
        "free_tokens_per_second": round(computing, 1),
        **{name: _row(training, found, computing, link) for name, found in slow.items()},
    }


def _row(training: Training, runs: list[Run], computing: float, link: Link) -> Run:
    speed, size = _speed(training, runs), statistics.median(run["link_bytes"] for run in runs)
    bound = min(computing, training.tokens * link.rate / (8 * size))
    return {
        "tokens_per_second": round(speed, 1),
        "bound": round(bound, 1),
        "of_bound": round(speed / bound, 3),
        "link_bytes_per_token": round(size / training.tokens, 1),
        "last_loss": runs[-1]["losses"][-1],
    }


def _speed(training: Training, runs: list[Run]) -> float:
    return training.tokens / statistics.median(second for run in runs for second in run["seconds"])


def main() -> None:
    """Measure, and print the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON, as is always done")
    parser.add_argument("--mbits", type=float, default=100.0, help="megabits per second of a link, each way")
    parser.add_argument("--milliseconds", type=float, default=50.0, help="there and back")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--model", default="llama-8m")
    parser.add_argument("--trained-steps", type=int, default=60, help="steps of the comparison at equal tokens")
    options = parser.parse_args()
    started = time.monotonic()
    link = Link(options.mbits * 1e6, options.milliseconds / 2000)
    found = measure(Training(options.model, steps=options.steps), link, options.rounds)
    print(
        json.dumps(
            {
                **found,
                "equal_tokens": equal_tokens(options.trained_steps),
                "mbits": options.mbits,
                "milliseconds": options.milliseconds,
                "seconds": round(time.monotonic() - started),
                "load_average": os.getloadavg(),
            }
        )
    )


if __name__ == "__main__":
    main()
