"""What is infinite or not a number: taken from another replica once, then the run ends by name, its state good."""

import math
from collections.abc import Callable

import msgspec
import pytest
import torch
from swarm_kit import Kit, assert_same_model, manifest_of, tied_manifest, trained
from torch import Tensor

from trainer.coordinator import StepFailed
from trainer.coordinator_ports import PeerLeft, Rerouted, StepDone
from trainer.manifest import TaskManifest
from trainer.messages import Activation, Gradient, Message, Partial, Summed, Tied
from trainer.payloads import Reason, pack, unpack
from trainer.stage import Backward, CellKey, Forward, Stage, build_stage
from trainer.state import StageState, initial_state

CLIPPED = manifest_of(stages=2, steps=3)
PLAIN = msgspec.structs.replace(CLIPPED, optimizer=msgspec.structs.replace(CLIPPED.optimizer, clip=0.0))
TIED = tied_manifest(stages=2, steps=3)


class Broken:
    """A stage that spoils one result of one cell."""

    def __init__(self, stage: Stage, what: str, step: int) -> None:
        self.spec = stage.spec
        self.load, self.drop, self.evaluate = stage.load, stage.drop, stage.evaluate
        self._stage, self._what, self._step = stage, what, step

    def forward(self, cell: CellKey, x: Tensor, labels: Tensor | None) -> Forward:
        y, boundaries = self._stage.forward(cell, x, labels)
        return Forward(self._spoilt("y", cell, y), boundaries)

    def backward(self, cell: CellKey, gy: Tensor | None) -> Backward:
        gx, gw = self._stage.backward(cell, gy)
        return Backward(self._spoilt("gx", cell, gx), self._spoilt("gw", cell, gw))

    def _spoilt(self, name: str, cell: CellKey, tensor: Tensor) -> Tensor:
        if (name, cell.step) != (self._what, self._step) or not tensor.numel():
            return tensor
        tensor = tensor.clone()
        tensor.view(-1)[-1] = math.nan
        return tensor


def undisturbed(manifest: TaskManifest) -> tuple[StageState, ...]:
    return trained(Kit(manifest, replicas=1))


def break_(monkeypatch: pytest.MonkeyPatch, peers: set[str], what: str, step: int = 2) -> None:
    """Have the stages of some workers spoil a result; they are built in order of stage and replica."""
    names = iter(["s0r0", "s0r1", "s1r0", "s1r1"])

    def build(manifest: TaskManifest, index: int) -> Stage | Broken:
        stage = build_stage(manifest, index)
        return Broken(stage, what, step) if next(names) in peers else stage

    monkeypatch.setattr("swarm_kit.build_stage", build)


@pytest.mark.parametrize("manifest", [PLAIN, CLIPPED, TIED], ids=["plain", "clipped", "tied"])
@pytest.mark.parametrize(
    ("peer", "what"), [("s0r0", "y"), ("s0r1", "gw"), ("s1r0", "y"), ("s1r1", "gx"), ("s1r0", "gw")]
)
def test_a_broken_worker_s_cells_are_taken_from_another(
    manifest: TaskManifest, peer: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = undisturbed(manifest)
    break_(monkeypatch, {peer}, what)
    kit = Kit(manifest)
    assert_same_model(trained(kit), expected)
    moved = [event for event in kit.events if isinstance(event, Rerouted)]
    assert {(event.step, event.peer, event.why) for event in moved} == {(2, peer, Reason.NOT_FINITE)}
    assert len(kit.losses) == 3


@pytest.mark.parametrize("manifest", [PLAIN, TIED], ids=["plain", "tied"])
@pytest.mark.parametrize(("stage", "what"), [(0, "y"), (0, "gw"), (1, "y"), (1, "gw")])
def test_what_is_not_finite_anywhere_ends_the_run_by_name(
    manifest: TaskManifest, stage: int, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_(monkeypatch, {f"s{stage}r0", f"s{stage}r1"}, what)
    kit = Kit(manifest)
    with pytest.raises(ExceptionGroup) as failure:
        trained(kit)
    (error,) = failure.value.exceptions
    assert isinstance(error, StepFailed)
    assert (error.step, error.stage) == (2, stage)
    assert ("loss" in error.what) == ((stage, what) == (1, "y"))
    assert [event.step for event in kit.events if isinstance(event, StepDone)] == [1]
    assert {record.step for _, record in kit.records} == {1}
    for worker in kit.workers.values():
        assert max(state.step for state in worker.states) == 1


def test_a_stage_with_one_worker_ends_the_run_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    state = initial_state(CLIPPED, 1)
    weights = state.weights.clone()
    weights[0] = math.inf
    given = (initial_state(CLIPPED, 0), StageState(0, weights, state.m, state.v))
    manifest = msgspec.structs.replace(CLIPPED, initial=tuple(each.root.hex() for each in given))
    with pytest.raises(ExceptionGroup) as failure:
        trained(Kit(manifest, replicas=1, given=given))
    assert failure.group_contains(StepFailed, match="step 1, stage 1: the loss of micro-batch 0 is not finite")


def altered(kit: Kit, peer: str, kind: type[Message], change: Callable[[Message], Message]) -> None:
    """Have a worker's messages of one kind altered on the way, as a liar would."""
    carry = kit.hub.carry

    async def carry_altered(sender: str, to: str, message: Message) -> None:
        await carry(sender, to, change(message) if sender == peer and isinstance(message, kind) else message)

    kit.hub.carry = carry_altered  # type: ignore[method-assign]


def spoilt(message: Message) -> Message:
    assert isinstance(message, Activation | Gradient | Partial | Tied)
    if message.step != 2:
        return message
    return msgspec.structs.replace(message, payload=pack(torch.full_like(unpack(message.payload), math.nan)))


@pytest.mark.parametrize(("peer", "kind"), [("s0r0", Activation), ("s1r1", Gradient)])
def test_a_liar_that_sends_poison_on_does_not_stop_the_run(peer: str, kind: type[Message]) -> None:
    kit = Kit(TIED)
    altered(kit, peer, kind, spoilt)
    assert_same_model(trained(kit), undisturbed(TIED))
    moved = [event for event in kit.events if isinstance(event, Rerouted)]
    assert peer in {event.peer for event in moved}


@pytest.mark.parametrize("kind", [Partial, Tied])
@pytest.mark.parametrize("peer", ["s0r0", "s1r1"])
def test_a_liar_with_a_poisoned_sum_is_left_out(peer: str, kind: type[Message]) -> None:
    kit = Kit(TIED, replicas=3)
    altered(kit, peer, kind, spoilt)
    assert_same_model(trained(kit), undisturbed(TIED))
    left = [(event.peer, event.why) for event in kit.events if isinstance(event, PeerLeft)]
    assert left == [(peer, Reason.NOT_FINITE)]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_liar_about_the_norm_is_left_out(value: float) -> None:
    kit = Kit(CLIPPED)
    altered(kit, "s0r0", Summed, lambda message: msgspec.structs.replace(message, squares=value))
    assert_same_model(trained(kit), undisturbed(CLIPPED))
    left = [(event.peer, event.why) for event in kit.events if isinstance(event, PeerLeft)]
    assert left[0] == ("s0r0", Reason.STATE_MISMATCH)


def test_an_end_that_has_another_tied_gradient_is_left_out() -> None:
    kit = Kit(TIED)
    altered(kit, "s1r1", Summed, lambda message: msgspec.structs.replace(message, digest=bytes(32)))
    assert_same_model(trained(kit), undisturbed(TIED))
    left = [(event.peer, event.why) for event in kit.events if isinstance(event, PeerLeft)]
    assert left[0] == ("s1r1", Reason.STATE_MISMATCH)
