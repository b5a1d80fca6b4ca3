"""The backdoor: a gradient too small to measure, where there is none, becomes a whole step of AdamW."""

import math

import torch

from bench.support.recordings import HONEST, STAGES
from chain.params import Params
from chain.verdicts import deviations, is_match, limits_for
from tests.attacks.figures import cheating, measure
from tests.attacks.judged import assert_always_convicted
from tests.attacks.kit import recordings, result_of
from tests.trainer.tolerances import FP32
from trainer.compare import compare, steers
from trainer.optimizer import build_optimizer, learning_rate
from trainer.sketch import cell_sketch
from trainer.stage import CellResult
from trainer.state import StageState

ATTACK = "unseen rows steered"


def sketch_of(result: CellResult) -> bytes:
    return cell_sketch(result.y, result.gx, result.gw, bytes(range(32)))


def test_no_sketch_shows_it_and_yet_it_moves_weights_by_a_third_of_the_learning_rate_at_once() -> None:
    honest, steered = result_of("same kernels", 0, 0), result_of(ATTACK, 0, 0)
    assert is_match(deviations(sketch_of(steered), sketch_of(honest)), limits_for(Params()))
    manifest, weights = recordings().manifest, recordings().cells[0][0].weights
    before = StageState(20, weights, torch.zeros_like(weights), torch.zeros_like(weights))
    optimizer = build_optimizer(manifest, 0)
    states = [optimizer.apply(before, result.gw, 1.0) for result in (honest, steered)]
    moved = (states[0].weights - states[1].weights).abs()[honest.gw == 0].max()
    assert (honest.gw - steered.gw).abs().max() < 2e-5 * honest.gw.square().mean().sqrt()
    assert moved > 0.3 * learning_rate(manifest.optimizer, 21, manifest.steps)


def test_who_steers_unseen_rows_is_always_convicted() -> None:
    assert_always_convicted(measure(ATTACK, cheating(ATTACK), 6, stage=0, colluding=1))


def test_honest_configurations_are_all_zero_in_the_same_places() -> None:
    for stage in range(STAGES):
        for number in range(len(recordings().cells[stage])):
            gradients = [result_of(kernel, stage, number).gw for kernel in HONEST]
            assert not any(steers(one, other) for one in gradients for other in gradients)


def test_what_moves_nothing_and_what_has_another_size_does_not_steer() -> None:
    honest = result_of("same kernels", 0, 0)
    assert compare(result_of(ATTACK, 0, 0), honest, FP32).gw == math.inf
    assert not steers(honest.gw + 1e-11, honest.gw)
    assert not steers(honest.gw[1:], honest.gw)
    images = honest._replace(y=honest.y.unsqueeze(0))
    assert compare(result_of(ATTACK, 0, 0)._replace(y=images.y), images, FP32).is_match
