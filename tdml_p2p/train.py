"""`tdml-peer train`: post a task, feed its swarm, follow it on the chain, save the model."""

import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import trio

from tdml_p2p.config import PeerConfig, TrainConfig
from tdml_p2p.errors import USAGE, UserError
from tdml_p2p.home import Home
from tdml_p2p.logs import configure_logs
from tdml_p2p.peer import open_peer
from tdml_p2p.swarm.client import SwarmClient
from tdml_p2p.swarm.preparation import make_out, prepare

Report = Callable[[dict[str, Any]], None]


async def run_train(config: PeerConfig, train: TrainConfig, report: Report) -> int:
    """Train as the settings say; return 0, or 130 when interrupted with a resumable state saved.

    Raises `UserError` for everything that the user can mend. A second signal ends the process at once.
    """
    configure_logs(config.log_level)
    async with (
        open_client(config, train, report) as client,
        _interrupts() as interrupted,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(_stop_on, interrupted, client)
        try:
            return await client.run()
        finally:
            nursery.cancel_scope.cancel()
    raise UserError("The peer stopped before the training was done.", "see its log")


@asynccontextmanager
async def open_client(config: PeerConfig, train: TrainConfig, report: Report) -> AsyncIterator[SwarmClient]:
    """Prepare a run and open a peer for it, which neither works nor validates; raise `UserError`."""
    home = config.home or train.out / ".peer"
    client_config = replace(config, home=home, work=False, validate=False)
    prepared = await trio.to_thread.run_sync(prepare, train)
    if not config.join and not Home(home).genesis_path.exists():
        raise UserError(
            "There is no network to train on.", "give the invite line of a running peer with --join INVITE", USAGE
        )
    make_out(train.out)
    async with open_peer(client_config) as peer:
        yield SwarmClient(peer, prepared, train, report)


async def _stop_on(interrupted: trio.Event, client: SwarmClient) -> None:
    await interrupted.wait()
    client.interrupt()


@asynccontextmanager
async def _interrupts() -> AsyncIterator[trio.Event]:
    """Give an event that the first SIGINT or SIGTERM sets; the second one kills the process."""
    interrupted = trio.Event()

    async def watch() -> None:
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async for number in signals:
                if interrupted.is_set():
                    signal.signal(number, signal.SIG_DFL)
                    signal.raise_signal(number)
                interrupted.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        yield interrupted
        nursery.cancel_scope.cancel()
