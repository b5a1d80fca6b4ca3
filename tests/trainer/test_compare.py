import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from training_samples import loaded_stages, run_cell, small_batches, small_manifest

from tests.trainer.tolerances import FP32
from trainer.compare import compare
from trainer.sketch import cell_sketch
from trainer.stage import CellResult, execute
from trainer.state import initial_state


@pytest.fixture(scope="module")
def cell() -> tuple[torch.Tensor, torch.Tensor, CellResult]:
    """Input, output gradient and honest result of a middle stage."""
    manifest = small_manifest(4)
    tokens, labels = small_batches(manifest).batch(1, 0)
    results = run_cell(loaded_stages(manifest), tokens, labels)
    return results[0].y, results[2].gx, results[1]


def test_equal_results_match(cell: tuple[torch.Tensor, torch.Tensor, CellResult]) -> None:
    verdict = compare(cell[2], cell[2], FP32)
    assert (verdict.y, verdict.gx, verdict.gw) == (0.0, 0.0, 0.0)
    assert verdict.is_match
    assert not verdict.is_fraud


def test_honest_noise_stays_far_below_the_thresholds(
    cell: tuple[torch.Tensor, torch.Tensor, CellResult],
) -> None:
    x, gy, honest = cell
    stage = loaded_stages(small_manifest(4))[1]
    halves = [execute(stage, x[row : row + 1], None, gy[row : row + 1]) for row in range(2)]
    other = CellResult(
        torch.cat([half.y for half in halves]),
        torch.cat([half.gx for half in halves]),
        halves[0].gw + halves[1].gw,
        (),
    )
    verdict = compare(other, honest, FP32)
    assert verdict.is_match
    assert verdict.gw > 0
    assert max(verdict.y / FP32.y, verdict.gx / FP32.gx, verdict.gw / FP32.gw) < 0.5


ATTACKS = {
    "sign flip": lambda t: -t,
    "zeros": torch.zeros_like,
    "scale 1.01": lambda t: t * 1.01,
    "noise 1e-2": lambda t: t + 1e-2 * t.abs().mean() * torch.ones_like(t),
    "one element": lambda t: t.reshape(-1).index_fill(0, torch.tensor([5]), 9.0).view_as(t),
    "nan": lambda t: t * math.nan,
    "infinity": lambda t: t * math.inf,
    "shape": lambda t: t[:-1],
}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("field", ["y", "gx", "gw"])
def test_every_attack_on_one_tensor_is_fraud(
    cell: tuple[torch.Tensor, torch.Tensor, CellResult], attack: str, field: str
) -> None:
    honest = cell[2]
    verdict = compare(honest._replace(**{field: ATTACKS[attack](getattr(honest, field))}), honest, FP32)
    assert verdict.is_fraud
    assert not verdict.is_match


def test_stale_weights_are_fraud(cell: tuple[torch.Tensor, torch.Tensor, CellResult]) -> None:
    x, gy, honest = cell
    manifest = small_manifest(4)
    stage = loaded_stages(manifest)[1]
    stage.load(initial_state(manifest, 1).weights * 1.001)
    assert compare(execute(stage, x, None, gy), honest, FP32).is_fraud


def test_between_match_and_fraud_lies_fault(cell: tuple[torch.Tensor, torch.Tensor, CellResult]) -> None:
    honest = cell[2]
    verdict = compare(honest._replace(y=honest.y * (1 + 1e-5)), honest, FP32)
    assert not verdict.is_match
    assert not verdict.is_fraud
    assert compare(honest._replace(y=honest.y * (1 + 1e-5)), honest, replace(FP32, y=1e-3)).is_match


def test_one_wrong_token_is_not_averaged_away(cell: tuple[torch.Tensor, torch.Tensor, CellResult]) -> None:
    honest = cell[2]
    y = honest.y.clone()
    y[1, 3] *= 1.01
    assert compare(honest._replace(y=y), honest, FP32).y == pytest.approx(1e-2, rel=0.05)


def test_zeros_against_zeros_match_and_nothing_else_does() -> None:
    nothing = CellResult(torch.zeros(2, 3), torch.empty(0), torch.zeros(5), ())
    assert compare(nothing, nothing, FP32).is_match
    assert compare(nothing._replace(gw=torch.full((5,), 1e-30)), nothing, FP32).is_fraud


def test_rounding_of_a_small_loss_is_no_deviation() -> None:
    loss = torch.full((4, 128), 1e-3)
    rounded = loss + torch.linspace(-2e-7, 2e-7, 512).view(4, 128)
    honest = CellResult(loss, torch.empty(0), torch.ones(5), ())
    assert compare(honest._replace(y=rounded), honest, FP32).is_match
    key = bytes(32)
    sketches = [np.frombuffer(cell_sketch(y, honest.gx, honest.gw, key)[:128], "<f4") for y in (rounded, loss)]
    assert np.linalg.norm(sketches[0] - sketches[1]) / np.linalg.norm(sketches[1]) < 0.2 * FP32.y
    wrong = honest._replace(y=loss * 1.5)
    assert compare(wrong, honest, FP32).is_fraud
