"""What a seat asks of memory: the parts that bench.memory measures, for the seat that the chain may draw."""

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from msgspec.structs import replace

from tests.trainer.image_samples import resnet_manifest
from tests.trainer.training_samples import small_manifest
from trainer import messages as m
from trainer.footprint import DEPTH, available_bytes, depth_of, footprint, largest, why_not
from trainer.manifest import TaskManifest, complete
from trainer.payloads import Dtype, TensorPayload, pack
from trainer.presets import preset_of
from trainer.stage import build_stage, stage_layout
from trainer.state import initial_state
from trainer.tensor_shapes import Form, gradient_of, input_of
from trainer.transport import Received
from trainer.worker_compute import StageComputer
from trainer.worker_ports import T, WorkerConfig, WorkerPorts
from trainer.worker_seat import Seat
from trainer.worker_step import StepWork

MANIFEST = small_manifest(stages=2)


async def at_once(work: Callable[[], T], /) -> T:
    return work()


def inputs_of(manifest: TaskManifest, stage: int, cell: int) -> list[tuple[str, m.Message]]:
    """Return what a stage is sent of a cell, with the senders."""

    def payload(form: Form) -> tuple[TensorPayload]:
        is_real = form.dtype is not Dtype.INT32
        return pack(torch.rand(form.shape) if is_real else torch.ones(form.shape, dtype=torch.int32), form.dtype)

    into, out = payload(input_of(manifest, stage)), payload(gradient_of(manifest, stage))
    is_last = stage == manifest.stages - 1
    return [
        ("p0", m.Activation(0, 1, cell, stage - 1, into)) if stage else ("client", m.Tokens(0, 1, cell, into)),
        ("client", m.Labels(0, 1, cell, out)) if is_last else ("p2", m.Gradient(0, 1, cell, stage + 1, out)),
    ]


async def filled(manifest: TaskManifest, stage: int) -> StepWork:
    """Return a step all of whose cells a real seat of a stage has finished."""
    config = WorkerConfig("client", build_stage(manifest, stage), manifest, ring_depth=4)
    ports = WorkerPorts(at_once, cast(Any, None), cast(Any, None))
    seat, computer = Seat(config, "p1", lambda _to, _message: None), StageComputer(config, ports)
    seat.current = initial_state(manifest, stage)
    await computer.load(seat.current)
    route = tuple("p0" if other < stage else "p1" if other == stage else "p2" for other in range(manifest.stages))
    seat.take(Received("client", m.OpenStep(0, 1, (route,) * manifest.microbatches)))
    assert seat.work is not None
    for cell in range(manifest.microbatches):
        for sender, message in inputs_of(manifest, stage, cell):
            seat.take(Received(sender, message))
        while (ready := seat.work.next()) is not None:
            seat.computed(seat.work, ready[0], *await computer.run(seat.work, *ready))
    assert not seat.refused
    assert all(found.gw is not None for found in seat.work.cells.values())
    return seat.work


@pytest.mark.parametrize("compression", ["none", "bf16", "int8"])
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("draft", [small_manifest(stages=3), resnet_manifest(3)], ids=["text", "images"])
async def test_a_step_takes_what_a_full_one_holds(draft: TaskManifest, stage: int, compression: str) -> None:
    manifest = replace(draft, replicas=1, compression=compression)
    assert footprint(manifest, stage).step == (await filled(manifest, stage)).nbytes


async def test_a_step_of_a_single_stage_is_one_too() -> None:
    manifest = small_manifest(replicas=1)
    assert footprint(manifest, 0).step == (await filled(manifest, 0)).nbytes


def test_the_parts_add_up() -> None:
    weights = 4 * stage_layout(MANIFEST, 0).total
    found = footprint(MANIFEST, 0)
    assert found.resident == weights * (1 + 3 * (2 + MANIFEST.audit.depth) + 2)
    assert found.total == found.step + found.resident


def test_replicas_share_a_step_and_the_largest_seat_counts() -> None:
    shared = replace(MANIFEST, replicas=MANIFEST.microbatches)
    assert footprint(shared, 0).step * MANIFEST.microbatches == footprint(replace(MANIFEST, replicas=1), 0).step
    whole = complete(replace(MANIFEST, stages=1, cuts=()))
    assert largest(whole).total > largest(MANIFEST).total


def test_a_machine_is_told_why_it_is_too_small() -> None:
    need = largest(MANIFEST)
    assert why_not(MANIFEST, need.total, need.total) is None
    assert why_not(MANIFEST, 0, None) is None
    assert "--memory" in str(why_not(MANIFEST, need.total - 1, None))
    assert "other seats" in str(why_not(MANIFEST, need.total, None, held=1))
    assert why_not(MANIFEST, need.total + 1, None, held=1) is None
    assert "free" in str(why_not(MANIFEST, need.total, need.total - 1))


def test_without_a_bound_of_its_own_a_step_has_the_usual_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.footprint.DEFAULT_MEMORY_LIMIT", largest(MANIFEST).step - 1)
    assert "usual" in str(why_not(MANIFEST, 0, None))
    assert why_not(MANIFEST, largest(MANIFEST).total, None) is None
    assert (available_bytes() or 1) > 0


def test_large_models_keep_fewer_states_since_their_steps_are_long() -> None:
    def depth(name: str, **more: Any) -> int:
        found = preset_of(name)
        draft = TaskManifest(found.family, found.config, stages=2, batch=8, microbatches=8, sequence=128)
        return depth_of(complete(replace(draft, **more)))

    assert depth("llama-tiny") == depth("llama-8m") == DEPTH
    assert 4 < depth("llama-100m") < DEPTH
    assert depth("llama-100m", sequence=1024) == 4
    assert depth("llama-100m", sequence=1024, replicas=8) > depth("llama-100m", sequence=1024)
