"""Monitors: what is odd is named in the step in which it happens, honest training hardly ever, and nobody is hurt."""

import math
from functools import partial

import msgspec
import pytest
from image_samples import resnet_manifest
from swarm_kit import CLIENT, Kit, assert_same_model, manifest_of, trained
from test_redundancy import Cheat, redundant
from torch import Tensor

from trainer.coordinator_ports import PeerLeft, Rerouted, StepDone, Suspicious
from trainer.manifest import TaskManifest, complete
from trainer.messages import CellDone, Message, Partial
from trainer.monitors import Monitors, Seen, Suspicion, Why
from trainer.payloads import pack, unpack
from trainer.stage import CellKey, StageLike

OWNERS = (("a", "b", "a", "b"), ("c", "d", "c", "d"), ("e", "e", "e", "e"))
LOSSES = (4.0, 4.1, 3.9, 4.0)


def seen(step: int, squares: tuple[float, ...] = (1.0, 1.0, 1.0), losses: tuple[float, ...] = LOSSES) -> Seen:
    return Seen(step, OWNERS, losses, squares)


def taught(steps: int = 10) -> Monitors:
    """Return monitors that have seen usual steps."""
    monitors = Monitors()
    for step in range(1, steps + 1):
        assert monitors.judge(seen(step)) == ()
    return monitors


def names(found: tuple[Suspicion, ...]) -> set[str]:
    return {each.peer for each in found}


@pytest.mark.parametrize(
    ("squares", "expected"),
    [
        ((1.0, 1.0, 1e12), {"e"}),  # its own gradient alone, or it would have gone down
        ((1.0, 1e12, 1.0), {"c", "d"}),
        ((1e12, 1.0, 1.0), {"a", "b", "c", "d"}),  # its own, or what came from above
        ((1e12, 1e12, 1.0), {"c", "d", "e"}),
        ((1e12, 1e12, 1e12), {"e"}),  # a spike of the whole model names one stage only
        ((1.0, 0.0, 1.0), {"c", "d"}),
        ((50.0, 50.0, 50.0), set()),
    ],
)
def test_a_gradient_of_unusual_size_names_those_who_can_have_made_it(
    squares: tuple[float, ...], expected: set[str]
) -> None:
    found = taught().judge(seen(11, squares))
    assert names(found) == expected
    assert {each.why for each in found} <= {Why.GRADIENT}


@pytest.mark.parametrize("losses", [(1.7e308, -1.7e308, 1.7e308, -1.7e308), (1e300, 4.0, 1e300, 4.0)])
def test_losses_beyond_all_bounds_end_no_run(losses: tuple[float, ...]) -> None:
    monitors = taught()
    for step in range(11, 40):
        monitors.judge(seen(step, losses=losses))
    assert math.isfinite(monitors._spread.mean)


@pytest.mark.parametrize("loss", [0.0, 9.0, 1e300, math.nan, math.inf])
def test_a_loss_far_from_the_others_names_the_route_of_its_cell(loss: float) -> None:
    found = taught().judge(seen(11, losses=(4.0, loss, 3.9, 4.0)))
    assert names(found) == {"b", "d", "e"}
    assert {each.why for each in found} == {Why.LOSS}


def test_what_lasts_becomes_usual_and_a_worker_is_not_named_in_every_step() -> None:
    monitors = taught()
    named = [step for step in range(11, 211) if monitors.judge(seen(step, (1.0, 1.0, 1e5)))]
    assert named == [11]


def test_nothing_is_odd_before_it_is_known_what_is_usual() -> None:
    monitors = Monitors()
    for step, square in enumerate((1e-6, 1e6, 0.0, 1e3), 1):
        assert monitors.judge(seen(step, (square,) * 3, (square, 1.0, 2.0, 3.0))) == ()


def timed(seconds: dict[str, float], steps: int = 40) -> set[str]:
    """Return who is named in so many steps of four cells each, of which every worker does as many as it can."""
    monitors, found = Monitors(), set()
    for step in range(steps):
        for cell, peer in enumerate(seconds):
            monitors.note_cell((step, 0, cell), peer, seconds[peer], b"")
        found |= names(monitors.judge(Seen(step, [tuple(seconds)], LOSSES[: len(seconds)])))
    return found


def test_cells_done_in_no_time_are_odd_and_unequal_machines_are_not() -> None:
    assert timed({"a": 1.0, "b": 1.0, "c": 0.05}) == {"c"}
    assert timed({"a": 1.0, "b": 4.0, "c": 4.0}) == set()


def test_a_worker_that_grows_implausibly_fast_is_named_although_nobody_is_beside_it() -> None:
    monitors, named = Monitors(), []
    for step in range(60):
        for cell in range(4):
            monitors.note_cell((step, 0, cell), "a", 1.0 if step < 30 else 0.01, b"")
        named += [step for _ in monitors.judge(Seen(step, ["aaaa"], LOSSES))]
    assert named == [37, 57]  # a whole window of short steps, and once more before that has become usual


def test_one_digest_for_two_cells_is_odd_and_for_the_same_cell_again_is_not() -> None:
    monitors = Monitors()
    for cell, digest in ((0, b"x"), (1, b"y"), (0, b"x")):
        monitors.note_cell((1, 0, cell), "a", 1.0, digest)
    monitors.note_cell((1, 0, 1), "b", 1.0, b"x")
    assert monitors.judge(seen(1)) == ()
    monitors.note_cell((2, 0, 3), "a", 1.0, b"y")
    assert monitors.judge(seen(2)) == (Suspicion(0, "a", Why.COPY),)


# in a swarm

CHEATED = 8


def spiking(what: str, by: float, stage: StageLike) -> StageLike:
    """Return a stage that multiplies one result of one cell of one step."""

    def spoil(cell: CellKey, name: str, tensor: Tensor) -> Tensor:
        return tensor * by if (name, cell.step, cell.cell) == (what, CHEATED, 1) else tensor

    return Cheat(stage, spoil)


def suspicious(kit: Kit) -> list[Suspicious]:
    return [event for event in kit.events if isinstance(event, Suspicious)]


@pytest.mark.parametrize(("what", "by"), [("gw", 1e6), ("gx", 1e6)])
@pytest.mark.parametrize("replicas", [1, 2])
def test_a_spike_in_one_cell_is_named_in_that_very_step(what: str, by: float, replicas: int) -> None:
    kit = Kit(manifest_of(stages=2, steps=10), replicas=replicas)
    kit.cheats = {"s1r0" if replicas == 1 else "s1r1": partial(spiking, what, by)}
    trained(kit)
    first = [event for event in suspicious(kit) if event.step == CHEATED]
    assert {event.peer for event in first} >= set(kit.cheats)
    assert suspicious(kit)[0].step == CHEATED
    assert not [event for event in kit.events if isinstance(event, PeerLeft | Rerouted)]
    committed = next(i for i, e in enumerate(kit.events) if isinstance(e, StepDone) and e.step == CHEATED)
    assert kit.events.index(first[0]) < committed


def test_a_copier_of_a_team_is_named() -> None:
    kit = Kit(redundant(manifest_of(stages=1, steps=2, layers=1)), replicas=3)
    carry = kit.hub.carry

    async def carry_copies(sender: str, to: str, message: Message) -> None:
        if isinstance(message, CellDone) and sender == "s0r2":
            message = msgspec.structs.replace(message, digest=bytes(32))
        await carry(sender, to, message)

    kit.hub.carry = carry_copies  # type: ignore[method-assign]
    trained(kit)
    assert [(event.peer, event.why) for event in suspicious(kit)] == [("s0r2", Why.COPY)]


STATISTICS = resnet_manifest(2, steps=3)


def running(manifest: TaskManifest, stage: int) -> slice:
    """Return where the running variances of a stage's first statistic lie."""
    layout = manifest.trained_layout(manifest.stage(stage))
    ranges = zip(layout.tensors, layout.ranges, strict=True)
    return next(slice(*place) for tensor, place in ranges if tensor.name.endswith("running_var"))


def with_statistics(by: float, stage: StageLike) -> StageLike:
    """Return a stage that falsifies the statistics of one cell, its gradients not at all."""
    place = running(STATISTICS, stage.spec.index)

    def spoil(cell: CellKey, name: str, tensor: Tensor) -> Tensor:
        if (name, cell.step) != ("gw", 2):
            return tensor
        tensor = tensor.clone()
        tensor[place] *= by
        return tensor

    return Cheat(stage, spoil)


def test_statistics_out_of_all_proportion_are_named_by_the_other_replica() -> None:
    kit = Kit(STATISTICS, cheats={"s1r1": partial(with_statistics, 1e6)})
    trained(kit)
    assert [(e.step, e.stage, e.peer, e.why) for e in suspicious(kit)] == [(2, 1, "s1r1", Why.STATISTICS)]
    honest = Kit(STATISTICS)
    trained(honest)
    assert suspicious(honest) == []


def test_statistics_that_are_not_finite_are_refused_where_they_are_made() -> None:
    kit = Kit(STATISTICS, cheats={"s1r1": partial(with_statistics, math.nan)})
    assert_same_model(trained(kit), trained(Kit(STATISTICS)))
    assert {event.peer for event in kit.events if isinstance(event, Rerouted)} == {"s1r1"}
    assert {event.why for event in suspicious(kit)} == {Why.NOT_FINITE}


def test_a_sum_with_statistics_that_are_not_finite_is_not_added() -> None:
    kit, place = Kit(STATISTICS, replicas=3), running(STATISTICS, 0)
    carry = kit.hub.carry

    async def carry_altered(sender: str, to: str, message: Message) -> None:
        if isinstance(message, Partial) and (sender, message.step) == ("s0r1", 2):
            spoilt = unpack(message.payload).clone()
            spoilt[place] = math.inf
            message = msgspec.structs.replace(message, payload=pack(spoilt))
        await carry(sender, to, message)

    kit.hub.carry = carry_altered  # type: ignore[method-assign]
    assert_same_model(trained(kit), trained(Kit(STATISTICS)))
    assert [e.peer for e in kit.events if isinstance(e, PeerLeft)] == ["s0r1"]
    assert [(e.peer, e.why) for e in suspicious(kit)] == [("s0r1", Why.NOT_FINITE)]


def of(rate: float, warmup: int, **changes: object) -> TaskManifest:
    manifest = manifest_of(stages=2, steps=40)
    optimizer = msgspec.structs.replace(manifest.optimizer, learning_rate=rate, warmup_steps=warmup)
    return complete(msgspec.structs.replace(manifest, optimizer=optimizer, **changes))


@pytest.mark.slow
@pytest.mark.parametrize(("rate", "warmup"), [(1e-3, 10), (1e-2, 10), (1e-2, 0)])
@pytest.mark.parametrize("seed", [1, 2])
def test_honest_training_on_unequal_machines_is_not_odd(rate: float, warmup: int, seed: int) -> None:
    speeds = {"s0r0": 0.01, "s0r1": 0.04, "s1r0": 0.04, "s1r1": 0.01}
    kit = Kit(of(rate, warmup, seed=seed), cell_seconds=speeds)
    trained(kit)
    assert kit.losses[-1] < 0.9 * kit.losses[0]
    assert suspicious(kit) == []


def test_a_monitor_s_word_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = manifest_of(stages=2, steps=3)
    expected = trained(Kit(manifest))
    everybody = tuple(Suspicion(stage, f"s{stage}r{r}", Why.LOSS) for stage in (0, 1) for r in (0, 1))
    monkeypatch.setattr(Monitors, "judge", lambda self, seen: everybody)
    kit = Kit(manifest)
    assert_same_model(trained(kit), expected)
    assert len(suspicious(kit)) == 3 * 4
    assert CLIENT not in {event.peer for event in suspicious(kit)}
