"""Every attack of the demonstration does what it says from its first step on, and nothing before it."""

import pytest
import torch
from torch import Tensor

from tdml_p2p.demo.faults import ATTACKS, faulty_factory
from tests.trainer.training_samples import small_batches, small_manifest
from trainer.errors import StageError
from trainer.stage import Backward, CellKey, Forward, StageLike, build_stage
from trainer.state import initial_state

START = 3
MANIFEST = small_manifest(stages=2)
LAST = 1
WEIGHTS = tuple(initial_state(MANIFEST, stage).weights for stage in range(2))
LABELS = small_batches(MANIFEST).batch(1, 0).labels
HIDDEN = torch.randn((2, 16, 64), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", autouse=True)
def _warm() -> None:
    """Import what the first stage of a process imports, which takes seconds."""
    build_stage(MANIFEST, LAST)


def weights_at(step: int) -> Tensor:
    """Return the last stage's weights at a step: other ones for each."""
    return WEIGHTS[LAST] * (1 + step / 10)


def ran(stage: StageLike, step: int) -> tuple[Forward, Backward]:
    """Return what the last stage answers for one cell of a step."""
    key = CellKey(0, step, 0)
    return stage.forward(key, HIDDEN, LABELS), stage.backward(key, None)


def honest(step: int, weights: int | None = None) -> tuple[Forward, Backward]:
    stage = build_stage(MANIFEST, LAST)
    stage.load(weights_at(step if weights is None else weights))
    return ran(stage, step)


def attacked(attack: str, last_step: int) -> tuple[Forward, Backward]:
    """Return the answers of an attacker at `last_step`, which has trained every step up to it."""
    torch.manual_seed(0)
    stage = faulty_factory(attack, START)(MANIFEST, LAST)
    for step in range(1, last_step + 1):
        stage.load(weights_at(step))
        answers = ran(stage, step)
    return answers


def tensors(answers: tuple[Forward, Backward]) -> tuple[Tensor, ...]:
    forward, backward = answers
    return forward.y, backward.gx, backward.gw


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def assert_same(found: tuple[Forward, Backward], expected: tuple[Forward, Backward]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(tensors(found), tensors(expected), strict=True))
    assert found[0].boundaries == expected[0].boundaries


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("step", [1, START - 1])
def test_an_attacker_is_honest_to_the_bit_before_its_first_step(attack: str, step: int) -> None:
    assert_same(attacked(attack, step), honest(step))


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("step", [START, START + 1])
def test_an_attacker_cheats_from_its_first_step_on(attack: str, step: int) -> None:
    found, expected = attacked(attack, step), honest(step)
    assert not torch.equal(found[0].y, expected[0].y)
    assert not torch.equal(found[1].gx, expected[1].gx)


def test_sign_flip_negates_the_output_and_the_input_gradient() -> None:
    y, gx, gw = tensors(attacked("sign-flip", START))
    honest_y, honest_gx, honest_gw = tensors(honest(START))
    assert torch.equal(y, -honest_y)
    assert torch.equal(gx, -honest_gx)
    assert torch.equal(gw, honest_gw)


def test_scale_sends_one_per_cent_more() -> None:
    y, gx, gw = tensors(attacked("scale", START))
    honest_y, honest_gx, honest_gw = tensors(honest(START))
    torch.testing.assert_close(y, 1.01 * honest_y, rtol=1e-6, atol=0)
    torch.testing.assert_close(gx, 1.01 * honest_gx, rtol=1e-6, atol=0)
    assert torch.equal(gw, honest_gw)


def test_noise_is_about_one_per_cent_of_what_it_is_added_to() -> None:
    y, gx, _ = tensors(attacked("noise", START))
    honest_y, honest_gx, _ = tensors(honest(START))
    assert 0.006 < relative(y, honest_y) < 0.014
    assert 0.009 < relative(gx, honest_gx) < 0.011


def test_a_skipped_layer_is_missing_from_the_forward_pass_and_has_no_gradient() -> None:
    stage = build_stage(MANIFEST, LAST)
    layers = stage.module.get_submodule("layers")
    last = list(layers.children())[-1]
    last.forward = lambda hidden, *_, **__: hidden
    stage.load(weights_at(START))
    y = stage.forward(CellKey(0, START, 0), HIDDEN, LABELS).y
    found = attacked("skip-layer", START)
    torch.testing.assert_close(found[0].y, y)
    gw, expected = found[1].gw, honest(START)[1].gw
    of_layer = sum(weight.numel() for weight in last.parameters())
    assert int(((gw == 0) & (expected != 0)).sum()) == pytest.approx(of_layer, rel=0.01)


def test_a_skipped_layer_stands_again_in_its_place_afterwards() -> None:
    stage = faulty_factory("skip-layer", START)(MANIFEST, LAST)
    stage.load(weights_at(START))
    ran(stage, START)
    stage.load(weights_at(1))
    assert_same(ran(stage, 1), honest(1))


@pytest.mark.parametrize("step", [START, START + 2])
def test_stale_results_are_those_of_the_weights_of_the_step_before(step: int) -> None:
    assert_same(attacked("stale", step), honest(step, weights=step - 1))


def test_stale_without_older_weights_is_honest_for_its_first_step() -> None:
    stage = faulty_factory("stale", START)(MANIFEST, LAST)
    stage.load(weights_at(START))
    assert_same(ran(stage, START), honest(START))
    stage.load(weights_at(START + 1))
    assert_same(ran(stage, START + 1), honest(START + 1, weights=START))


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attacker_at_the_first_stage_sends_an_empty_input_gradient(attack: str) -> None:
    batch = small_batches(MANIFEST).batch(START, 0)
    stage = faulty_factory(attack, START)(MANIFEST, 0)
    stage.load(WEIGHTS[0])
    key = CellKey(0, START, 0)
    y = stage.forward(key, batch.tokens, None).y
    assert stage.backward(key, torch.ones_like(y)).gx.numel() == 0


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_dropped_cell_is_forgotten(attack: str) -> None:
    stage = faulty_factory(attack, START)(MANIFEST, LAST)
    stage.load(WEIGHTS[LAST])
    key = CellKey(0, START, 0)
    stage.forward(key, HIDDEN, LABELS)
    stage.drop(key)
    with pytest.raises(StageError):
        stage.backward(key, None)
