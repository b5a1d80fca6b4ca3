import ctypes

import pytest
import torch
from torch import nn
from training_samples import CONFIG, small_manifest

from trainer.families.linear import FastLinear, accelerate, is_available
from trainer.runtime import prepare_process
from trainer.stage import build_stage

pytestmark = pytest.mark.skipif(not is_available(), reason="this build of torch has no oneDNN")


@pytest.mark.parametrize(("inner", "outer"), [(64, 96), (96, 64), (64, 64)])
def test_its_products_are_those_of_a_linear_layer(inner: int, outer: int) -> None:
    plain, fast = nn.Linear(inner, outer, bias=False), FastLinear(inner, outer, bias=False)
    fast.weight = nn.Parameter(plain.weight.detach().clone())
    x = torch.rand(2, 16, inner, generator=torch.Generator().manual_seed(1)).sub_(0.5)
    results = []
    for layer in (plain, fast):
        given = x.clone().requires_grad_()
        y = layer(given)
        results.append((y.detach(), *torch.autograd.grad((y * y).sum(), [given, layer.weight])))
    for expected, got in zip(*results, strict=True):
        assert got.shape == expected.shape
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_every_linear_layer_without_bias_is_replaced() -> None:
    hidden = int(CONFIG["hidden_size"])
    model = nn.Sequential(nn.Linear(hidden, 8, bias=False), nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
    accelerate(model)
    assert isinstance(model[0], FastLinear)
    assert type(model[1][0]) is nn.Linear


def test_a_stage_is_accelerated() -> None:
    is_available.cache_clear()
    stage = build_stage(small_manifest(), 0)
    linear = [module for module in stage.module.modules() if isinstance(module, nn.Linear)]
    assert len(linear) == 4 * 7 + 1
    assert all(isinstance(module, FastLinear) for module in linear)


def test_a_process_is_prepared_with_or_without_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    prepare_process(1)
    assert torch.get_num_threads() == 1
