"""The image family: a cut ResNet is the whole one of `transformers`, running statistics included."""

import msgspec
import pytest
import torch
from swarm_kit import Kit, batches_of, held_back, trained
from training_samples import KEY, loaded_stages, run_cell

from tests.trainer.image_samples import image_batches, plain_loop, resnet_manifest, uncut
from tests.trainer.tolerances import FP32
from trainer.checkpoint import whole_tensors
from trainer.compare import compare
from trainer.errors import StageError, StageReason
from trainer.local import LocalTrainer, train_locally
from trainer.manifest import TaskManifest, decode_manifest, encode_manifest
from trainer.optimizer import build_optimizer
from trainer.sketch import cell_sketch
from trainer.stage import CellKey, CellResult, build_stage, execute
from trainer.state import initial_state
from trainer.statistics import gain, power, share

STEPS = 6
SHAPES = {
    "basic": {},
    "bottleneck": {"layer_type": "bottleneck", "num_channels": 3, "depths": "1,2,1", "hidden_sizes": "8,16,32"},
    "early": {"downsample_in_first_stage": True, "downsample_in_bottleneck": True, "layer_type": "bottleneck"},
    "gelu": {"hidden_act": "gelu"},
}


def manifest_like(name: str, stages: int = 2) -> TaskManifest:
    base = resnet_manifest(stages)
    return resnet_manifest(stages, config={**base.config, **SHAPES[name]}, cuts=())


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        gap = torch.linalg.vector_norm(found[name].float() - tensor.float())
        assert float(gap) <= 1e-5 * float(torch.linalg.vector_norm(tensor.float())), name


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_a_cut_model_has_the_whole_models_loss_gradients_and_statistics(name: str, stages: int) -> None:
    manifest = manifest_like(name, stages)
    assert decode_manifest(encode_manifest(manifest)) == manifest
    pixels, labels = image_batches(manifest).batch(1, 0)
    stages_, model = loaded_stages(manifest), uncut(manifest)
    results = run_cell(stages_, pixels, labels)
    loss = model(pixel_values=pixels, labels=labels.long()).loss
    loss.backward()
    torch.testing.assert_close(results[-1].y.mean(), loss.detach(), rtol=1e-6, atol=0)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    buffers = {name: buffer.float() for name, buffer in model.named_buffers()}
    for stage, result in zip(stages_, results, strict=True):
        for tensor, (start, stop) in zip(stage.layout.tensors, stage.layout.ranges, strict=True):
            found = result.gw[start:stop].view(tensor.shape)
            if tensor.kept is None:
                torch.testing.assert_close(found, gradients.pop(tensor.name), rtol=1e-4, atol=1e-5)
            else:
                added = buffers.pop(tensor.name) - tensor.kept * tensor.constant
                own = found / share(tensor.kept, manifest.microbatches, KEY.cell)
                torch.testing.assert_close(own, added, rtol=1e-5, atol=1e-6)
    assert not gradients
    assert not buffers


@pytest.mark.parametrize("name", SHAPES)
def test_a_boundary_has_the_shape_that_the_manifest_says(name: str) -> None:
    manifest = manifest_like(name, 1)
    model, pixels = uncut(manifest), image_batches(manifest).batch(1, 0).tokens
    shapes = [model.resnet.embedder(pixels).shape]
    hidden = model.resnet.embedder(pixels)
    for part in model.resnet.encoder.stages:
        for block in part.layers:
            hidden = block(hidden)
            shapes.append(hidden.shape)
    assert [manifest.boundary(index) for index in range(manifest.layers + 1)] == [tuple(shape) for shape in shapes]
    layout = manifest.whole_layout
    assert {tensor.name: tensor.shape for tensor in layout.tensors} == {
        name: tuple(tensor.shape) for name, tensor in model.state_dict().items()
    }
    assert [tensor.kept is None for tensor in layout.tensors] == sorted(
        (tensor.kept is None for tensor in layout.tensors), reverse=True
    )


@pytest.mark.parametrize(("stages", "replicas"), [(1, 1), (2, 1), (2, 2), (4, 1)])
def test_a_swarm_is_the_plain_loop_over_the_models_own_modules(stages: int, replicas: int) -> None:
    manifest = resnet_manifest(stages, STEPS)
    kit = Kit(manifest, replicas)
    found = whole_tensors(manifest, trained(kit))
    losses: list[float] = []
    expected = plain_loop(manifest, image_batches(manifest), STEPS, losses.append)
    assert kit.losses == pytest.approx(losses, rel=1e-5)
    assert losses[-1] < losses[0]
    assert_same(found, expected)
    tracked = [tensor for name, tensor in found.items() if name.endswith("num_batches_tracked")]
    assert {int(count) for count in tracked} == {STEPS * manifest.microbatches}
    assert all(not worker.refused for worker in kit.workers.values())


def test_a_swarm_repeats_itself_bit_for_bit_and_its_replicas_agree() -> None:
    manifest = resnet_manifest(2, 3)
    first, again = trained(Kit(manifest)), trained(Kit(manifest))
    assert [state.root for state in first] == [state.root for state in again]


def test_what_validates_uses_the_running_statistics() -> None:
    manifest = resnet_manifest(2, 2)
    kit = Kit(manifest, eval_every=1)
    trained(kit)
    measured = [event.validation for event in kit.events if getattr(event, "validation", None) is not None]
    trainer = LocalTrainer(manifest, batches_of(manifest))
    expected = []
    for _ in range(2):
        trainer.advance()
        expected.append(trainer.evaluate(held_back(manifest)))
    assert measured == pytest.approx(expected, rel=1e-5)


def claimed(manifest: TaskManifest, cell: int = 2) -> tuple[list[CellResult], list[tuple[object, ...]]]:
    """Return the results of one cell at every stage, and what each stage was given."""
    pixels, labels = image_batches(manifest).batch(1, cell)
    key = CellKey(0, 1, cell)
    results = run_cell(loaded_stages(manifest), pixels, labels, key)
    given: list[tuple[object, ...]] = [
        (pixels, None, results[1].gx, key),
        (results[0].y, labels, None, key),
    ]
    return results, given


@pytest.mark.parametrize("recompute", [False, True])
def test_reexecution_gives_the_same_bits(recompute: bool) -> None:
    manifest = resnet_manifest(2)
    results, given = claimed(manifest)
    for index, (result, inputs) in enumerate(zip(results, given, strict=True)):
        auditor = build_stage(manifest, index, recompute)
        auditor.load(initial_state(manifest, index).weights)
        # what an auditor did before leaves no trace
        execute(auditor, *image_like(inputs), CellKey(0, 1, 0))
        again = execute(auditor, *inputs)
        assert all(torch.equal(a, b) for a, b in zip(result[:3], again[:3], strict=True))
        assert result.boundaries == again.boundaries


def image_like(inputs: tuple[object, ...]) -> tuple[object, ...]:
    return tuple(
        part * 2 if isinstance(part, torch.Tensor) and part.is_floating_point() else part for part in inputs[:3]
    )


@pytest.mark.parametrize("statistic", ["running_mean", "running_var", "num_batches_tracked"])
@pytest.mark.parametrize("stage", [0, 1])
def test_a_lie_about_a_statistic_is_found_by_comparison_and_sketch(stage: int, statistic: str) -> None:
    manifest = resnet_manifest(2)
    results, _ = claimed(manifest)
    honest, lie = results[stage], results[stage].gw.clone()
    layout = manifest.trained_layout(manifest.stage(stage))
    for tensor, (start, stop) in zip(layout.tensors, layout.ranges, strict=True):
        if tensor.name.endswith(statistic):
            lie[start:stop] *= 1.1
    told = honest._replace(gw=lie)
    assert compare(honest, honest, FP32).is_match
    assert not compare(told, honest, FP32).is_match
    key = bytes(range(32))
    own, other = (
        torch.frombuffer(bytearray(cell_sketch(*each[:3], key)), dtype=torch.float32) for each in (honest, told)
    )
    gw = slice(64, 96)
    assert float((own[gw] - other[gw]).norm() / own[gw].norm()) > 10 * 3.5e-5


def test_the_optimiser_moves_statistics_by_their_rule_alone() -> None:
    manifest = resnet_manifest(1)
    layout = manifest.trained_layout(manifest.stage(0))
    state = initial_state(manifest, 0)
    gradient = torch.randn(layout.total, generator=torch.Generator().manual_seed(1))
    optimizer, rest = build_optimizer(manifest, 0), slice(layout.trained, None)
    plain, halved = optimizer.apply(state, gradient), optimizer.apply(state, gradient, 0.5)
    assert torch.equal(plain.weights[rest], halved.weights[rest])
    assert not torch.equal(plain.m[: layout.trained], halved.m[: layout.trained])
    for after in (plain, halved):
        assert not after.m[rest].any()
        assert not after.v[rest].any()
    other = gradient.clone()
    other[rest] = 100.0
    moved = optimizer.apply(state, other)
    assert torch.equal(moved.weights[: layout.trained], plain.weights[: layout.trained])
    cells, kept = manifest.microbatches, layout.statistics[0].kept or 0.0
    start = layout.trained
    expected = state.weights[start] * kept**cells + gradient[start] * gain(cells)
    torch.testing.assert_close(plain.weights[start], expected)


def test_statistics_do_not_count_in_the_norm() -> None:
    manifest = resnet_manifest(1, 1, optimizer=msgspec.structs.replace(resnet_manifest(1).optimizer, clip=1e-3))
    assert_same(
        whole_tensors(manifest, (train_locally(manifest, image_batches(manifest), 1),)),
        plain_loop(manifest, image_batches(manifest), 1),
    )


@pytest.mark.parametrize(("kept", "cells"), [(0.9, 1), (0.9, 8), (0.5, 3), (1.0, 7)])
def test_shares_of_the_cells_are_the_moving_average_of_one_process(kept: float, cells: int) -> None:
    added = [float(value) for value in torch.rand(cells, generator=torch.Generator().manual_seed(cells))]
    expected = running = 3.0
    for value in added:
        expected = kept * expected + value
    mean = sum(share(kept, cells, cell) * value for cell, value in enumerate(added)) / cells
    assert power(kept, cells) * running + gain(cells) * mean == pytest.approx(expected, rel=1e-12)


def test_a_stage_refuses_wrong_images_and_labels_by_name() -> None:
    manifest = resnet_manifest(2)
    first, last = loaded_stages(manifest)
    pixels, labels = image_batches(manifest).batch(1, 0)
    hidden = first.forward(KEY, pixels, None).y
    other = CellKey(0, 1, 1)
    calls = {
        "size": (StageReason.BAD_SHAPE, lambda: first.forward(other, pixels[:, :, :-1], None)),
        "channels": (StageReason.BAD_SHAPE, lambda: first.forward(other, pixels.repeat(1, 3, 1, 1), None)),
        "rank": (StageReason.BAD_SHAPE, lambda: first.forward(other, pixels[0], None)),
        "bytes": (StageReason.BAD_TYPE, lambda: first.forward(other, pixels.to(torch.uint8), None)),
        "hidden": (StageReason.BAD_SHAPE, lambda: last.forward(other, hidden[:, :-1], labels)),
        "label": (StageReason.BAD_TOKEN, lambda: last.forward(other, hidden, labels + 5)),
        "negative": (StageReason.BAD_TOKEN, lambda: last.forward(other, hidden, labels - 5)),
        "labels": (StageReason.BAD_SHAPE, lambda: last.forward(other, hidden, labels[:-1])),
        "no labels": (StageReason.BAD_SHAPE, lambda: last.forward(other, hidden, None)),
        "kind": (StageReason.BAD_TYPE, lambda: last.forward(other, hidden, labels.float())),
    }
    for name, (reason, call) in calls.items():
        with pytest.raises(StageError) as caught:
            call()
        assert caught.value.reason == reason, name


def test_stages_of_other_numbers_start_alike() -> None:
    tables = []
    for stages in (1, 2, 4):
        manifest = resnet_manifest(stages)
        tables.append(whole_tensors(manifest, [initial_state(manifest, index) for index in range(stages)]))
    for table in tables[1:]:
        assert table.keys() == tables[0].keys()
        assert all(torch.equal(table[name], tables[0][name]) for name in table)
