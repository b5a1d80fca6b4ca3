"""A real engine with real files dies before or after each of its durable writes, and starts again from them."""

import shutil
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from chain.blocks import Proposal, Vote, decode_message
from chain.engine import ChainEngine
from chain.genesis import Genesis
from chain.keys import PrivateKey, peer_id
from tests.chain import hub as hubs
from tests.chain.hub import Hub, Link, genesis_of, keys, running, until_height
from tests.simulation.oracle import incriminated, said_by

HEIGHTS = 3
WRITES = range(HEIGHTS * 4)
"""A validator writes up to four times a height: proposal, notarization, finalization and the block."""


@dataclass(frozen=True)
class _Death:
    """At which durable write the first member dies, what is left of it, and how far the network goes then."""

    write: int
    is_after: bool
    is_lost: bool = False
    heights: int = HEIGHTS + 1


class _Died(BaseException):
    """The machine loses power; nothing may catch it."""


def _mortal(engine: ChainEngine, numbers: "count[int]", deadly: int, *, after: bool) -> None:
    """Let the engine die at one of its durable writes."""

    def guarded(write: Callable[..., Any]) -> Callable[..., Any]:
        def act(*arguments: Any) -> Any:
            number = next(numbers)
            if number == deadly and not after:
                raise _Died
            result = write(*arguments)
            if number == deadly:
                raise _Died
            return result

        return act

    files: Any = engine._files
    files.sign, files.commit = guarded(files.sign), guarded(files.commit)


async def _live(hub: Hub, home: Path, genesis: Genesis, key: PrivateKey, death: _Death) -> int:
    """Run an engine until it dies, then again, from an empty home if its own is lost; return how often it died."""
    numbers, deaths = count(), 0
    while True:
        try:
            async with running(hub, home, genesis, key) as engine:
                _mortal(engine, numbers, death.write, after=death.is_after)
                await _reached(engine, death.heights)
                return deaths
        except* _Died:
            deaths += 1
            if death.is_lost:
                shutil.rmtree(home)
        await trio.sleep(0.3)


async def _reached(engine: ChainEngine, height: int) -> None:
    """Wait for the last height; an engine that dies closes the channel of its blocks before the task ends."""
    try:
        await until_height(engine, height)
    except trio.EndOfChannel:
        await trio.sleep_forever()


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("deadly", WRITES)
async def test_nothing_is_lost_and_nothing_signed_twice(
    deadly: int, after: bool, tmp_path: Path, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = keys(3)  # whom nobody can outvote: the height waits for the one that died
    said = await _said_around(_Death(deadly, after), members, tmp_path, monkeypatch)
    assert not incriminated((members[0].account, said_by(vote)) for vote in said), peer_id(members[0].account)


@pytest.mark.parametrize("deadly", [9, 11, 14])
async def test_a_validator_whose_home_is_lost_contradicts_nothing_that_it_has_forgotten(
    deadly: int, tmp_path: Path, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    members, death = keys(4), _Death(deadly, True, is_lost=True, heights=12)
    said = await _said_around(death, members, tmp_path, monkeypatch)
    assert not incriminated((members[0].account, said_by(vote)) for vote in said)
    assert max(vote.height for vote in said) >= death.heights - 1, "it votes again"


async def _said_around(
    death: _Death, members: list[PrivateKey], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> list[Vote]:
    """Return the votes of the first member of a network, which dies at a durable write and comes back."""
    hub, genesis = Hub(), genesis_of(members, [], heartbeat_ms=1000)
    said: list[Vote] = []
    publish = Link.publish

    async def overheard(link: Link, topic: str, data: bytes) -> None:
        message = decode_message(data) if topic in ("vote", "block") else None
        said.extend([message] if isinstance(message, Vote) else [])
        said.extend([message.vote] if isinstance(message, Proposal) else [])
        await publish(link, topic, data)

    monkeypatch.setattr(hubs.Link, "publish", overheard)
    async with AsyncExitStack() as stack:
        others = [
            await stack.enter_async_context(running(hub, folder / str(i), genesis, key))
            for i, key in enumerate(members[1:], 1)
        ]
        with trio.fail_after(120):
            deaths = await _live(hub, folder / "0", genesis, members[0], death)
            for engine in others:
                await until_height(engine, death.heights)
    assert deaths == 1
    assert hub.refused == []
    assert hub.penalized == []
    assert all(not engine.state.validator(members[0].account).is_tombstoned for engine in others)  # type: ignore[union-attr]
    own = [vote for vote in said if vote.validator == members[0].account]
    assert own
    return own
