"""What the status and the page tell of audits, on a ledger that has lived."""

from types import SimpleNamespace
from typing import cast

import pytest
from msgspec import structs

from chain.state import State, Table
from tdml_p2p.http_audits import IN_STATUS, SHOWN, audit_counts, audit_rows, evictions, recent_audits
from tests.chain.ledger_kit import KEYS, start_swarm
from tests.chain.test_queries import until_evicted


def test_disputes_come_first_with_what_was_measured_and_who_voted() -> None:
    swarm = start_swarm()
    cheat = swarm.seated(0)[0]
    swarm.deviation[cheat] = -2.0
    swarm.work(30)
    rows = recent_audits(swarm.state)
    assert 0 < len(rows) <= SHOWN
    first = rows[0]
    assert first["status"] == "convicted"
    assert first["finding"] == "fraud"
    assert first["off"].split()[2] == "τ"
    assert float(first["off"].split()[1]) > 100
    assert 0 < first["votes"] <= first["voters"]
    quiet = [row for row in rows if row["status"] == "passed"]
    assert {row["finding"] for row in quiet} <= {"match", "–"}
    counts = audit_counts(swarm.state, KEYS[0].account)
    assert counts["convicted"] >= 1
    assert counts["open"] == 0


def test_what_is_owed_is_counted() -> None:
    swarm = start_swarm()
    swarm.silent.update((key.account, "commit") for key in KEYS)
    while not swarm.ledger.happened("drawn"):
        swarm.work(1, last_step=1)
    owed = [audit_counts(swarm.state, key.account)["owed"] for key in KEYS]
    assert sum(owed) == audit_counts(swarm.state, KEYS[0].account)["open"] > 0
    assert {row["finding"] for row in recent_audits(swarm.state)} == {"–"}


@pytest.mark.parametrize("reason", ["faulted", "withheld"])
def test_an_eviction_without_slash_names_its_reason(reason: str) -> None:
    (row,) = evictions(until_evicted(reason).state)
    assert (row["reason"], row["slashed"]) == (reason, "0")


def test_the_status_shows_a_few_of_the_latest_audits_and_evictions() -> None:
    swarm = start_swarm()
    for cheat in swarm.seated(0):
        swarm.deviation[cheat] = -2.0
    swarm.work(30)
    shown = audit_rows(swarm.state, KEYS[0].account)
    assert len(swarm.state.tables[Table.AUDITS]) > IN_STATUS == len(shown["recent_audits"])
    assert shown["recent_audits"] == recent_audits(swarm.state)[:IN_STATUS]
    assert shown["evictions"] == evictions(swarm.state)
    assert {row["reason"] for row in shown["evictions"]} == {"convicted"}


def test_the_status_stays_small_however_many_were_evicted() -> None:
    state = until_evicted("withheld").state
    (one,) = state.tables[Table.CONVICTIONS].values()
    many = {bytes([number]) * 32: structs.replace(one, height=number) for number in range(3 * IN_STATUS)}
    crowded = SimpleNamespace(
        tables={**state.tables, Table.CONVICTIONS: many},
        **{name: getattr(state, name) for name in ("audit", "duties", "params", "task")},
    )
    heights = [row["height"] for row in audit_rows(cast(State, crowded), KEYS[0].account)["evictions"]]
    assert heights == [3 * IN_STATUS - 1 - number for number in range(IN_STATUS)]
