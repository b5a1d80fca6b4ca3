"""What long commands print: every kind of event as a JSON line, as a line for people, and below them the swarm."""

import io
import json
import logging
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from chain.keys import PrivateKey, peer_id
from cli.live import Swarm
from cli.report import JsonReport, TextReport, reporter
from tdml_p2p.demo import DemoConfig
from tdml_p2p.demo.network import create_network
from tdml_p2p.demo.run import Observed, _judge, _note
from tdml_p2p.logs import _StderrHandler

ROOT = Path(__file__).parent.parent.parent
ALICE, BOB, CAROL, DAVE = (peer_id(PrivateKey(bytes([i]) * 32).account) for i in range(1, 5))
NAMES = {ALICE: "peer-1", BOB: "peer-2", CAROL: "peer-3"}
TASK, AUDIT = "cd" * 32, "ab" * 32
CELL = {"audit": AUDIT, "task": TASK, "step": 5, "stage": 1, "cell": 2, "worker": BOB, "auditor": CAROL}
STEP = {
    "event": "step", "step": 3, "loss": 5.25, "tokens_per_second": 1234.5, "seconds": 0.5, "waited": 0.1,
    "bytes_sent": 2_500_000, "audits": 4, "faults": 1, "generation": 0,
}  # fmt: skip
SHARES = [
    {"stage": 0, "peer": ALICE, "cells": 6, "cells_per_second": 2.5},
    {"stage": 0, "peer": BOB, "cells": 2, "cells_per_second": 0.75},
    {"stage": 1, "peer": CAROL, "cells": 0, "cells_per_second": 1.0},
]
RESULT = {
    "event": "result", "ok": True, "loss_first": 8.1, "loss_last": 5.2, "evicted": [BOB], "expected": [BOB],
    "audits": 40, "seconds": {"start": 11.2, "train": 90.7}, "out": "demo-out",
}  # fmt: skip


def chain(kind: str, height: int = 31, **data: Any) -> dict[str, Any]:
    return {"event": "chain", "height": height, "time": 1, "kind": kind, "data": data, "names": NAMES}


LINES: list[tuple[dict[str, Any], list[str]]] = [
    (
        {"event": "ready", "peer": ALICE, "invite": "/ip4/x@y", "status_url": "http://127.0.0.1:1/", "height": 0},
        [f"peer    {ALICE}", "invite  /ip4/x@y", "status  http://127.0.0.1:1/", "height  0"],
    ),
    (
        {"event": "ready", "peer": ALICE, "invite": "/ip4/x@y", "status_url": None, "height": 7},
        [f"peer    {ALICE}", "invite  /ip4/x@y", "height  7"],
    ),
    (
        {"event": "peer", "name": "peer-9", "role": "worker", "peer": DAVE, "height": 2},
        [f"peer-9  …{DAVE[-8:]}  worker"],
    ),
    ({"event": "network", "peers": 6, "seconds": 12.34}, ["network of 6 peers ready after 12.3 s"]),
    ({"event": "posted", "task": TASK, "resumed": False, "step": 0}, ["posted  task cdcdcdcdcdcd"]),
    ({"event": "posted", "task": TASK, "resumed": True, "step": 9}, ["posted  task cdcdcdcdcdcd (resumed)"]),
    (
        {"event": "formed", "stages": [[ALICE, BOB], [CAROL]], "steps": 40},
        [f"stage 0  …{ALICE[-8:]}  …{BOB[-8:]}", f"stage 1  …{CAROL[-8:]}"],
    ),
    (STEP, ["step     3  loss 5.2500    1,234 tok/s  0.50 s  2.5 MB  audits 4  faults 1"]),
    (
        STEP | {"learning_rate": 1e-3, "shares": SHARES},
        ["step     3  loss 5.2500    1,234 tok/s  0.50 s  2.5 MB  audits 4  faults 1  peers 2"],
    ),
    (
        {"event": "moved", "task": TASK, "step": 4},
        ["moved   a stage lost its last peer: a new task goes on after step 4"],
    ),
    ({"event": "abandoned", "task": TASK}, ["closed  task cdcdcdcdcdcd, which a killed run had left open"]),
    (
        {"event": "alone", "step": 4, "stage": 1, "peer": BOB},
        [f"alone   …{BOB[-8:]} is the only peer of stage 1 now"],
    ),
    ({"event": "validation", "step": 3, "loss": 5.5, "reason": ""}, ["step     3  validation loss 5.5000"]),
    (
        {"event": "validation", "step": 3, "loss": None, "reason": "a worker was lost"},
        ["step     3  not validated: a worker was lost"],
    ),
    (STEP | {"loss": math.nan}, ["step     3  loss nan    1,234 tok/s  0.50 s  2.5 MB  audits 4  faults 1"]),
    (STEP | {"loss": None}, ["step     3  loss nan    1,234 tok/s  0.50 s  2.5 MB  audits 4  faults 1"]),
    (chain("passed", **CELL), []),
    (chain("claimed", worker=BOB), []),
    (
        chain("disputed", **CELL, deviations=[0.5, 2e-6, 1.0]),
        [
            "  block   31  disputed   audit abababab  step 5  stage 1  cell 2  worker peer-2  auditor peer-3  "
            "deviations 0.5/2e-06/1"
        ],
    ),
    (
        chain("ballot", audit=AUDIT, by=CAROL, ballot="against-worker", contradiction=False),
        ["  block   31  ballot     audit abababab  votes ✕  by peer-3  ballot against-worker  contradiction no"],
    ),
    (
        chain("evicted", task=TASK, worker=BOB, step=5, evidence=AUDIT, stage=1, reason="convicted"),
        ["  block   31  evicted    audit abababab  worker peer-2  step 5  stage 1  reason convicted"],
    ),
    (
        chain("slashed", task=TASK, worker=DAVE, evidence=AUDIT, amount="10", reward="2"),
        [f"  block   31  slashed    audit abababab  worker …{DAVE[-8:]}  amount 10  reward 2"],
    ),
    (chain("posted", task=TASK, client=ALICE, steps=8), ["  block   31  posted     client peer-1  steps 8"]),
    (
        {"event": "rerouted", "step": 4, "stage": 1, "peer": BOB, "cells": [1, 3], "reason": "lost"},
        [f"rerouted step 4: stage 1 cells 1, 3 from …{BOB[-8:]} to other replicas, lost"],
    ),
    (
        {"event": "outvoted", "step": 4, "stage": 1, "peer": BOB, "cells": [1, 3]},
        [
            f"outvoted step 4: …{BOB[-8:]} of stage 1 had other results of cells 1, 3 than most of its team;"
            " theirs went on, and all that it claims is audited"
        ],
    ),
    (
        {"event": "suspicious", "step": 4, "stage": 1, "peer": BOB, "reason": "a gradient of unusual size"},
        [
            f"odd     …{BOB[-8:]} of stage 1 in step 4: a gradient of unusual size;"
            " that proves nothing, all that it claims is audited for a while"
        ],
    ),
    (
        {"event": "split", "step": 4, "stage": 0, "peers": [ALICE, BOB]},
        [
            f"split   …{ALICE[-8:]}, …{BOB[-8:]} of stage 0 have no majority in step 4: it begins again"
            " with others; peers of one machine type and `--threads` agree bit for bit"
        ],
    ),
    (
        {"event": "rollback", "generation": 1, "step": 4},
        ["back to step 4, the newest all of whose audits passed"],
    ),
    (
        {"event": "left", "step": 4, "stage": 0, "peer": BOB, "reason": "gone"},
        [f"lost    …{BOB[-8:]} of stage 0 in step 4: gone"],
    ),
    (
        {"event": "joined", "step": 4, "stage": 0, "peer": DAVE, "reason": ""},
        [f"joined  …{DAVE[-8:]} in stage 0 for step 4"],
    ),
    ({"event": "waiting", "step": 4, "stage": 1}, ["waiting step 4: nobody holds stage 1, a peer must join"]),
    (
        {"event": "evicted", "peer": BOB, "task": TASK, "step": 5, "reason": "convicted", "evidence": AUDIT},
        [f"evicted …{BOB[-8:]} at step 5: convicted, evidence abababababab"],
    ),
    ({"event": "not-saved", "reason": "The disk is full.", "hint": "free some"},
     ["not-saved reason The disk is full.  hint free some"]),
    ({"event": "unverified", "step": 4, "reason": "its audits had not ended"},
     ["unverified step 4  reason its audits had not ended"]),
    ({"event": "saved", "out": "out", "step": 50}, ["saved   step 50 in out"]),
    (
        {"event": "done", "out": "out", "task": TASK, "steps": 50, "loss": 3.21},
        ["done    50 steps, loss 3.2100, model in out"],
    ),
    (
        {"event": "done", "out": "out", "task": TASK, "steps": 50, "loss": None},
        ["done    50 steps, loss nan, model in out"],
    ),
    (
        RESULT,
        [
            "loss 8.100 → 5.200  audits 40",
            f"evicted …{BOB[-8:]}; the cheat is …{BOB[-8:]}",
            "time    start 11 s  train 91 s",
            "model   demo-out   (try: tdml-peer generate --model demo-out --prompt 'def ')",
            "chain   tdml-chain evidence --db demo-out/chain.db",
        ],
    ),
    (
        RESULT | {"ok": False, "evicted": [], "expected": [], "seconds": {}},
        [
            "loss 8.100 → 5.200  audits 40",
            "evicted nobody; the cheat is nobody",
            "time",
            "model   demo-out   (try: tdml-peer generate --model demo-out --prompt 'def ')",
            "chain   tdml-chain evidence --db demo-out/chain.db",
        ],
    ),
]  # fmt: skip
EVENTS = [event for event, _ in LINES]


def printed(*events: dict[str, Any], is_terminal: bool = False, width: int = 160) -> str:
    """Return what a text report writes."""
    file = io.StringIO()
    report = TextReport(Console(file=file, force_terminal=is_terminal, highlight=False, width=width, color_system=None))
    for event in events:
        report(event)
    report.close()
    return file.getvalue()


def test_the_samples_are_all_events_there_are() -> None:
    source = "".join(path.read_text() for path in (ROOT / "tdml_p2p").rglob("*.py"))
    named = set(re.findall(r'"event": "([a-z-]+)"', source)) | set(re.findall(r'_report_peer\("([a-z-]+)"', source))
    assert {event["event"] for event in EVENTS} == named
    assert len(named) > 12


@pytest.mark.parametrize(("event", "lines"), LINES)
def test_a_line_for_people(event: dict[str, Any], lines: list[str]) -> None:
    assert [line.rstrip() for line in printed(event).splitlines()] == lines


@pytest.mark.parametrize("event", EVENTS)
def test_a_line_for_scripts(event: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    JsonReport(clock=lambda: 12.34567)(event)
    [line] = capsys.readouterr().out.splitlines()
    found = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    expected = {"time": 12.346, **event}
    if isinstance(event.get("loss"), float) and math.isnan(event["loss"]):
        expected["loss"] = None
    assert found == expected
    assert next(iter(found)) == "event"


def test_what_json_has_no_numbers_for_is_null(capsys: pytest.CaptureFixture[str]) -> None:
    inner = {"a": [1.5, math.inf, (-math.inf, math.nan)], "b": {"c": math.nan}, "d": "nan"}
    JsonReport(clock=lambda: 0.0)({"event": "chain", "data": inner})
    found = json.loads(capsys.readouterr().out)
    assert found == {
        "event": "chain",
        "time": 0.0,
        "data": {"a": [1.5, None, [None, None]], "b": {"c": None}, "d": "nan"},
    }


def test_names_are_remembered() -> None:
    said = printed(
        {"event": "peer", "name": "attic", "role": "worker", "peer": DAVE, "height": 2},
        {"event": "left", "step": 4, "stage": 0, "peer": DAVE, "reason": "gone"},
    )
    assert "lost    attic of stage 0" in said.splitlines()[1]


def test_ballots_add_up_to_the_votes_of_their_audit() -> None:
    ballots = ("against-worker", "against-neither", "against-auditor", "against-both", "something-new")
    events = [chain("ballot", audit=AUDIT, by=CAROL, ballot=ballot) for ballot in ballots]
    other = chain("ballot", audit=TASK, by=CAROL, ballot="against-worker")
    lines = printed(*events, other, chain("convicted", **CELL)).splitlines()
    votes = [found.group(1) for line in lines if (found := re.search(r"votes (\S+)", line))]
    assert votes == ["✕", "✕✓", "✕✓✓", "✕✓✓✕", "✕✓✓✕·", "✕", "✕✓✓✕·"]


def test_names_are_not_taken_for_markup() -> None:
    odd = chain("posted", client=ALICE) | {"names": {ALICE: "[red]x[/red] :smile:"}}
    assert "client [red]x[/red] :smile:" in printed(odd)
    formed = printed(odd, {"event": "formed", "stages": [[ALICE]], "steps": 1})
    assert "stage 0  [red]x[/red] :smile:" in formed


def test_long_lines_are_not_broken_and_nothing_is_drawn_where_no_terminal_is() -> None:
    formed = {"event": "formed", "stages": [[ALICE, BOB], [CAROL]], "steps": 40}
    said = printed(formed, STEP, {"event": "saved", "out": "x" * 300, "step": 3})
    assert "\x1b" not in said
    assert f"saved   step 3 in {'x' * 300}" in said.splitlines()


FORMED = {"event": "formed", "stages": [[ALICE, BOB], [CAROL]], "steps": 40}
RUN = [
    chain("posted", client=ALICE),
    FORMED,
    STEP,
    chain("passed", **CELL | {"worker": ALICE}),
    chain("disputed", **CELL),
    {"event": "joined", "step": 4, "stage": 1, "peer": DAVE, "reason": ""},
    chain("evicted", task=TASK, worker=BOB, step=5, evidence=AUDIT, stage=0, reason="convicted"),
    {"event": "left", "step": 6, "stage": 1, "peer": CAROL, "reason": "gone"},
]


def test_a_terminal_has_the_swarm_and_a_bar_below_the_lines() -> None:
    last = printed(*RUN, is_terminal=True, width=100).split("block   31  evicted")[-1]
    assert re.search(r"stage 0 +peer-1 ✓1 +peer-2 evicted", last)
    assert re.search(rf"stage 1 +peer-3 lost +…{DAVE[-8:]} joined", last)
    assert re.search(r"training .*3/40 +eta 0:00:22", last)


def test_the_table_shows_shares_and_speeds_and_the_bar_goes_back_after_a_rollback() -> None:
    steps = [STEP | {"step": number, "shares": SHARES, "seconds": 1.0, "waited": 0.0} for number in (9, 10)]
    text = printed(chain("posted", client=ALICE), FORMED, *steps, is_terminal=True, width=100).split("step    10")[-1]
    assert re.search(r"stage 0 +peer-1 75% 2.5/s +peer-2 25% 0.8/s", text)
    assert re.search(r"stage 1 +peer-3 idle", text)
    assert re.search(r"training .*10/40 +eta 0:00:30", text)
    back = printed(FORMED, *steps, {"event": "rollback", "generation": 1, "step": 4}, is_terminal=True, width=100)
    assert re.search(r"training .*4/40 +eta 0:00:36", back.split("back to step 4")[-1])


def test_a_terminal_is_left_as_it_was() -> None:
    for events in (RUN, [*RUN, {"event": "done", "out": "o", "task": TASK, "steps": 3, "loss": 1.0}], RUN[:1], []):
        said = printed(*events, is_terminal=True)
        assert said.count("\x1b[?25l") == said.count("\x1b[?25h")
        assert said.rfind("\x1b[?25h") >= said.rfind("\x1b[?25l")


@pytest.mark.parametrize("is_shared", [True, False])
def test_logs_go_above_the_view_only_where_they_share_its_terminal(
    is_shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown, errors = io.StringIO(), io.StringIO()
    errors.isatty = lambda: is_shared  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", errors)
    logger, handler = logging.getLogger("tdml.view"), _StderrHandler()
    logger.addHandler(handler)
    try:
        report = TextReport(Console(file=shown, force_terminal=True, width=100, color_system=None))
        logger.warning("before")
        report(FORMED)
        logger.warning("meanwhile")
        report.close()
        logger.warning("after")
    finally:
        logger.removeHandler(handler)
    assert ("meanwhile" in shown.getvalue()) is is_shared
    assert errors.getvalue().split() == (["before", "after"] if is_shared else ["before", "meanwhile", "after"])


@pytest.mark.parametrize("event", EVENTS)
def test_every_event_can_be_drawn_on_a_narrow_terminal(event: dict[str, Any]) -> None:
    assert printed(FORMED, event, is_terminal=True, width=40)


def test_a_new_generation_forgets_who_has_gone() -> None:
    swarm = Swarm()
    for event in (*RUN, FORMED):
        swarm.note(event)
    assert (swarm.stages, swarm.gone) == ([[ALICE, BOB], [CAROL]], {})
    assert (swarm.passed[ALICE], swarm.disputed[BOB]) == (1, 1)


def test_a_peer_that_comes_back_has_one_place() -> None:
    swarm = Swarm()
    for event in (
        FORMED,
        {"event": "left", "step": 4, "stage": 1, "peer": CAROL, "reason": "gone"},
        {"event": "joined", "step": 5, "stage": 1, "peer": CAROL, "reason": ""},
        {"event": "joined", "step": 5, "stage": 9, "peer": DAVE, "reason": ""},
    ):
        swarm.note(event)
    assert (swarm.stages, swarm.gone) == ([[ALICE, BOB], [CAROL]], {})


def test_a_demonstration_whose_loss_is_no_number_has_not_learned(tmp_path: Path) -> None:
    observed = Observed(is_done=True)
    for loss in (8.0, 8.0, 8.0, 5.0, 5.0, None):
        _note({"event": "step", "loss": loss}, observed)
    told: list[dict[str, Any]] = []
    network = create_network(tmp_path, 6, 4)
    code = _judge(DemoConfig(6, 40, "none", tmp_path), network, observed, told.append, {})
    assert (code, told[0]["ok"], told[0]["loss_first"]) == (1, False, 8.0)
    assert "8.000 → nan" in printed(told[0])


def test_which_report_a_command_has(capsys: pytest.CaptureFixture[str]) -> None:
    assert isinstance(reporter(True), JsonReport)
    report = reporter(False)
    assert isinstance(report, TextReport)
    report(STEP)
    report.close()
    assert capsys.readouterr().out.startswith("step     3  loss 5.2500")
