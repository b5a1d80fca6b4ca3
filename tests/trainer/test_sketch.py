import math

import numpy as np
import pytest
import torch

from trainer.sketch import CELL_SKETCH_BYTES, SKETCH_BYTES, cell_sketch, sketch


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


def norm(data: bytes) -> float:
    return float(np.linalg.norm(np.frombuffer(data, "<f4"))) / math.sqrt(32)


def random(size: int, seed: int) -> torch.Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(seed)).sub_(0.5)


def test_equal_tensors_have_equal_sketches_and_keys_matter() -> None:
    values = random(300_000, 1)
    first = sketch(values, key(1))
    assert len(first) == SKETCH_BYTES
    assert first == sketch(values.clone().view(300, 1000), key(1))
    assert first != sketch(values, key(2))
    assert first.hex()[:16] == "390609c3c6743143"


@pytest.mark.parametrize("shape", ["dense", "one block", "one element", "two rows", "outer product"])
def test_the_distance_of_sketches_is_the_distance_of_tensors(shape: str) -> None:
    base = random(300_000, 1)
    for number in range(8):
        change = torch.zeros_like(base)
        if shape == "dense":
            change = random(300_000, number + 2)
        elif shape == "one block":
            change[1000:3000] = 0.5
        elif shape == "one element":
            change[number * 1001] = 3.0
        elif shape == "two rows":
            change[:512], change[512:1024] = 1.0, -1.0
        else:
            change[: 100 * 512] = torch.outer(random(100, number), random(512, number + 9)).flatten()
        gap = np.frombuffer(sketch(base + change, key(number)), "<f4") - np.frombuffer(sketch(base, key(number)), "<f4")
        true = float(torch.linalg.vector_norm((base + change - base).double()))
        assert 0.5 < float(np.linalg.norm(gap)) / math.sqrt(32) / true < 2.0


def test_small_and_scaled_deviations_are_seen() -> None:
    values = random(100_000, 1)
    for ratio in (1.01, 1.0001, -1.0):
        gap = np.frombuffer(sketch(values * ratio, key(3)), "<f4") - np.frombuffer(sketch(values, key(3)), "<f4")
        relative = np.linalg.norm(gap) / np.linalg.norm(np.frombuffer(sketch(values, key(3)), "<f4"))
        assert relative == pytest.approx(abs(ratio - 1), rel=1e-2)


def test_a_cell_has_three_sketches_under_different_signs() -> None:
    values = random(5000, 1)
    whole = cell_sketch(values, values, values, key(1))
    assert len(whole) == CELL_SKETCH_BYTES
    assert len({whole[:128], whole[128:256], whole[256:]}) == 3
    assert cell_sketch(values, torch.empty(0), values, key(1))[128:256] == bytes(128)


def test_infinite_values_do_not_hide() -> None:
    values = random(2000, 1)
    values[7] = math.nan
    assert np.isnan(np.frombuffer(sketch(values, key(1)), "<f4")).all()
    assert sketch(values, key(1)) == sketch(values * 1, key(1))
    values[7] = math.inf
    assert not np.isfinite(np.frombuffer(sketch(values, key(1)), "<f4")).any()


def test_a_key_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        sketch(torch.ones(3), b"short")
