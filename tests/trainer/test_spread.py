"""A machine's own spread: about nothing in ordinary training, what other kernels make of a cell on a wrecked model."""

import itertools
import math
from functools import cache
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from msgspec.structs import replace
from torch import Tensor

from chain.params import Params
from chain.transactions import EXACT, MAX_TOLERANCE
from chain.verdicts import Deviations, deviations, is_fraud, is_match, limits_for
from tdml_p2p.swarm.contradictions import tolerances
from tdml_p2p.swarm.doubts import SEEDS, tolerance_of, unsteadiness
from tests.trainer.tolerances import FP32
from trainer.compare import STEADY, Spread, compare, steers
from trainer.data import Corpus, load_batches, standard_library
from trainer.families import linear
from trainer.local import train_locally, whole
from trainer.manifest import OptimizerSettings, TaskManifest, complete
from trainer.sketch import cell_sketch
from trainer.spread import shaken, shaken_cell, spread_of
from trainer.stage import CellResult, Stage, build_stage, execute, stage_layout
from trainer.tokens import byte_tokenizer

LIMITS = limits_for(Params())
CONFIG: dict[str, int | float | bool | str] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "intermediate_size": 352,
    "num_attention_heads": 4,
}
KEY = bytes(range(32))
WILD = 10.0
"""A learning rate one step at which wrecks the model."""


class Cell(NamedTuple):
    """A cell of the first stage: what it reads, and what three honest machines make of it."""

    weights: Tensor
    x: Tensor
    gy: Tensor
    own: CellResult
    looks: list[CellResult]
    others: list[CellResult]


def stage_on(manifest: TaskManifest, weights: Tensor, *, is_plain: bool = False) -> Stage:
    with mock.patch.object(linear, "is_available", return_value=not is_plain and linear.is_available()):
        stage = build_stage(manifest, 0)
    stage.load(weights)
    return stage


def in_double(manifest: TaskManifest, weights: Tensor, x: Tensor, gy: Tensor) -> CellResult:
    """Return a cell with matrix products in double precision: rounded once, as by no kernel in use."""
    exact = torch.nn.functional.linear

    def product(given: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        wide = exact(given.double(), weight.double(), None if bias is None else bias.double())
        return wide.float()

    stage = stage_on(manifest, weights, is_plain=True)
    with mock.patch.object(torch.nn.functional, "linear", product):
        return execute(stage, x, None, gy)


@cache
def cell(rate: float) -> Cell:
    """Return a cell on a model trained for some steps, the last of which was at this learning rate."""
    torch.set_num_threads(1)
    settings = OptimizerSettings(learning_rate=6e-4, warmup_steps=5)
    draft = TaskManifest("llama", CONFIG, stages=3, cuts=(1, 2, 1), batch=2, microbatches=2, optimizer=settings)
    manifest = complete(replace(draft, sequence=64))
    data = load_batches(Corpus((standard_library(),), limit=1 << 20), byte_tokenizer(), manifest)
    last = replace(manifest, optimizer=OptimizerSettings(learning_rate=rate, warmup_steps=1))
    state = train_locally(last, data, 13, state=train_locally(manifest, data, 12))
    uncut = stage_layout(whole(manifest), 0)
    flat = {
        tensor.name: state.weights[start:stop]
        for tensor, (start, stop) in zip(uncut.tensors, uncut.ranges, strict=True)
    }
    parts = [torch.cat([flat[tensor.name] for tensor in stage_layout(manifest, index).tensors]) for index in range(3)]
    x, labels = data.batch(15, 0)
    gy: Tensor | None = None
    inputs, stages = [x], [build_stage(manifest, index) for index in range(3)]
    for index, stage in enumerate(stages):
        stage.load(parts[index])
        inputs.append(stage.logits(inputs[-1]))
    for index in (2, 1):
        gy = execute(stages[index], inputs[index], labels if index == 2 else None, gy).gx
    assert gy is not None
    given = (parts[0], x, gy)
    looks = []
    for seed in SEEDS:
        weights, tokens, back = shaken_cell(*given, seed)
        looks.append(execute(stage_on(manifest, weights), tokens, None, back))
    others = [execute(stage_on(manifest, parts[0], is_plain=True), x, None, gy), in_double(manifest, *given)]
    return Cell(*given, execute(stage_on(manifest, parts[0]), x, None, gy), looks, others)


def sketch(result: CellResult) -> bytes:
    return cell_sketch(result.y, result.gx, result.gw, KEY)


def apart(claimed: CellResult, own: CellResult) -> Deviations:
    return deviations(sketch(claimed), sketch(own))


def allowed(one: Cell) -> tuple[int, int, int]:
    """Return what a judge tolerates of a cell's sketches."""
    times = unsteadiness(sketch(one.own), [sketch(look) for look in one.looks], LIMITS)
    found = tolerance_of(times, [apart(other, one.own) for other in one.others], LIMITS)
    assert found is not None
    return found


def test_on_a_wrecked_model_honest_machines_would_be_convicted_without_a_second_look() -> None:
    one = cell(WILD)
    assert any(not is_match(apart(other, one.own), LIMITS) for other in one.others)
    assert any(compare(other, one.own, FP32).is_fraud for other in one.others)


def test_nobody_s_honest_kernels_are_charged_or_convicted_by_who_knows_its_spread() -> None:
    one = cell(WILD)
    limits = LIMITS._replace(tolerance=allowed(one))
    thresholds = tolerances(LIMITS, spread_of(one.own, one.looks))
    for other in one.others:
        assert is_match(apart(other, one.own), limits)
        assert not compare(other, one.own, thresholds).is_fraud


def test_a_cheat_on_a_wrecked_model_is_convicted_beyond_ten_spreads() -> None:
    one = cell(WILD)
    spread = spread_of(one.own, one.looks)
    thresholds = tolerances(LIMITS, spread)
    for name, factor in itertools.product(("y", "gw"), (10.0, -1.0)):
        false = one.own._replace(**{name: getattr(one.own, name) * factor})
        assert compare(false, one.own, thresholds).is_fraud
        assert is_fraud(apart(false, one.own), LIMITS._replace(tolerance=allowed(one)))
    # y is as steady as ever: no unsteadiness of gw hides what is done to it
    assert compare(one.own._replace(y=one.own.y * 1.001), one.own, thresholds).is_fraud
    assert compare(one.own._replace(gw=one.own.gw * (1 + 11 * spread.gw)), one.own, thresholds).is_fraud


def test_in_ordinary_training_every_limit_is_as_it_was() -> None:
    one = cell(6e-4)
    assert all(is_match(apart(other, one.own), LIMITS) for other in one.others)
    assert allowed(one) == EXACT
    assert tolerances(LIMITS, spread_of(one.own, one.looks)).limits(100) == FP32.limits(100)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_allows_nothing(value: float) -> None:
    own = cell(6e-4).own
    false = CellResult(own.y.clone(), own.gx, own.gw.clone(), ())
    false.y[0, 0, 0] = false.gw[5] = value
    assert spread_of(own, [false])[:3] == (0.0, 0.0, 0.0)
    assert spread_of(false, [own])[:3] == (0.0, 0.0, 0.0)
    assert unsteadiness(sketch(own), [sketch(false)], LIMITS) == EXACT
    assert unsteadiness(sketch(false), [sketch(own)], LIMITS) == EXACT
    assert compare(false, own, tolerances(LIMITS, spread_of(own, [false]))).is_fraud


def test_last_bits_alone_are_shaken_and_always_alike() -> None:
    one = cell(6e-4)
    first, again, other = (shaken(one.weights, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    apart_by = (first.double() - one.weights.double()).abs()
    assert bool((apart_by <= one.weights.abs().double() * 2.0**-23).all())
    assert bool((apart_by > 0)[one.weights != 0].all())
    assert bool((shaken(torch.zeros(9), 1) == 0).all())
    assert shaken(one.x, 1) is one.x


def test_zeros_that_do_not_hold_on_the_own_machine_are_demanded_of_nobody() -> None:
    own = cell(6e-4).own
    dead = int((own.gw.view(-1, 128).abs().amax(1) == 0).nonzero()[0]) * 128
    steered = own.gw.clone()
    steered[dead] = 1e-7
    claimed = own._replace(gw=steered)
    assert steers(steered, own.gw)
    assert compare(claimed, own, FP32).is_fraud
    assert spread_of(own, [claimed]).has_steady_zeros is False
    assert spread_of(claimed, [own]).has_steady_zeros is False
    assert compare(claimed, own, tolerances(LIMITS, STEADY)).is_fraud
    assert not compare(claimed, own, tolerances(LIMITS, Spread(has_steady_zeros=False))).is_fraud


def test_where_nobody_can_tell_nobody_speaks_and_what_is_beyond_ten_spreads_is_fraud_all_the_same() -> None:
    y, gx, gw = LIMITS.tau
    times = (1, 1, 5000)
    assert tolerance_of(times, [(0.0, 0.0, 90 * gw)], LIMITS) == (1, 1, MAX_TOLERANCE)
    assert tolerance_of(times, [(0.0, 0.0, 101 * gw)], LIMITS) is None
    assert tolerance_of(times, [(0.0, 0.0, 0.0), (0.0, 0.0, 4999 * gw)], LIMITS) is None
    assert tolerance_of(times, [(0.0, 0.0, 5001 * gw)], LIMITS) == (1, 1, MAX_TOLERANCE)
    assert tolerance_of(times, [(0.0, 101 * gx, 200 * gw)], LIMITS) == (1, 1, MAX_TOLERANCE)
    assert tolerance_of(times, [(2 * y, 0.0, 200 * gw)], LIMITS) is None
