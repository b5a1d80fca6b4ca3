"""Replicas of unequal speed: each gets work by its measured speed, whatever it says of itself."""

from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
from swarm_kit import Kit, assert_same_model, manifest_of, trained

from trainer.coordinator_pace import Verified
from trainer.coordinator_ports import Patience, PeerLeft, Rerouted, Settled, StepDone, patience_for
from trainer.manifest import TaskManifest
from trainer.messages import CellDone, Message

FAST, WARM_UP = 1.0, 3
MANIFEST = manifest_of(stages=1, steps=7, microbatches=20, layers=1)


def steady(kit: Kit) -> list[float]:
    """Return the seconds of the steps after those in which speeds are learned."""
    return [event.seconds for event in kit.events if isinstance(event, StepDone)][WARM_UP:]


@pytest.mark.parametrize("slowness", [2.0, 4.0])
def test_a_slow_replica_gets_so_much_that_hardly_any_speed_is_lost(slowness: float) -> None:
    kit = Kit(MANIFEST, cell_seconds={"s0r0": FAST, "s0r1": slowness * FAST})
    trained(kit)
    ideal = MANIFEST.microbatches / (1 / FAST + 1 / (slowness * FAST))
    # in the kit loading, summing, averaging, the norm and applying take as long as a cell each
    cells = [seconds - 5 * slowness * FAST for seconds in steady(kit)]
    assert ideal / (sum(cells) / len(cells)) > 0.85
    assert not [event for event in kit.events if isinstance(event, PeerLeft | Rerouted)]


def test_a_worker_s_own_word_on_its_speed_counts_for_nothing() -> None:
    kit = Kit(MANIFEST, cell_seconds={"s0r0": FAST, "s0r1": 4 * FAST})
    carry = kit.hub.carry

    async def carry_lies(sender: str, to: str, message: Message) -> None:
        if isinstance(message, CellDone):
            at = (message.generation, message.step, message.cell, message.stage)
            seconds = 1e-3 if sender == "s0r1" else 1e3
            message = CellDone(*at, message.loss, seconds)
        await carry(sender, to, message)

    kit.hub.carry = carry_lies  # type: ignore[method-assign]
    honest = Kit(MANIFEST, cell_seconds=kit.cell_seconds)
    assert_same_model(trained(kit), trained(honest))
    assert steady(kit) == pytest.approx(steady(honest))


def test_a_worker_that_grows_slower_gets_less_from_then_on() -> None:
    kit = Kit(MANIFEST, cell_seconds={"s0r0": FAST, "s0r1": FAST})

    def tire() -> None:
        kit.cell_seconds["s0r1"] = 4 * FAST

    kit.governor.hooks[3] = tire
    trained(kit)
    shares = [{s.peer: s.cells for s in event.shares} for event in kit.events if isinstance(event, StepDone)]
    assert shares[1]["s0r1"] == MANIFEST.microbatches // 2
    assert shares[-1]["s0r1"] <= MANIFEST.microbatches // 4


def test_a_big_model_on_slow_machines_trips_no_deadline_in_its_first_steps() -> None:
    everyone = ("s0r0", "s0r1", "s1r0", "s1r1")
    manifest = manifest_of(stages=2, steps=2)
    kit = Kit(manifest, cell_seconds=dict.fromkeys(everyone, 45.0), patience=patience_for(50_000_000, 1024))
    trained(kit)
    assert not [event for event in kit.events if isinstance(event, PeerLeft | Rerouted)]


def test_deadlines_grow_with_the_model_and_never_shrink() -> None:
    small, large = patience_for(1000, 16), patience_for(100_000_000, 1024)
    assert (small.first, small.join) == (Patience().first, Patience().join)
    assert large.first == pytest.approx(6e8 * 1024 / 5e8)
    assert large.join == pytest.approx(600.0)


def settling(kit: Kit, manifest: TaskManifest, unverified: tuple[str, ...] = (), lag: int = 2) -> Kit:
    """Have the chain settle every step `lag` steps later, but no cell of those who are not verified."""

    def settle(newest: int) -> None:
        cells = Counter({peer: 0 for stage in kit.governor.members.stages for peer in stage})
        for peer, record in kit.records:
            if record.step <= newest and peer not in unverified:
                cells[peer] += len(record.cells)
        kit.governor.members = replace(kit.governor.members, settled=Settled(newest, cells))

    for step in range(1, manifest.steps + 1):
        kit.governor.hooks[step] = partial(settle, max(0, step - lag))
    return kit


def last_cells(kit: Kit) -> dict[str, int]:
    """Return how many cells each replica did in the last step."""
    return {s.peer: s.cells for s in [event for event in kit.events if isinstance(event, StepDone)][-1].shares}


@pytest.mark.parametrize("slowness", [1.0, 4.0])
def test_where_all_is_verified_speed_alone_decides(slowness: float) -> None:
    speeds = {"s0r0": FAST, "s0r1": slowness * FAST}
    plain, kit = Kit(MANIFEST, cell_seconds=speeds), settling(Kit(MANIFEST, cell_seconds=speeds), MANIFEST)
    assert_same_model(trained(kit), trained(plain))
    share, usual = last_cells(kit)["s0r1"], last_cells(plain)["s0r1"]
    assert share == pytest.approx(usual, abs=1)


def test_who_has_nothing_to_show_for_its_speed_gets_less_and_never_nothing() -> None:
    manifest = manifest_of(stages=1, steps=12, microbatches=20, layers=1)
    speeds = {"s0r0": FAST, "s0r1": FAST}
    kit = settling(Kit(manifest, cell_seconds=speeds), manifest, unverified=("s0r1",))
    assert_same_model(trained(kit), trained(Kit(manifest, cell_seconds=speeds)))
    assert 1 <= last_cells(kit)["s0r1"] <= manifest.microbatches // 5


def test_the_verified_share_counts_settled_steps_and_nothing_that_a_rollback_voids() -> None:
    verified = Verified()
    assert verified.share("the client's own end") == 1.0
    verified.update(Settled(0, {"a": 0, "b": 0}))
    assert verified.share("a") == 0.5
    for step in range(1, 11):
        verified.note(step, {"a": 10, "b": 10})
    assert verified.share("a") == 0.5  # nothing is due yet
    verified.update(Settled(5, {"a": 50, "b": 0}))
    assert verified.share("a") > 0.9
    assert 0.05 <= verified.share("b") < 0.1
    for step in range(6, 11):  # done again
        verified.note(step, {"a": 20, "b": 0})
    verified.update(Settled(10, {"a": 150, "b": 0}))
    assert verified.share("a") > 0.95
    verified.update(Settled(10, {"a": 9000, "b": 0}))
    assert verified.share("a") == 1.0
