"""Norm and clipping as torch has them, one tied tensor at two ends, and refusals of what is not finite."""

import math
from pathlib import Path

import msgspec
import pytest
import torch
from swarm_kit import tied_manifest
from training_samples import small_batches, small_manifest

from trainer.checkpoint import Checkpoint, save
from trainer.errors import CheckpointError, CheckpointReason, StageError, StageReason
from trainer.joint import check_tied, clip_scale, is_finite, other_end, squared_norm, tied_part
from trainer.local import LocalTrainer
from trainer.state import StageState, initial_state
from trainer.tokens import byte_tokenizer


def gradient(size: int) -> torch.Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(9)).sub_(0.5)


@pytest.mark.parametrize("clip", [0.01, 1.0, 1e3])
def test_it_is_torch_s_clipping(clip: float) -> None:
    parts = [gradient(100_003), gradient(77) * 3]
    expected = [torch.nn.Parameter(torch.zeros_like(part)) for part in parts]
    for parameter, part in zip(expected, parts, strict=True):
        parameter.grad = part.clone()
    norm = torch.nn.utils.clip_grad_norm_(expected, clip)
    squares = [squared_norm(part) for part in parts]
    assert math.sqrt(sum(squares)) == pytest.approx(float(norm), rel=1e-6)
    scale = clip_scale(clip, squares)
    for parameter, part in zip(expected, parts, strict=True):
        torch.testing.assert_close(part * scale, parameter.grad, rtol=1e-5, atol=0)


def test_the_norm_has_the_same_bits_whatever_the_threads_and_leaves_out_a_part() -> None:
    values = gradient(200_001)
    torch.set_num_threads(2)
    try:
        other = squared_norm(values.clone())
    finally:
        torch.set_num_threads(1)
    assert squared_norm(values) == other == 16698.435370266227
    rest = squared_norm(torch.cat([values[:10], values[70_000:]]))
    assert squared_norm(values, slice(10, 70_000)) == pytest.approx(rest, rel=1e-12)


def test_without_clipping_nothing_is_scaled() -> None:
    assert clip_scale(0.0, [1e9]) == 1.0
    assert clip_scale(2.0, [1.0, 0.5]) == 1.0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_wrong_element_is_found(value: float) -> None:
    values = torch.full((5000,), 3e38)  # the sum overflows, no element does
    assert is_finite(values)
    values[4321] = value
    assert not is_finite(values)


def test_both_ends_hold_the_tied_tensor_and_others_none(tmp_path: Path) -> None:
    manifest = tied_manifest(stages=4)
    states = [initial_state(manifest, index) for index in range(4)]
    parts = [tied_part(manifest, index) for index in range(4)]
    assert [part.stop - part.start for part in parts] == [1024, 0, 0, 1024]
    assert [other_end(manifest, index) for index in range(4)] == [3, None, None, 0]
    assert torch.equal(states[0].weights[parts[0]], states[3].weights[parts[3]])
    check_tied(manifest, states)
    m = states[3].m.clone()
    m[parts[3].start] = 1e-30
    states[3] = StageState(0, states[3].weights, m, states[3].v)
    with pytest.raises(StageError, match=r"different copies of transformer\.wte\.weight"):
        check_tied(manifest, states)
    with pytest.raises(CheckpointError) as refusal:
        save(Checkpoint(manifest, tuple(states), byte_tokenizer()), tmp_path / "out")
    assert refusal.value.reason is CheckpointReason.APART
    assert not (tmp_path / "out").exists()


def test_a_local_run_stops_before_a_poisoned_state() -> None:
    manifest = small_manifest(steps=3)
    weights = initial_state(manifest, 0).weights
    weights[-1] = math.inf
    state = StageState(0, weights, torch.zeros_like(weights), torch.zeros_like(weights))
    trainer = LocalTrainer(manifest, small_batches(manifest), state)
    with pytest.raises(StageError, match="step 1") as refusal:
        trainer.advance()
    assert refusal.value.reason is StageReason.NOT_FINITE
    assert trainer.state is state


def test_a_local_run_clips() -> None:
    manifest = small_manifest(steps=3)
    optimizer = msgspec.structs.replace(manifest.optimizer, clip=1e-3)
    clipped = msgspec.structs.replace(manifest, optimizer=optimizer)
    first, second = (LocalTrainer(m, small_batches(m)) for m in (manifest, clipped))
    for trainer in (first, second):
        trainer.advance()
    norm = float(second.state.m.norm()) / (1 - optimizer.beta1)
    assert norm == pytest.approx(1e-3, rel=1e-2)
    assert float(first.state.m.norm()) > 10 * float(second.state.m.norm())
