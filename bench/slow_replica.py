"""What one slow replica costs: a stage with two replicas, one of which runs a quarter of the time.

Real peers train, in alternation with both replicas at full speed and with the second one stopped and let go on so
that it has a share of the time. Ideal is the work split by speed without loss: (1 + share) / 2 of the throughput of
two full ones. Prints one JSON object; `of_ideal` is the figure.
"""

import argparse
import json
import os
import statistics
import sys
from dataclasses import replace

from bench.support.swarm_run import Run, Training, run_swarm

TARGET = 0.85


def main() -> None:
    """Measure, and print the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON, as is always done")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--share", type=float, default=0.25, help="of the time in which the slow replica runs")
    parser.add_argument("--model", default="llama-8m")
    options = parser.parse_args()
    full = Training(options.model, 1, 2, batch=4, microbatches=16, warm_up=4, steps=options.steps)
    runs: dict[float, list[Run]] = {1.0: [], options.share: []}
    for _ in range(options.rounds):
        for duty, found in runs.items():
            found.append(run_swarm(replace(full, duty=duty)))
            print(duty, found[-1]["seconds"], file=sys.stderr, flush=True)
    speeds = {
        duty: full.tokens / statistics.median(second for run in found for second in run["seconds"])
        for duty, found in runs.items()
    }
    ideal = speeds[1.0] * (1 + options.share) / 2
    report = {
        "tokens_per_second": {str(duty): round(speed, 1) for duty, speed in speeds.items()},
        "ideal": round(ideal, 1),
        "of_ideal": round(speeds[options.share] / ideal, 3),
        "target": TARGET,
        "generations": [run["generations"] for run in runs[options.share]],
        "load_average": os.getloadavg(),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
