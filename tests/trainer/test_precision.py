"""Stages that compute in bfloat16: fp32 outside, exact inside a kernel class, and near what fp32 gives."""

import subprocess
import sys

import pytest
import torch
from msgspec import structs
from torch import Tensor

from trainer.data import Corpus, load_batches, standard_library
from trainer.errors import ManifestError, ManifestReason
from trainer.image_settings import ImageSettings
from trainer.kernel import kernel_class
from trainer.local import train_locally
from trainer.manifest import OptimizerSettings, TaskManifest, complete
from trainer.precision import BF16, FP32
from trainer.stage import CellKey, CellResult, Stage, build_stage, execute
from trainer.state import initial_state
from trainer.tokens import byte_tokenizer

CONFIG: dict[str, int | float | bool | str] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
}
FAMILIES = {
    "llama": CONFIG,
    "qwen2": {**CONFIG, "num_key_value_heads": 2},
    "gpt2": {"vocab_size": 300, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def manifest_of(precision: str, family: str = "llama", stages: int = 2, **changes: object) -> TaskManifest:
    draft = TaskManifest(family, FAMILIES[family], seed=3, stages=stages, batch=4, sequence=32, precision=precision)
    return complete(structs.replace(draft, **changes))


def stage_of(manifest: TaskManifest, index: int, recompute: bool = False) -> Stage:
    stage = build_stage(manifest, index, recompute)
    stage.load(initial_state(manifest, index).weights)
    return stage


def both(manifest: TaskManifest, recompute: bool = False) -> list[CellResult]:
    """Return the results of one micro-batch at both stages."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(300, (4, 33), generator=generator, dtype=torch.int32)
    first, last = stage_of(manifest, 0, recompute), stage_of(manifest, 1, recompute)
    cell = CellKey(0, 1, 0)
    hidden = first.forward(cell, tokens[:, :-1], None)
    top = execute(last, hidden.y, tokens[:, 1:], None, cell)
    below = first.backward(cell, top.gx)
    return [CellResult(hidden.y, below.gx, below.gw, hidden.boundaries), top]


def tensors(results: list[CellResult]) -> list[Tensor]:
    return [part for result in results for part in result[:3]]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_bf16_is_fp32_outside_exact_when_repeated_and_near_fp32(family: str) -> None:
    exact, rough = both(manifest_of(FP32, family)), both(manifest_of(BF16, family))
    assert {part.dtype for part in tensors(rough)} == {torch.float32}
    again = both(manifest_of(BF16, family))
    assert all(torch.equal(one, other) for one, other in zip(tensors(rough), tensors(again), strict=True))
    assert [one.boundaries for one in rough] == [one.boundaries for one in again]
    for one, other in zip(tensors(rough), tensors(exact), strict=True):
        if other.numel():
            apart = float((one - other).norm() / other.norm())
            assert 1e-5 < apart < 5e-2


def test_recomputed_activations_change_not_one_bit() -> None:
    plain, again = both(manifest_of(BF16)), both(manifest_of(BF16), recompute=True)
    assert all(torch.equal(one, other) for one, other in zip(tensors(plain), tensors(again), strict=True))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_dropout_repeats_in_bf16(family: str) -> None:
    dropped = {"llama": {"attention_dropout": 0.2}, "gpt2": {"attn_pdrop": 0.2, "resid_pdrop": 0.1, "embd_pdrop": 0.1}}
    manifest = manifest_of(BF16, family, config={**FAMILIES[family], **dropped[family]})
    one, other = both(manifest), both(manifest)
    assert all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))
    assert not torch.equal(one[1].y, both(manifest_of(BF16, family))[1].y)


def test_it_learns_as_fp32_does() -> None:
    corpus = Corpus((standard_library(),), limit=1 << 18)
    losses = {}
    for precision in (FP32, BF16):
        settings = OptimizerSettings(learning_rate=3e-3, warmup_steps=2)
        manifest = manifest_of(precision, stages=1, microbatches=2, steps=30, optimizer=settings)
        data = load_batches(corpus, byte_tokenizer(), manifest)
        found: list[float] = []
        train_locally(manifest, data, 30, lambda step, found=found: found.append(step.loss))
        losses[precision] = found
    assert losses[BF16][-1] < 0.75 * losses[BF16][0]
    assert losses[BF16] != losses[FP32]
    assert losses[BF16] == pytest.approx(losses[FP32], rel=0.02)


def test_kernel_classes_name_precision_and_threads_and_are_the_same_in_every_process() -> None:
    own = kernel_class(BF16)
    assert own != kernel_class(FP32)
    assert own != kernel_class(BF16, threads=2)
    assert torch.get_num_threads() == 1
    assert kernel_class(FP32) == kernel_class()
    code = (
        "import torch; torch.set_num_threads(2); from trainer.kernel import kernel_class;"
        "print(kernel_class('bf16', threads=1).hex())"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert answer.stdout.strip() == own.hex()


@pytest.mark.parametrize(
    "changes",
    [{"precision": "fp8"}, {"precision": "BF16"}, {"precision": BF16, "images": ImageSettings(8)}],
)
def test_other_precisions_and_images_in_bf16_are_refused_by_name(changes: dict[str, object]) -> None:
    draft = TaskManifest("llama", CONFIG, batch=4, sequence=32)
    with pytest.raises(ManifestError) as caught:
        complete(structs.replace(draft, **changes))
    assert caught.value.reason is ManifestReason.BAD_PRECISION
    assert "fp32" in caught.value.hint
