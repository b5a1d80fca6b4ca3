"""Warnings and the reachability verdict: each appears when it should and never on a healthy peer."""

from dataclasses import replace

import pytest

from tdml_p2p.health import LAG_BLOCKS, STALL_SECONDS, Vitals, WarningCode, warnings
from tdml_p2p.reachability import Verdict, judge

HEALTHY = Vitals(
    uptime=60.0, peers=3, height=50, best_height=50, block_age=4.0, powers=(10, 10, 10, 10), is_reachable=True
)


def codes(vitals: Vitals) -> list[WarningCode]:
    return [warn.code for warn in warnings(vitals)]


def test_a_healthy_peer_warns_of_nothing() -> None:
    assert codes(HEALTHY) == []


@pytest.mark.parametrize(
    ("vitals", "code"),
    [
        (replace(HEALTHY, peers=0), WarningCode.ALONE),
        (replace(HEALTHY, old_tip="The newest block here is 3 days old."), WarningCode.OLD_TIP),
        (replace(HEALTHY, clock_behind=61.0), WarningCode.SLOW_CLOCK),
        (replace(HEALTHY, block_age=STALL_SECONDS), WarningCode.STALLED),
        (replace(HEALTHY, halted="A third of the stake is gone."), WarningCode.HALTED),
        (replace(HEALTHY, best_height=50 + LAG_BLOCKS), WarningCode.FALLING_BEHIND),
        (replace(HEALTHY, powers=(10, 10, 10)), WarningCode.ONE_OWNER),
        (replace(HEALTHY, powers=(16, 10, 10, 10)), WarningCode.ONE_OWNER),
        (replace(HEALTHY, is_jailed=True), WarningCode.JAILED),
        (replace(HEALTHY, is_reachable=False), WarningCode.UNREACHABLE),
    ],
)
def test_each_trouble_has_one_warning_with_a_hint(vitals: Vitals, code: WarningCode) -> None:
    found = warnings(vitals)
    assert [warn.code for warn in found] == [code]
    assert found[0].message.endswith(".")
    assert found[0].hint


@pytest.mark.parametrize(
    "vitals",
    [
        replace(HEALTHY, peers=0, uptime=5.0),
        replace(HEALTHY, block_age=STALL_SECONDS - 0.1),
        replace(HEALTHY, best_height=50 + LAG_BLOCKS - 1),
        replace(HEALTHY, powers=(15, 10, 10, 10)),
        replace(HEALTHY, block_age=None),
    ],
)
def test_no_warning_just_below_a_threshold(vitals: Vitals) -> None:
    assert codes(vitals) == []


def test_a_halt_is_not_called_a_stall_as_well() -> None:
    assert codes(replace(HEALTHY, halted="x", block_age=999.0)) == [WarningCode.HALTED]


@pytest.mark.parametrize(
    ("addresses", "inbound", "verdict"),
    [
        (("/ip4/127.0.0.1/tcp/4001",), 3, Verdict.LOCAL),
        (("/ip4/127.0.0.1/tcp/4001", "/ip4/10.0.0.5/tcp/4001"), 0, Verdict.UNKNOWN),
        (("/ip4/10.0.0.5/tcp/4001",), 2, Verdict.REACHABLE),
        (("/dns4/a.example/tcp/4001",), 0, Verdict.UNKNOWN),
        (("nonsense",), 0, Verdict.UNKNOWN),
        ((), 0, Verdict.UNKNOWN),
    ],
)
def test_reachability_is_judged_by_who_connected(addresses: tuple[str, ...], inbound: int, verdict: Verdict) -> None:
    found = judge(addresses, inbound)
    assert found.verdict is verdict
    assert bool(found.steps) == (verdict is not Verdict.REACHABLE)


def test_the_steps_name_the_port_to_open() -> None:
    assert "4242" in judge(("/ip4/10.0.0.5/tcp/4242",), 0).steps[1]
