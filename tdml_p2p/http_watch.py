"""`GET /chain/watch`: the events of final blocks as JSON lines, from any height on."""

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import trio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

MAX_TOPICS = 64


@dataclass(frozen=True)
class Watch:
    """What to stream: heights from `start` (None: new ones), kinds (empty: all), lines (None: endless)."""

    start: int | None = None
    topics: frozenset[str] = frozenset()
    count: int | None = None


class EventFeed(Protocol):
    """A subscription that has started: history is read first, then new blocks as they become final."""

    height: int

    async def past(self, height: int) -> Iterable[dict[str, Any]]:
        """Return the lines of one final block."""
        ...

    def __aiter__(self) -> AsyncIterator[int]:
        """Iterate over the heights that become final."""
        ...


def parse_watch(params: dict[str, str]) -> Watch:
    """Return what the query string asks for; raise `ValueError` in one plain phrase."""
    topics = frozenset(filter(None, params.get("topics", "").split(",")))
    if len(topics) > MAX_TOPICS:
        raise ValueError(f"More than {MAX_TOPICS} topics")
    return Watch(_number(params, "from"), topics, _number(params, "count"))


def _number(params: dict[str, str], name: str) -> int | None:
    text = params.get(name, "")
    if not text:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise ValueError(f"{name} is not a number: {text[:40]!r}")
    return int(text)


class WatchResponse(Response):
    """Streams the lines of a `Watch` until its count is reached or the reader leaves."""

    media_type = "application/x-ndjson"

    def __init__(self, feed: Callable[[], AbstractAsyncContextManager[EventFeed]], watch: Watch) -> None:
        super().__init__(headers={"cache-control": "no-store"})
        del self.headers["content-length"]
        self._feed = feed
        self._watch = watch
        self._left = watch.count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the stream (ASGI)."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_cancel_on_disconnect, receive, nursery.cancel_scope)
            async with self._feed() as feed:
                await self._stream(feed, send)
            nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 1.0):
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _stream(self, feed: EventFeed, send: Send) -> None:
        following = feed.height + 1
        for height in range(following if self._watch.start is None else self._watch.start, following):
            await self._send_block(feed, height, send)
            if self._left == 0:
                return
        async for height in feed:
            if height < following:
                continue
            await self._send_block(feed, height, send)
            if self._left == 0:
                return

    async def _send_block(self, feed: EventFeed, height: int, send: Send) -> None:
        for line in await feed.past(height):
            if self._watch.topics and line["kind"] not in self._watch.topics:
                continue
            if self._left == 0:
                return
            body = msgspec.json.encode(line) + b"\n"
            await send({"type": "http.response.body", "body": body, "more_body": True})
            self._left = None if self._left is None else self._left - 1


async def _cancel_on_disconnect(receive: Receive, scope: trio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()
