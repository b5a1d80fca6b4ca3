"""Where each millisecond of a cell goes, from a file that `tdml-peer train --trace` wrote.

`python -m bench.support.where TRACE` prints a table: for every stage, milliseconds per cell of its own span names,
what is nested in a span taken out of it. `compute` is the torch thread, `loop` what the event loop did beside it.
"""

import json
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_COMPUTE, _WORKER, _LATE = "compute", "worker", "event loop"
_WARM_UP = 2


@dataclass
class Stage:
    """Milliseconds by kind and name over all workers of a stage, its cells, and how late its event loops were."""

    workers: int = 0
    cells: int = 0
    own: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    late: list[float] = field(default_factory=list)


def read(path: Path, warm_up: int = _WARM_UP) -> tuple[dict[str, Stage], float]:
    """Return the stages of a trace by name, and the milliseconds of the steps after the first ones."""
    events = json.loads(path.read_text())["traceEvents"]
    spans = [e for e in events if e["ph"] == "X"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    lanes = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    steps = [e for e in spans if e["name"] == "step" and e["args"]["step"] > warm_up]
    start = min((e["ts"] for e in steps), default=0.0)
    end = max((e["ts"] + e["dur"] for e in steps), default=0.0)
    by_lane: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    for event in spans:
        if start <= event["ts"] < end:
            by_lane[event["pid"], event["tid"]].append(event)
    stages: dict[str, Stage] = defaultdict(Stage)
    for pid, name in names.items():
        stages[_short(name)].workers += 1
        for (of, tid), found in by_lane.items():
            if of == pid:
                _count(stages[_short(name)], lanes[of, tid], found)
    return dict(stages), (end - start) / 1000


def own_times(spans: Iterable[dict[str, Any]]) -> Iterator[tuple[str, float]]:
    """Yield the name of each span of one lane with the microseconds that no span inside it took."""
    open_spans: list[tuple[str, float, float]] = []
    for span in sorted(spans, key=lambda s: (s["ts"], -s["dur"])):
        while open_spans and open_spans[-1][1] <= span["ts"]:
            name, _, own = open_spans.pop()
            yield name, own
        if open_spans:
            name, end, own = open_spans[-1]
            open_spans[-1] = (name, end, own - span["dur"])
        open_spans.append((span["name"], span["ts"] + span["dur"], span["dur"]))
    for name, _, own in open_spans:
        yield name, own


def table(path: Path) -> dict[str, Any]:
    """Return milliseconds per cell of every stage by kind and span, busiest first."""
    stages, wall = read(path)
    return {name: _row(stage, wall) for name, stage in sorted(stages.items())}


def _row(stage: Stage, wall: float) -> dict[str, Any]:
    cells = max(stage.cells, 1)
    kinds = {
        kind: {name: round(total / cells, 2) for name, total in times.most_common()}
        for kind, times in stage.own.items()
    }
    waiting = stage.own[_WORKER]["wait"]
    working = stage.own[_COMPUTE].total()
    # the client computes nothing: its wall clock is nobody's cell
    rest = max(wall * stage.workers - working - waiting, 0.0) if stage.cells else 0.0
    late = sorted(stage.late) or [0.0]
    return {
        "workers": stage.workers,
        "cells": stage.cells,
        "wall": round(wall * stage.workers / cells, 2) if stage.cells else 0.0,
        **kinds,
        "between": round(rest / cells, 2),
        "loop_late_p50": round(statistics.median(late), 2),
        "loop_late_p99": round(late[int(0.99 * (len(late) - 1))], 2),
    }


def _count(stage: Stage, lane: str, spans: list[dict[str, Any]]) -> None:
    if lane == _LATE:
        stage.late += [span["dur"] / 1000 for span in spans]
        return
    kind = lane if lane in (_COMPUTE, _WORKER, "audits", "openings", "claims") else "loop"
    for name, own in own_times(spans):
        stage.own[kind][name] += own / 1000
    if lane == _COMPUTE:
        stage.cells += sum(span["name"] == "backward" for span in spans)


def _short(name: str) -> str:
    """Return `stage 0` or `client` of a process name, which ends with the peer."""
    return name.rpartition(" ")[0]


def main() -> None:
    """Print the table of one trace."""
    for name, row in table(Path(sys.argv[1])).items():
        print(f"{name}: {row['cells']} cells of {row['workers']} worker(s), {row['wall']} ms of wall clock a cell")
        for kind, times in row.items():
            if isinstance(times, dict):
                print(f"  {kind:9s}", "  ".join(f"{span} {value}" for span, value in times.items()))
        print(f"  between   {row['between']}    event loop late: p50 {row['loop_late_p50']} ms,", end=" ")
        print(f"p99 {row['loop_late_p99']} ms")


if __name__ == "__main__":
    main()
