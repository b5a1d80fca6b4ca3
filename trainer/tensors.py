"""Small helpers on torch tensors that cross a boundary: raw bytes, alignment, empties."""

import sys

import torch
from torch import Tensor

_ALIGNMENT = 64  # kernels take other code paths, and round differently, on buffers aligned otherwise


def empty() -> Tensor:
    """Return the empty fp32 tensor that stands for "no gradient here"."""
    return torch.empty(0, dtype=torch.float32)


def aligned(tensor: Tensor) -> Tensor:
    """Return `tensor` itself if it is contiguous and 64-byte aligned, else a copy that is."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()


def buffer_of(tensor: Tensor) -> memoryview:
    """Return the raw little-endian bytes of a contiguous CPU tensor, without a copy."""
    if sys.byteorder != "little":
        raise RuntimeError("tensors travel as little-endian bytes; this machine is big-endian")
    if not tensor.numel():
        return memoryview(b"")
    data: memoryview = tensor.detach().contiguous().numpy().reshape(-1).data
    return data.cast("B")


def vector_of(data: bytes | memoryview, size: int) -> Tensor:
    """Return a fresh fp32 vector of `size` elements from raw little-endian bytes; raise `ValueError`."""
    view = memoryview(data).cast("B")
    if len(view) != 4 * size:
        raise ValueError(f"{len(view)} bytes are not {size} fp32 values")
    vector = torch.empty(size, dtype=torch.float32)
    if size:
        buffer_of(vector)[:] = view
    return vector


def view_of(data: bytes | memoryview, size: int) -> Tensor:
    """Return an fp32 vector like `vector_of` that nobody may write to: it shares memory that can be written to."""
    view = memoryview(data).cast("B")
    if view.readonly or not size or len(view) != 4 * size or sys.byteorder != "little":
        return vector_of(view, size)
    return torch.frombuffer(view, dtype=torch.float32)
