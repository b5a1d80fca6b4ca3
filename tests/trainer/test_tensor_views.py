"""Vectors from raw bytes: fresh, or of the memory that the bytes lie in."""

import pytest
import torch

from trainer.tensors import buffer_of, vector_of, view_of

GIVEN = torch.arange(1000, dtype=torch.float32)


@pytest.mark.parametrize("make", [vector_of, view_of])
@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_bytes_become_the_vector_that_they_are(make, kind) -> None:
    data = memoryview(kind(buffer_of(GIVEN)))
    assert torch.equal(make(data, 1000), GIVEN)
    assert make(memoryview(kind()), 0).numel() == 0
    for size in (0, 999, 1001):
        with pytest.raises(ValueError, match="are not"):
            make(data, size)


def test_only_a_view_shares_memory_and_only_what_can_be_written_to() -> None:
    data = bytearray(buffer_of(GIVEN))
    fresh, view, copy = vector_of(data, 1000), view_of(memoryview(data), 1000), view_of(bytes(data), 1000)
    data[:4] = bytes(buffer_of(torch.tensor([7.0])))
    assert (float(fresh[0]), float(view[0]), float(copy[0])) == (0.0, 7.0, 0.0)
