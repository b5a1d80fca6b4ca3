"""Swarms that start from given states instead of the seed, and states asked for while a run goes on."""

import msgspec
import pytest
import torch
from swarm_kit import Kit, assert_same_model, batches_of, manifest_of, trained

from trainer.checkpoint import Checkpoint
from trainer.coordinator import StageLost
from trainer.coordinator_ports import StepDone, SwarmEvent
from trainer.local import train_locally
from trainer.manifest import TaskManifest
from trainer.state import StageState, initial_state
from trainer.tokens import byte_tokenizer

MANIFEST = manifest_of(stages=2, steps=4)


def rest_after(steps: int) -> tuple[TaskManifest, tuple[StageState, ...]]:
    short = msgspec.structs.replace(MANIFEST, steps=steps)
    return Checkpoint(MANIFEST, trained(Kit(short, replicas=1)), byte_tokenizer()).rest()


def test_a_swarm_over_the_rest_ends_where_the_undisturbed_one_does() -> None:
    manifest, states = rest_after(2)
    kit = Kit(manifest, given=states)
    ends = trained(kit)
    whole = train_locally(MANIFEST, batches_of(MANIFEST), MANIFEST.steps)
    expected = tuple(StageState(2, *parts) for parts in cut(whole, ends))
    assert_same_model(ends, expected)
    assert [event.step for event in kit.events if isinstance(event, StepDone)] == [1, 2]


def cut(whole: StageState, like: tuple[StageState, ...]) -> list[tuple[torch.Tensor, ...]]:
    sizes = [state.weights.numel() for state in like]
    vectors = [vector.split(sizes) for vector in (whole.weights, whole.m, whole.v)]
    return list(zip(*vectors, strict=True))


@pytest.mark.parametrize("given", ["the seed's", "none"])
def test_workers_take_no_other_initial_state_than_the_manifest_names(given: str) -> None:
    manifest, _ = rest_after(2)
    others = tuple(initial_state(MANIFEST, index) for index in range(2))
    kit = Kit(manifest, replicas=1, given=() if given == "none" else others)
    with pytest.raises(ExceptionGroup) as caught:
        trained(kit)
    assert caught.group_contains(StageLost)
    assert not kit.records


def test_states_of_earlier_steps_can_be_had_while_the_run_goes_on() -> None:
    kit = Kit(manifest_of(stages=2, steps=6))
    asked: list[tuple[StageState, ...]] = []

    def on_event(event: SwarmEvent) -> None:
        kit.events.append(event)
        if isinstance(event, StepDone) and event.step == 3:
            assert kit.nursery is not None
            kit.nursery.start_soon(ask)

    async def ask() -> None:
        assert kit.coordinator.step == 3
        asked.append(await kit.coordinator.fetch_states(2))
        with pytest.raises(KeyError):
            await kit.coordinator.fetch_states(99)

    kit.report = on_event
    trained(kit)
    (states,) = asked
    assert [state.step for state in states] == [2, 2]
    assert_same_model(states, trained(Kit(manifest_of(stages=2, steps=2))))
