"""Whichever workers die or stall on the way, the swarm trains the same model and counts every cell once."""

from functools import lru_cache

import pytest
from swarm_kit import Kit, assert_same_model, manifest_of, trained

from trainer.coordinator import StageLost
from trainer.coordinator_ports import PeerJoined, PeerLeft, Rerouted
from trainer.messages import Activation, CellDone, Gradient, Message, Partial, Passed, Reduced
from trainer.state import StageState
from trainer.transport import Faults

MANIFEST = manifest_of(stages=2, steps=4)


@lru_cache
def undisturbed() -> tuple[tuple[StageState, ...], list[float]]:
    kit = Kit(MANIFEST)
    return trained(kit), kit.losses


def assert_undisturbed(kit: Kit) -> None:
    states, losses = undisturbed()
    assert_same_model(trained(kit), states)
    assert kit.losses == pytest.approx(losses, rel=1e-5)


PHASES: list[tuple[str, str, type[Message], int, bool]] = [
    ("forward", "s0r1", Activation, 3, True),
    ("forward-sent", "s0r1", Activation, 3, False),
    ("passed", "s0r1", Passed, 4, False),
    ("backward", "s1r1", Gradient, 3, True),
    ("backward-sent", "s1r1", Gradient, 3, False),
    ("done", "s1r1", CellDone, 4, False),
    ("all-done", "s0r1", CellDone, 4, False),
    ("partial-unsent", "s0r1", Partial, 2, True),
    ("partial-sent", "s0r1", Partial, 2, False),
    ("partial-sent-last-stage", "s1r1", Partial, 2, False),
    ("reduced-unsent", "s1r1", Reduced, 2, True),
    ("before-commit", "s0r1", Reduced, 2, False),
]


@pytest.mark.parametrize(("peer", "of", "after", "before"), [p[1:] for p in PHASES], ids=[p[0] for p in PHASES])
def test_a_worker_killed_in_any_phase_changes_nothing(peer: str, of: type[Message], after: int, before: bool) -> None:
    kit = Kit(MANIFEST, faults=Faults().crash(peer, after=after, of=of, before=before))
    assert_undisturbed(kit)
    gone = [event for event in kit.events if isinstance(event, PeerLeft)]
    assert [(event.peer, event.why) for event in gone] == [(peer, "lost")]


def test_two_deaths_in_one_step() -> None:
    faults = Faults().crash("s0r0", after=3, of=Activation).crash("s1r0", after=3, of=Gradient)
    assert_undisturbed(Kit(MANIFEST, faults=faults))


def test_two_of_three_replicas_die_one_after_the_other() -> None:
    faults = Faults().crash("s1r0", after=2, of=Gradient).crash("s1r1", after=3, of=CellDone)
    assert_undisturbed(Kit(MANIFEST, replicas=3, faults=faults))


def test_a_slow_worker_is_rerouted_and_gets_less() -> None:
    kit = Kit(MANIFEST, cell_seconds={"s0r1": 15.0})
    assert_undisturbed(kit)
    rerouted = [event for event in kit.events if isinstance(event, Rerouted)]
    assert {(event.peer, event.why) for event in rerouted} == {("s0r1", "slow")}
    cells = [len(r.cells) for peer, r in kit.records if peer == "s0r1"]
    assert sum(cells) < 4


def test_a_slow_link_between_neighbours_is_only_slow() -> None:
    faults = Faults().delay("s0r0", "s1r0", 3.0).delay("s1r1", "s0r1", 3.0)
    kit = Kit(MANIFEST, faults=faults)
    assert_undisturbed(kit)
    assert not [event for event in kit.events if isinstance(event, PeerLeft | Rerouted)]


def test_a_broken_link_between_neighbours_is_bypassed() -> None:
    kit = Kit(MANIFEST, faults=Faults().cut("s0r0", "s1r0"))
    assert_undisturbed(kit)
    assert not [event for event in kit.events if isinstance(event, PeerLeft)]


def test_a_broken_link_between_replicas_leaves_one_out() -> None:
    kit = Kit(MANIFEST, faults=Faults().cut("s0r0", "s0r1"))
    assert_undisturbed(kit)


def test_a_killed_worker_that_returns_empty_handed_joins_again() -> None:
    kit = Kit(manifest_of(stages=2, steps=6), faults=Faults().crash("s0r1", after=2, of=Activation))
    kit.governor.hooks[3] = lambda: kit.start("s0r1", 0)
    trained(kit)
    joined = [event.step for event in kit.events if isinstance(event, PeerJoined) and event.peer == "s0r1"]
    assert joined[0] == 1
    assert joined[-1] >= 3
    assert [r.step for peer, r in kit.records if peer == "s0r1"][-1] == 6
    assert kit.workers["s0r1"].states[-1].root == kit.workers["s0r0"].states[-1].root


def test_a_stage_without_workers_ends_the_run_by_name() -> None:
    faults = Faults().crash("s1r0", after=1, of=CellDone).crash("s1r1", after=1, of=CellDone)
    kit = Kit(MANIFEST, faults=faults)
    with pytest.raises(ExceptionGroup) as failure:
        trained(kit)
    assert failure.group_contains(StageLost)
