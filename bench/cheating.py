"""Each attack on a swarm of real cells: how often, and how soon, it is convicted, and who else notices it.

One of six workers cheats; its cells are re-executed at the task's rate by auditors of whom some are its friends. The
ledger, sketches and re-executions are the real ones, blocks are virtual. Prints a table, then one JSON line.
"""

import argparse
import json
import random
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import cache

import torch

from bench.support.detectors import clusters_notice, iota_notices, majority_notices, toploc_notices
from bench.support.recordings import HONEST, RESULTS, STAGES, Recordings, record
from tests.attacks.kit import (
    ATTACKS,
    USUAL,
    Character,
    Figures,
    Place,
    Prepare,
    RealSwarm,
    addresses_of,
    cheating,
    measure,
    recordings,
    result_of,
    swarm_of,
)
from tests.attacks.laziness import WAYS, measure_lazy

RATE = 1000
FRIENDS = 2
STAGE = 0
"""Here 7 accounts may be drawn: 2 friends are a share f of 0.286."""
_HONEST_BLOCKS = 60


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    parser.add_argument("--runs", type=int, default=200, help="runs of each attack")
    parser.add_argument("--only", default="", help="measure attacks whose name contains this")
    parser.add_argument("--auditors", action="store_true", help="measure lazy auditors instead of cheating workers")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.auditors:
        print(json.dumps(lazy_auditors(arguments.runs, arguments.only)))
        return
    named = {name: prepare for name, prepare in prepared().items() if arguments.only in name}
    rows = [row(measure_one(name, prepare, arguments.runs)) for name, prepare in named.items()]
    pooled = sorted(count for one in rows for count in one.pop("counts"))
    report = {
        "rate": RATE / 10_000,
        "runs": arguments.runs,
        "attacks": rows,
        "p999_of_all_runs": pooled[int(0.999 * len(pooled))] if pooled else None,
        "honest": honest(),
        "others": others(),
    }
    if not arguments.json:
        show(report)
    print(json.dumps(report))


def lazy_auditors(runs: int, only: str = "") -> list[dict[str, object]]:
    """Return what comes of auditors that do not compute, in `runs` swarms of each way."""
    return [{"auditor": way, **asdict(measure_lazy(way, runs))} for way in WAYS if only in way]


def prepared() -> dict[str, Prepare]:
    """Return all attacks by name: what the cheat is to do."""
    found: dict[str, Prepare] = {name: cheating(name) for name in RESULTS}
    found["sparse, 5 % of cells"] = cheating("sign flip", is_cheating=sparse)
    found["sleeper, after 64 honest cells"] = cheating("int8 weights", is_cheating=lambda _, place: place.step > 8)
    return found


def sparse(_: RealSwarm, place: Place) -> bool:
    """Whether the sparse cheat cheats here: in one of twenty cells."""
    return random.Random(str(place)).random() < 0.05


def measure_one(name: str, prepare: Prepare, runs: int) -> Figures:
    """Return the figures of one attack, at a stage where it changes something."""
    number = addresses_of(name, STAGE, 0) if name in ATTACKS else None
    is_idle = number == addresses_of(USUAL, STAGE, 0)
    return measure(name, prepare, runs, stage=1 if is_idle else STAGE, colluding=1 if is_idle else FRIENDS)


def row(figures: Figures) -> dict[str, object]:
    """Return what the table says of one attack."""
    low, high = figures.bounds(3.0)
    return {
        "attack": figures.attack,
        "convicted": figures.convicted / figures.runs,
        "mean_cells": round(figures.mean, 2),
        "theory": round(1 / figures.theory, 2),
        "is_as_theory_says": low <= figures.mean <= high,
        "p999_cells": figures.quantile(0.999),
        "claimed_until_evicted": round(sum(figures.claimed) / figures.runs, 1),
        "false_evictions": figures.honest_evictions,
        "false_charges": figures.honest_charges,
        "overhead": round(figures.executions / figures.paid, 4),
        "counts": figures.cells,
    }


def honest() -> dict[str, object]:
    """Return what audits cost a swarm of honest, unlike peers, and what they find in it."""
    kernels, cells, executions, comparisons, disputes = list(HONEST), 0, 0, 0, 0
    for run in range(8):
        swarm = swarm_of(f"honest {run}", RATE)
        for index, account in enumerate(sorted(swarm.state.validators().powers)):
            swarm.characters[account] = Character(kernel=kernels[(index + run) % len(kernels)])
        for _ in range(_HONEST_BLOCKS):
            swarm.work(1)
        cells += len(swarm.claimed_as)
        executions += swarm.executions
        comparisons += len(swarm.ledger.happened("passed"))
        disputes += len(swarm.ledger.happened("disputed"))
    return {"cells": cells, "overhead": executions / cells, "comparisons": comparisons, "disputes": disputes}


def others() -> list[dict[str, object]]:
    """Return the share of cells in which each rival notices an attack, or an honest peer on other hardware."""
    return [{"attack": name, **_noticed(name)} for name in (*HONEST, *RESULTS)]


def _noticed(name: str) -> dict[str, float]:
    places = [(stage, number) for stage in range(STAGES) for number in range(len(recordings().cells[stage]))]
    if name not in HONEST:  # some change nothing at some stages
        places = [place for place in places if addresses_of(name, *place) != addresses_of(USUAL, *place)]
    pairs = [(result_of(name, *place), result_of(USUAL, *place)) for place in places]
    replicas = [[b"".join(addresses_of(said, *place).values()) for said in (name, USUAL, USUAL)] for place in places]
    suspected = [_suspected(name, stage) for stage in sorted({stage for stage, _ in places})]
    return {
        "toploc": _share(toploc_notices(one, other) for one, other in pairs),
        "iota": _share(iota_notices(one, other) for one, other in pairs),
        "kmeans": _share(one for _, cheats in suspected for one in cheats),
        "kmeans_honest_suspected": _share(one for peers, _ in suspected for one in peers),
        "majority_of_3": _share(majority_notices(sent)[0] for sent in replicas),
    }


def _suspected(name: str, stage: int) -> tuple[list[bool], list[bool]]:
    """Return whom K-means suspects among a stage's gradients: of the honest ones, and of the last quarter's, cheats."""
    cells = _many().cells[stage]
    cut = len(cells) - len(cells) // 4
    found = clusters_notice([one.honest for one in cells[:cut]], [ATTACKS[name](_many(), one) for one in cells[cut:]])
    return found[:cut], found[cut:]


@cache
def _many() -> Recordings:
    """Return more cells of the same training: what is told from their distribution needs many."""
    return record(microbatches=16)


def _share(noticed: Iterable[bool]) -> float:
    found = list(noticed)
    return round(sum(found) / max(1, len(found)), 3)


def show(report: dict[str, object]) -> None:
    """Print the tables."""
    put: Callable[[str], None] = print
    rivals = {one["attack"]: one for one in report["others"]}  # type: ignore[attr-defined]
    put(f"{'attack':32}{'convicted':>10}{'mean':>8}{'theory':>8}{'p99.9':>7}{'false':>7}{'compute':>9}")
    for one in report["attacks"]:  # type: ignore[attr-defined]
        put(
            f"{one['attack']:32}{one['convicted']:>10.1%}{one['mean_cells']:>8}{one['theory']:>8}"
            f"{one['p999_cells']:>7}{one['false_evictions'] + one['false_charges']:>7}{one['overhead']:>9.1%}"
        )
    put(
        f"\n{'noticed by others, share of cells':32}"
        f"{'TOPLOC':>10}{'IOTA':>8}{'K-means':>9}{'(honest)':>10}{'3 replicas':>12}"
    )
    for name, one in rivals.items():
        put(
            f"{name:32}{one['toploc']:>10.1%}{one['iota']:>8.1%}{one['kmeans']:>9.1%}"
            f"{one['kmeans_honest_suspected']:>10.1%}{one['majority_of_3']:>12.1%}"
        )
    put(f"\nhonest swarm: {report['honest']}")


if __name__ == "__main__":
    main()
