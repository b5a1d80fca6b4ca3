"""Asking within a time: what hangs ends, what computes does not, and the silent are not waited for alone."""

import pytest
import trio
import trio.testing

from tdml_p2p.swarm.asking import PATIENCE_SECONDS, Limit, all_of, in_turn, limited_by, timely
from tdml_p2p.swarm.material import Unavailable


async def after(seconds: float, what: str) -> str:
    await trio.sleep(seconds)
    return what


async def test_without_a_limit_an_answer_may_take_its_time(autojump_clock: trio.testing.MockClock) -> None:
    assert await timely(after)(1e6, "late") == "late"


async def test_what_is_asked_for_ends_a_second_after_the_limit(autojump_clock: trio.testing.MockClock) -> None:
    limit = Limit()
    async with trio.open_nursery() as nursery:
        with limited_by(limit):
            nursery.start_soon(end, limit, 5.0)
            assert await timely(after)(5.9, "soon enough") == "soon enough"
            started = trio.current_time()
            with pytest.raises(Unavailable, match="in time"):
                await timely(after)(60.0, "never")
            assert trio.current_time() - started == pytest.approx(1.0)
            assert await timely(after)(0.5, "at once") == "at once"
            await trio.sleep(100)  # whatever is no question goes on
        assert await timely(after)(60.0, "free") == "free"


async def end(limit: Limit, seconds: float) -> None:
    await trio.sleep(seconds)
    limit.end()
    limit.end()


async def test_a_limit_inside_a_limit_is_the_one_that_counts(autojump_clock: trio.testing.MockClock) -> None:
    limit = Limit()
    limit.end()
    with limited_by(limit):
        with limited_by(None):
            assert await timely(after)(60.0, "kept") == "kept"
        with pytest.raises(Unavailable):
            await timely(after)(60.0, "never")


async def test_the_next_peer_is_asked_while_one_is_silent(autojump_clock: trio.testing.MockClock) -> None:
    asked: list[tuple[str, float]] = []

    async def attempt(peer: str) -> bool:
        asked.append((peer, trio.current_time()))
        if peer == "silent":
            await trio.sleep_forever()
        return peer == "knows"

    started = trio.current_time()
    await in_turn(("silent", "ignorant", "knows", "spared"), attempt)
    assert [(peer, at - started) for peer, at in asked] == [
        ("silent", 0.0),
        ("ignorant", PATIENCE_SECONDS),
        ("knows", PATIENCE_SECONDS),
    ]


async def test_where_nobody_knows_everybody_is_heard(autojump_clock: trio.testing.MockClock) -> None:
    heard: list[str] = []

    async def attempt(peer: str) -> bool:
        await trio.sleep(2 * PATIENCE_SECONDS)
        heard.append(peer)
        return False

    await in_turn(("a", "b"), attempt)
    assert heard == ["a", "b"]


async def test_all_are_asked_for_at_once_and_one_that_is_missing_ends_it(
    autojump_clock: trio.testing.MockClock,
) -> None:
    started = trio.current_time()
    assert await all_of((3.0, 1.0, 2.0), lambda seconds: after(seconds, str(seconds))) == ["3.0", "1.0", "2.0"]
    assert trio.current_time() - started == 3.0

    async def get(what: str) -> str:
        if what == "missing":
            raise Unavailable(what)
        return await after(1e6, what)

    with pytest.raises(Unavailable, match="missing"):
        await all_of(("there", "missing"), get)
    assert trio.current_time() - started == 3.0
