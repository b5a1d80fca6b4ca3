"""Replay seeds: `python -m tests.simulation SEED [LAST]`."""

import sys

from tests.simulation.runs import judged
from tests.simulation.scenario import scenario


def main() -> int:
    """Print the scenario and the verdict of each seed; 1 when one of them breaks an invariant."""
    first, last = int(sys.argv[1]), int(sys.argv[-1])
    verdicts = [judged(seed) for seed in range(first, last + 1)]
    broken = [verdict for verdict in verdicts if verdict.faults]
    for verdict in broken or verdicts[:1]:
        print(scenario(verdict.seed), verdict, f"trace {verdict.trace}", sep="\n")
    print(f"{len(verdicts)} runs, {len(broken)} broken")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
