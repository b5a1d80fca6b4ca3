"""Spans of a peer's work for `train --trace`: recorded into a bounded ring, or nowhere at next to no cost.

A task enters a `lane` and wraps its work in `span`; threads that trio starts for it inherit the lane. The spans
of a lane nest, because one lane belongs to one task. Where no recorder was entered, nothing is kept.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Annotated, NamedTuple

import msgspec

RING = 1 << 16
MAX_REPLY_SPANS = 4096

_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=32)]
_Index = Annotated[int, msgspec.Meta(ge=-1, le=2**31)]
_Nanoseconds = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class Span(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A piece of work: lane, name, start and length in nanoseconds of the peer's clock; -1 is no step or cell."""

    lane: _Name
    name: _Name
    start: _Nanoseconds
    length: _Nanoseconds
    step: _Index = -1
    cell: _Index = -1


class Recorder:
    """The newest `size` spans of one peer and task; `clock` counts nanoseconds.

    It is off until somebody keeps it on, for some time after each `keep_on`.
    """

    def __init__(self, size: int = RING, clock: Callable[[], int] = time.perf_counter_ns) -> None:
        self.clock = clock
        self.recorded = 0
        self._until = 0
        self._spans: deque[Span] = deque(maxlen=size)

    @property
    def is_on(self) -> bool:
        """Whether spans are kept now."""
        return self._until != 0 and self.clock() < self._until

    def keep_on(self, nanoseconds: int) -> None:
        """Keep spans for so long from now."""
        self._until = self.clock() + nanoseconds

    def add(self, span: Span) -> None:
        """Keep a span, pushing out the oldest."""
        self._spans.append(span)
        self.recorded += 1

    def since(self, position: int, most: int = MAX_REPLY_SPANS) -> tuple[int, tuple[Span, ...]]:
        """Return up to `most` kept spans from the `position`-th recorded on, and the position of the first."""
        kept = tuple(self._spans)
        first = self.recorded - len(kept)
        position = max(position, first)
        return position, kept[position - first : position - first + most]


class _Lane(NamedTuple):
    recorder: Recorder
    name: str


_lane: ContextVar[_Lane | None] = ContextVar("trace lane", default=None)
_off: AbstractContextManager[None] = nullcontext()


def recording(recorder: Recorder | None) -> AbstractContextManager[None]:
    """Let a recorder see what this task, and those it starts, do from now on; None sees nothing."""
    return _entered(_Lane(recorder, "peer") if recorder is not None else None)


def lane(name: str) -> AbstractContextManager[None]:
    """Put the spans of this task into a lane of that name."""
    current = _lane.get()
    return _off if current is None else _entered(_Lane(current.recorder, name[:32]))


def span(name: str, step: int = -1, cell: int = -1) -> AbstractContextManager[None]:
    """Record the time that the body takes."""
    current = _lane.get()
    return _off if current is None or not current.recorder.is_on else _timed(current, name, step, cell)


def note(lane_name: str, name: str, times: tuple[int, int], step: int = -1, cell: int = -1) -> None:
    """Record a span of another lane whose start and end, in nanoseconds of the recorder's clock, are known."""
    current = _lane.get()
    if current is not None and current.recorder.is_on:
        start, end = times
        current.recorder.add(Span(lane_name[:32], name, start, max(end - start, 0), step, cell))


@contextmanager
def _entered(entered: _Lane | None) -> Iterator[None]:
    token = _lane.set(entered)
    try:
        yield
    finally:
        _lane.reset(token)


@contextmanager
def _timed(current: _Lane, name: str, step: int, cell: int) -> Iterator[None]:
    clock = current.recorder.clock
    start = clock()
    try:
        yield
    finally:
        current.recorder.add(Span(current.name, name, start, clock() - start, step, cell))
