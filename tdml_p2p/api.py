"""A run on a swarm as a Python object: the loop over its steps is the caller's."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import structlog
import trio

from tdml_p2p.config import PeerConfig, TrainConfig
from tdml_p2p.errors import UserError
from tdml_p2p.logs import configure_logs
from tdml_p2p.swarm.client import SwarmClient
from tdml_p2p.train import open_client

Event = dict[str, Any]


@dataclass(frozen=True)
class SwarmStep:
    """One committed step; `validation_loss` where it was measured, `shares` who did how much of it."""

    step: int
    loss: float
    learning_rate: float
    tokens_per_second: float
    seconds: float
    validation_loss: float | None
    shares: tuple[Event, ...]


class SwarmRun:
    """A run on the swarm that `join` leads to; under trio, `async with` opens it and `async for` gives its steps.

    Leaving early saves a state that `TrainConfig(resume=True)` goes on from. Both raise `UserError` for what the
    user can mend. `on_event` gets every event that `tdml-peer train --json` prints.
    """

    def __init__(
        self,
        train: TrainConfig,
        join: str = "",
        peer: PeerConfig | None = None,
        on_event: Callable[[Event], None] = lambda event: None,
    ) -> None:
        self.train = train
        peer = peer or PeerConfig(log_level="warning", status_port=-1)
        self._peer = replace(peer, join=(*peer.join, join)) if join else peer
        self._on_event = on_event
        self._send, self._steps = trio.open_memory_channel[SwarmStep](float("inf"))
        self._client: SwarmClient | None = None
        self._error: UserError | None = None
        self._opened: AbstractAsyncContextManager[None] | None = None
        self.code: int | None = None

    async def __aenter__(self) -> "SwarmRun":
        """Prepare the data, join the network and begin to train; raise `UserError`."""
        if not structlog.is_configured():
            configure_logs(self._peer.log_level)
        self._opened = self._open()
        await self._opened.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        """Stop what is not done yet, saving its state, and leave the network; raise `UserError`."""
        assert self._opened is not None  # __aenter__ came first
        return await self._opened.__aexit__(kind, error, trace)

    def __aiter__(self) -> AsyncIterator[SwarmStep]:
        """Return the steps, as they are committed; after a rollback some come again."""
        return self

    async def __anext__(self) -> SwarmStep:
        """Return the next step; raise `UserError` when the run has failed."""
        try:
            return await self._steps.receive()
        except trio.EndOfChannel:
            if self._error is not None:
                error, self._error = self._error, None
                raise error from None
            raise StopAsyncIteration from None

    def stop(self) -> None:
        """Stop training after saving a state to resume from; the loop over the steps then ends."""
        if self._client is not None:
            self._client.interrupt()

    @asynccontextmanager
    async def _open(self) -> AsyncIterator[None]:
        async with open_client(self._peer, self.train, self._report) as client:
            self._client = client
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._run, client)
                try:
                    yield
                finally:
                    self.stop()
        if self._error is not None:
            raise self._error
        if self.code is None:
            raise UserError("The peer stopped before the training was done.", "see its log")

    async def _run(self, client: SwarmClient) -> None:
        try:
            self.code = await client.run()
        except UserError as error:
            self._error = error
        finally:
            self._send.close()

    def _report(self, event: Event) -> None:
        self._on_event(event)
        if event["event"] == "step":
            self._send.send_nowait(
                SwarmStep(
                    step=event["step"],
                    loss=event["loss"],
                    learning_rate=event["learning_rate"],
                    tokens_per_second=event["tokens_per_second"],
                    seconds=event["seconds"],
                    validation_loss=event.get("validation_loss"),
                    shares=tuple(event["shares"]),
                )
            )


def train_on_swarm(train: TrainConfig, join: str, on_step: Callable[[SwarmStep], None] = lambda step: None) -> Path:
    """Train to the end, without an event loop of your own, and return the model folder; raise `UserError`."""

    async def follow() -> None:
        async with SwarmRun(train, join) as run:
            async for step in run:
                on_step(step)

    trio.run(follow)
    return train.out
