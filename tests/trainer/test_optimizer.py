import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_samples import small_manifest

from trainer.errors import StageError
from trainer.manifest import OptimizerSettings
from trainer.optimizer import build_optimizer, learning_rate
from trainer.stage import stage_layout
from trainer.state import initial_state


def gradients(size: int, count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.rand(size, generator=generator).sub_(0.5) for _ in range(count)]


def test_it_is_adamw() -> None:
    settings = OptimizerSettings(learning_rate=2e-3, warmup_steps=2, schedule="cosine")
    manifest = small_manifest(2, optimizer=settings, steps=12)
    optimizer, state, layout = (
        build_optimizer(manifest, 1),
        initial_state(manifest, 1),
        stage_layout(manifest, 1),
    )
    views = [state.weights[a:b].clone().requires_grad_() for a, b in layout.ranges]
    groups = [
        {"params": [view], "weight_decay": settings.weight_decay if tensor.is_decayed else 0.0}
        for view, tensor in zip(views, layout.tensors, strict=True)
    ]
    reference = torch.optim.AdamW(groups, betas=(settings.beta1, settings.beta2), eps=settings.eps)
    for step, gradient in enumerate(gradients(layout.total, 12), 1):
        state = optimizer.apply(state, gradient)
        for group in reference.param_groups:
            group["lr"] = learning_rate(settings, step, 12)
        for view, (a, b) in zip(views, layout.ranges, strict=True):
            view.grad = gradient[a:b].clone()
        reference.step()
    expected = torch.cat([view.detach() for view in views])
    gap = torch.linalg.vector_norm(state.weights - expected) / torch.linalg.vector_norm(expected)
    assert float(gap) < 1e-6
    assert state.step == 12


def test_replicas_agree_bit_for_bit_and_the_former_state_stays() -> None:
    manifest = small_manifest(2)
    first, second = initial_state(manifest, 0), initial_state(manifest, 0)
    before = first.root
    kept = [part.clone() for part in (first.weights, first.m, first.v)]
    gradient = gradients(first.weights.numel(), 1)[0]
    after = build_optimizer(manifest, 0).apply(first, gradient)
    torch.set_num_threads(2)
    try:
        other = build_optimizer(manifest, 0).apply(second, gradient.clone())
    finally:
        torch.set_num_threads(1)
    assert after.root == other.root != before
    assert all(torch.equal(a, b) for a, b in zip((first.weights, first.m, first.v), kept, strict=True))


def test_the_result_is_pinned() -> None:
    manifest = small_manifest(2, cuts=(2, 2))
    state = initial_state(manifest, 1)
    after = build_optimizer(manifest, 1).apply(state, gradients(state.weights.numel(), 1)[0])
    assert state.root.hex()[:16] == "d40cf5a93fe2546e"
    assert after.root.hex()[:16] == "7fe97276cab62bff"


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_kernels_give_the_same_bits(capability: str) -> None:
    here = Path(__file__).parent
    code = "import test_optimizer; test_optimizer.test_the_result_is_pinned()"
    environment = {
        **os.environ,
        "ATEN_CPU_CAPABILITY": capability,
        "PYTHONPATH": os.pathsep.join((str(here), str(here.parents[1]))),
    }
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_a_gradient_of_another_shape_is_refused() -> None:
    state = initial_state(small_manifest(), 0)
    with pytest.raises(StageError):
        build_optimizer(small_manifest(), 0).apply(state, state.weights[:-1])


def test_the_schedule_warms_up_and_follows_the_cosine() -> None:
    settings = OptimizerSettings(learning_rate=1.0, warmup_steps=4, schedule="cosine", min_ratio=0.1)
    rates = [learning_rate(settings, step, 104) for step in range(1, 120)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    for step in range(5, 105):
        expected = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 4) / 100))
        assert rates[step - 1] == pytest.approx(expected, rel=1e-12)
    assert rates[-1] == pytest.approx(0.1)
    assert learning_rate(OptimizerSettings(learning_rate=0.5), 99, 100) == 0.5
