"""Layout of one stage's parameters in its flat fp32 vector, known without torch."""

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TypeAlias

Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class TensorSpec:
    """One parameter: its name in the whole model's state dict, shape, weight decay, and initial values.

    `deviation` is the standard deviation of the initial values; if it is 0, all of them are `constant`.
    `kept` is for a running statistic, which no gradient moves: the share of it that one cell leaves.
    """

    name: str
    shape: tuple[int, ...]
    is_decayed: bool
    deviation: float
    constant: float = 1.0
    kept: float | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class Segment:
    """A half-open range of the flat vector whose elements follow one rule: weights, decayed or not, or statistics."""

    start: int
    stop: int
    is_decayed: bool
    kept: float | None = None


@dataclass(frozen=True)
class Layout:
    """Parameters of one stage in the order of its flat vector, running statistics after all others."""

    tensors: tuple[TensorSpec, ...]

    @cached_property
    def total(self) -> int:
        """Number of elements of the flat vector."""
        return sum(tensor.size for tensor in self.tensors)

    @cached_property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """Half-open range of each tensor in the flat vector."""
        ranges, start = [], 0
        for tensor in self.tensors:
            ranges.append((start, start + tensor.size))
            start += tensor.size
        return tuple(ranges)

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """The flat vector as the fewest segments of one rule each."""
        merged: list[Segment] = []
        for tensor, (start, stop) in zip(self.tensors, self.ranges, strict=True):
            rule = (tensor.is_decayed, tensor.kept)
            if merged and (merged[-1].is_decayed, merged[-1].kept) == rule:
                merged[-1] = Segment(merged[-1].start, stop, *rule)
            else:
                merged.append(Segment(start, stop, *rule))
        return tuple(merged)

    @cached_property
    def statistics(self) -> tuple[TensorSpec, ...]:
        """The running statistics, which are the last tensors."""
        return tuple(tensor for tensor in self.tensors if tensor.kept is not None)

    @cached_property
    def trained(self) -> int:
        """Number of elements that gradients move; the statistics come after them."""
        return self.total - sum(tensor.size for tensor in self.statistics)


@dataclass(frozen=True)
class StageSpec:
    """Place of one stage in the model: decoder layers `first <= i < last` of stage `index` of `count`."""

    index: int
    count: int
    first: int
    last: int

    @property
    def is_first(self) -> bool:
        """Whether the stage holds the embedding and takes tokens."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether the stage holds the final norm and the head and computes the loss."""
        return self.index == self.count - 1
