"""Tokens per second of a swarm of real peers against what people use, on the same cores, in alternation.

Rivals: plain PyTorch in one process with as many threads as the swarm has stages (at most the cores), torch's own
1F1B pipeline over gloo with a single-threaded process a stage, and hivemind.moe in a virtual environment of its own
(`--hivemind FOLDER`, made there if it is not; without the flag it is not measured). The swarm trains with hardly any
audits, and with the usual ones in steady state: half of a newcomer's first 50 cells are audited, by one peer that is
done with them many steps later, so steps count after three times as many cells, and those before are reported as
`early`. Each stage computes with one thread; a further peer only audits.

Prints one JSON object: medians of tokens per second over all rounds with their spread, ratios of the medians, and
`with_waits`, which counts what a step waits for settled audits. `per_cpu_second` divides by the processor time of all
processes, chain and audits included, which a busy machine changes less. `audited` is how many audits ended for a
counted cell: 0.11 at the usual rate once those of newcomers are over.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.support.rivals import run_pipeline, run_plain
from bench.support.swarm_run import Training, run_swarm

NEWCOMER_CELLS = 50
USUAL_STEPS = 16
PLAIN, PIPELINE, HIVEMIND = "plain", "torch-pipelining", "hivemind-moe"
OFF, USUAL = "swarm-audits-off", "swarm-usual-audits"
WAYS = (PLAIN, OFF, PIPELINE, USUAL, HIVEMIND)
Run = dict[str, Any]


def ways(training: Training, hivemind: Path | None) -> dict[str, Callable[[], Run]]:
    """Return how to measure each way of training, by name, in the order of a round."""
    threads = min(os.cpu_count() or 1, training.stages)
    # a worker does every micro-batch of a step at one replica a stage
    settled = 6 * -(-NEWCOMER_CELLS // training.microbatches)
    audited = max(training.steps, USUAL_STEPS)  # an audit or two a step: a few steps would be a matter of luck
    usual = replace(training, audit_rate=0.1, warm_up=max(settled, training.warm_up), steps=audited)
    found: dict[str, Callable[[], Run]] = {
        PLAIN: lambda: run_plain(training.job(), threads),
        OFF: lambda: run_swarm(training),
        PIPELINE: lambda: run_pipeline(training.job()),
        USUAL: lambda: run_swarm(usual),
    }
    if hivemind is not None:
        from bench.support.hivemind_rival import run_hivemind

        found[HIVEMIND] = lambda: run_hivemind(training.job(), hivemind)
    return found


def measure(training: Training, chosen: dict[str, Callable[[], Run]], rounds: int) -> Run:
    """Alternate all ways of training; return medians, spreads and ratios."""
    runs: dict[str, list[Run]] = {name: [] for name in chosen}
    started = time.monotonic()
    for _ in range(rounds):
        for name, once in chosen.items():
            before = os.getloadavg()[0]
            runs[name].append({**once(), "load": [round(before, 2), round(os.getloadavg()[0], 2)]})
            print(name, summary(training.tokens, runs[name][-1:]), file=sys.stderr, flush=True)
    found = {name: summary(training.tokens, of_way) for name, of_way in runs.items()}
    missing = {name: "not measured" for name in WAYS if name not in found}
    return {
        **found,
        **missing,
        "ratios": ratios(found),
        "model": training.model,
        "stages": training.stages,
        "rounds": rounds,
        "steps": training.steps,
        "cores": os.cpu_count(),
        "seconds": round(time.monotonic() - started),
        "load_average": os.getloadavg(),
    }


def summary(tokens: int, runs: list[Run]) -> Run:
    """Return medians over the steps of all runs of one way, and the lowest and highest median of a run."""
    medians = [tokens / statistics.median(run["seconds"]) for run in runs]
    pooled = {key: [value for run in runs for value in run.get(key, [])] for key in ("seconds", "early", "cpu")}
    waited = [sum(pair) for run in runs for pair in zip(run["seconds"], run.get("waits", []), strict=False)]
    found: Run = {
        "tokens_per_second": _rate(tokens, pooled["seconds"]),
        "spread": [round(min(medians), 1), round(max(medians), 1)],
        "loads": [run["load"] for run in runs if "load" in run],
    }
    for name, seconds in (("early", pooled["early"]), ("with_waits", waited), ("per_cpu_second", pooled["cpu"])):
        if seconds:
            found[name] = _rate(tokens, seconds)
    for name in ("audits", "audited", "generations", "peak_memory", "stalls"):
        if name in runs[-1]:
            found[name] = [run[name] for run in runs]
    return found


def ratios(found: dict[str, Run]) -> dict[str, float]:
    """Return the swarm's speed over each rival's, and with audits over without."""
    speeds = {name: run["tokens_per_second"] for name, run in found.items()}
    swarms = [name for name in (OFF, USUAL) if name in speeds]
    pairs = [(mine, other) for mine in swarms for other in speeds if other not in swarms]
    pairs += [(USUAL, OFF)] if len(swarms) == 2 else []
    return {f"{mine} / {other}": round(speeds[mine] / speeds[other], 3) for mine, other in pairs}


def _rate(tokens: int, seconds: list[float]) -> float:
    return round(tokens / statistics.median(seconds), 1)


def main() -> None:
    """Measure, and print the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON, as is always done")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="steps counted in each run, after those of warm-up")
    parser.add_argument("--model", default="llama-8m", help="llama-8m, llama-25m or llama-100m")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--only", nargs="+", choices=WAYS, default=WAYS, help="ways of training to measure")
    parser.add_argument("--hivemind", type=Path, help="virtual environment of hivemind, made if it is not there")
    parser.add_argument("--trace", type=Path, help="have the swarm with the usual audits write a trace there")
    options = parser.parse_args()
    training = Training(
        options.model, options.stages, batch=options.batch, microbatches=options.microbatches, steps=options.steps
    )
    if options.trace is not None:
        training = replace(training, flags=("--trace", str(options.trace.absolute())))
    chosen = {name: once for name, once in ways(training, options.hivemind).items() if name in options.only}
    found = measure(training, chosen, options.rounds)
    if options.trace is not None:
        from bench.support.where import table

        found["where"] = table(options.trace)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
