"""Replay runs: `python -m tests.simulation --mode MODE --seed SEED [--last SEED] [--mutant M] [--crash-at N]`."""

import argparse
import sys

from tests.simulation.mutants import MUTANTS
from tests.simulation.runs import Run, judged
from tests.simulation.scenario import MODES


def main() -> int:
    """Print the scenario and the verdict of each broken run, or of the first; 1 when one is broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=main.__doc__)
    parser.add_argument("--mode", choices=MODES, default="mixed")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--last", type=int, help="run every seed from --seed to this one")
    parser.add_argument("--mutant", choices=MUTANTS, default="")
    parser.add_argument("--crash-at", type=int)
    given = parser.parse_args()
    seeds = range(given.seed, (given.last if given.last is not None else given.seed) + 1)
    verdicts = [judged(Run(given.mode, seed, given.mutant, given.crash_at)) for seed in seeds]
    broken = [verdict for verdict in verdicts if verdict.faults]
    for verdict in broken or verdicts[:1]:
        print(MODES[given.mode](verdict.run.seed), verdict, f"trace {verdict.trace}", sep="\n")
    print(f"{len(verdicts)} runs, {len(broken)} broken")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
