"""The table that `bench.support.where` makes of a trace."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench.support.where import own_times, table


def event(name: str, pid: int, tid: int, start: float, length: float, **place: int) -> dict[str, Any]:
    """Return a span in milliseconds."""
    return {"name": name, "ph": "X", "pid": pid, "tid": tid, "ts": start * 1e3, "dur": length * 1e3, "args": place}


def named(what: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    """Return the event that names a process or a thread."""
    return {"name": what, "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}


def test_what_is_inside_a_span_counts_once() -> None:
    spans = [
        event("outer", 1, 1, 0, 10),
        event("inner", 1, 1, 2, 3),
        event("innermost", 1, 1, 3, 1),
        event("next", 1, 1, 10, 4),
    ]
    assert dict(own_times(spans)) == {"outer": 7000, "inner": 2000, "innermost": 1000, "next": 4000}


def test_a_cell_costs_what_its_spans_say_and_the_rest_is_between(tmp_path: Path) -> None:
    events = [
        named("process_name", 1, 0, "client A"),
        named("process_name", 2, 0, "stage 0 B"),
        named("thread_name", 1, 1, "steps"),
        *(named("thread_name", 2, tid, name) for tid, name in enumerate(("compute", "worker", "event loop"), 1)),
        event("step", 1, 1, 0, 50, step=2),
        event("step", 1, 1, 100, 100, step=3),
        event("forward", 2, 1, 20, 10, step=2, cell=0),
        event("backward", 2, 1, 30, 10, step=2, cell=0),
    ]
    for cell, start in ((0, 100), (1, 150)):
        events += [
            event("forward", 2, 1, start, 10, step=3, cell=cell),
            event("backward", 2, 1, start + 10, 25, step=3, cell=cell),
            event("flatten gw", 2, 1, start + 30, 5, step=3, cell=cell),
            event("wait", 2, 2, start + 40, 8),
        ]
    events += [event("late", 2, 3, 110, 1), event("late", 2, 3, 130, 3), event("late", 2, 3, 140, 2)]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": events}))
    stage = table(path)["stage 0"]
    assert (stage["cells"], stage["wall"], stage["between"]) == (2, 50.0, 7.0)
    assert stage["compute"] == {"backward": 20.0, "forward": 10.0, "flatten gw": 5.0}
    assert stage["worker"] == {"wait": 8.0}
    assert stage["loop_late_p50"] == pytest.approx(2.0)
