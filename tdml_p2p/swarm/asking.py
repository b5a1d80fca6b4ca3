"""Asking others for material without being held up by those who are silent: in turn, all at once, within a time."""

import math
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import trio

from tdml_p2p.swarm.material import Unavailable

PATIENCE_SECONDS = 3.0
"""How long one peer may keep a question to itself; then the next one is asked as well."""
_LAST_SECONDS = 1.0

A = TypeVar("A")
B = TypeVar("B")
T = TypeVar("T")


class Limit:
    """Ends what is being asked for, once and for all: answers that are on their way have a second more."""

    def __init__(self) -> None:
        self.is_over = False
        self._asking: set[trio.CancelScope] = set()

    def end(self) -> None:
        """Have what is asked for now, or later, unavailable in a second."""
        if not self.is_over:
            self.is_over = True
            for scope in self._asking:
                scope.deadline = trio.current_time() + _LAST_SECONDS

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Leave what is inside as soon as the time is over."""
        with trio.CancelScope(deadline=trio.current_time() + _LAST_SECONDS if self.is_over else math.inf) as scope:
            self._asking.add(scope)
            try:
                yield
            finally:
                self._asking.discard(scope)


_limit: ContextVar[Limit | None] = ContextVar("limit", default=None)


@contextmanager
def limited_by(limit: Limit | None) -> Iterator[None]:
    """Have everything that is asked for inside end with a limit, or with none."""
    token = _limit.set(limit)
    try:
        yield
    finally:
        _limit.reset(token)


def timely(ask: Callable[[A, B], Awaitable[T]]) -> Callable[[A, B], Awaitable[T]]:
    """Return `ask`, which is `Unavailable` when the limit of its caller ends."""

    async def asked(first: A, second: B) -> T:
        limit = _limit.get()
        if limit is None:
            return await ask(first, second)
        with limit.asking():
            return await ask(first, second)
        raise Unavailable("it did not come in time")

    return asked


async def in_turn(peers: Sequence[str], attempt: Callable[[str], Awaitable[bool]]) -> None:
    """Ask one peer after the other until an attempt succeeds; who is slow is not waited for alone."""
    async with trio.open_nursery() as nursery:

        async def one(peer: str, ended: trio.Event) -> None:
            if await attempt(peer):
                nursery.cancel_scope.cancel()
            ended.set()

        for peer in peers:
            ended = trio.Event()
            nursery.start_soon(one, peer, ended)
            with trio.move_on_after(PATIENCE_SECONDS):
                await ended.wait()


async def all_of(wanted: Sequence[A], get: Callable[[A], Awaitable[T]]) -> list[T]:
    """Return what is got for each, all asked for at once; raise the first `Unavailable`."""
    got: dict[int, T] = {}
    failures: list[Unavailable] = []
    async with trio.open_nursery() as nursery:

        async def one(place: int, what: A) -> None:
            try:
                got[place] = await get(what)
            except Unavailable as error:
                failures.append(error)
                nursery.cancel_scope.cancel()

        for place, what in enumerate(wanted):
            nursery.start_soon(one, place, what)
    if failures:
        raise failures[0]
    return [got[place] for place in range(len(wanted))]
