"""Replicas of unequal speed: each gets work by its measured speed, whatever it says of itself."""

import pytest
from swarm_kit import Kit, assert_same_model, manifest_of, trained

from trainer.coordinator_ports import Patience, PeerLeft, Rerouted, StepDone, patience_for
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
