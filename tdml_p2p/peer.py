"""The composition root: everything that one peer is made of, in one nursery."""

import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog
import trio

from chain import queries
from chain.engine import ChainEngine, EngineConfig, SubmitRefused, TransactionExpired
from chain.genesis import Genesis
from chain.keys import PrivateKey, peer_id
from chain.ledger import Receipt
from chain.light import Trust
from chain.randomness import onion_of
from chain.state import Task
from chain.store import LEAST_KEPT, Store, StoreCorrupt
from chain.transactions import Payload
from tdml_p2p.bootstrap import find_origin, join_network, serve_genesis
from tdml_p2p.chain_service import ChainService, NetworkAdapter
from tdml_p2p.config import PeerConfig
from tdml_p2p.control import ApiError, ControlServer
from tdml_p2p.errors import USAGE, UserError
from tdml_p2p.home import Home, default_home
from tdml_p2p.host import Network, NetworkConfig
from tdml_p2p.http_status import build_page, build_status, own_workers
from tdml_p2p.http_watch import EventFeed
from tdml_p2p.invite import invite_line
from tdml_p2p.listen import listen_addresses
from tdml_p2p.logs import configure_logs
from tdml_p2p.metrics import Metrics
from tdml_p2p.plain_errors import plain_errors
from tdml_p2p.remote import serve_queries
from tdml_p2p.wallet import Holdings, Wallet, next_onion

if TYPE_CHECKING:
    from trio_typing import TaskStatus

    from tdml_p2p.swarm.service import StageFactory, SwarmService

log = structlog.get_logger("tdml.peer")

_LEAVE_SECONDS = 4.0
"""How long a peer that was told to stop waits for the chain to take back its seats."""
_HAND_OVER_SECONDS = 120.0
"""How long it then serves its state to a newcomer who has the stage alone."""

Report = Callable[[dict[str, Any]], None]
INCLUSION_TIMEOUT = 60.0
QUERY_THREADS = 2


class Peer:
    """One running peer; `open_peer` makes it and ends it."""

    def __init__(self, config: PeerConfig, home: Home, key: PrivateKey, genesis: Genesis, network: Network) -> None:
        self.config = config
        self.home = home
        self.key = key
        self.name = peer_id(key.account)
        self.genesis = genesis
        self.network = network
        self.metrics = Metrics()
        settings = EngineConfig(
            validate=config.validate, snapshot=config.snapshot, keep=config.keep, trust=_trust(config)
        )
        self.engine = ChainEngine(home.path, genesis, key, NetworkAdapter(network), settings)
        self.chain = ChainService(network, self.engine, self.metrics, _now_ms)
        self.invite = invite_line(network.addresses, self.name, genesis.chain_id)
        self.status_url: str | None = None
        self.swarm: SwarmService | None = None
        self._query_limit = trio.CapacityLimiter(QUERY_THREADS)
        self._started = trio.current_time()

    def uptime(self) -> float:
        """Return the seconds since this peer started."""
        return trio.current_time() - self._started

    async def submit(self, payload: Payload) -> Receipt:
        """Sign and gossip `payload` until it is in a final block, and return its receipt.

        Raises `chain.engine.SubmitRefused` or `TransactionExpired` when it is not included.
        """
        return await self.engine.receipt(await self.engine.submit(payload))

    # what the control interface asks for

    def status(self) -> dict[str, Any]:
        """Return the status, ready for JSON."""
        return build_status(self)

    def page(self) -> dict[str, Any]:
        """Return what the status page shows, ready for JSON."""
        return build_page(self)

    def render_metrics(self) -> bytes:
        """Return the Prometheus text of every metric."""
        build_status(self)
        return self.metrics.render()

    async def open_tasks(self) -> list[dict[str, Any]]:
        """Return the open tasks that the DHT knows and the chain confirms."""
        state = self.engine.state
        listed = {record.record for record in await self.network.discovery.find("tasks")}
        return [
            {
                "task": task.id.hex(),
                "client": peer_id(task.client),
                "status": str(task.state),
                "stages": task.stages,
                "replicas": task.replicas,
                "redundancy": task.redundancy,
                "steps": task.steps,
                "settled": task.settled,
                "price": str(task.price),
                "escrow": str(task.escrow),
                "announced": task.id in listed,
            }
            for task in state.open_tasks()
        ]

    async def answer(self, query: str, params: Mapping[str, str]) -> Any:
        """Return the inspector's answer; raise `ApiError`."""
        reader = self.engine.reader
        ask = partial(_answer, self.home.chain_path, reader, query, dict(params))
        return await trio.to_thread.run_sync(ask, limiter=self._query_limit)

    async def transact(self, payload: Payload) -> dict[str, Any]:
        """Submit `payload` and return its id and height; raise `ApiError` with the reason."""
        try:
            with trio.fail_after(INCLUSION_TIMEOUT):
                receipt = await self.submit(payload)
        except SubmitRefused as error:
            raise ApiError(409, f"The transaction cannot be sent: {error.reason}.", "see `status`") from None
        except (trio.TooSlowError, TransactionExpired):
            raise ApiError(
                504, "The transaction was not included in time.", "the chain may wait; see `status`"
            ) from None
        if not receipt.ok:
            raise ApiError(409, f"The ledger refused it: {receipt.reason}.", "see `tdml-chain account`")
        return {"id": receipt.tx_id.hex(), "height": self.engine.state.height}

    async def replay(self, identity: str) -> dict[str, Any]:
        """Execute the cell of an audit again and return how it compares with the claim; raise `ApiError`."""
        from tdml_p2p.swarm.replay import NotReplayable, audit_id

        assert self.swarm is not None  # every peer has a swarm service
        try:
            return await self.swarm.replay(audit_id(identity))
        except NotReplayable as error:
            raise ApiError(404, error.sentence, error.hint) from None

    def feed(self) -> AbstractAsyncContextManager[EventFeed]:
        """Subscribe to the events of final blocks."""
        return self.chain.feed(self.home.chain_path)

    # what the wallet asks for

    def holdings(self) -> Holdings | None:
        """Return what this peer's account holds, None while the chain is behind."""
        state, account = self.engine.state, self.key.account
        if self.engine.status()["syncing"]:
            return None
        own, validator = state.account(account), state.validator(account)
        return Holdings(
            height=state.height,
            balance=own.balance,
            bonded=own.bonded,
            nonce=own.nonce,
            grant=state.params.faucet_grant,
            lease_blocks=state.params.lease_blocks,
            is_granted=own.granted,
            is_registered=validator is not None,
            may_unjail=validator is not None
            and validator.is_jailed
            and not validator.is_tombstoned
            and state.height >= validator.jailed_until
            and own.bonded >= state.params.min_stake,
            next_onion=next_onion(self.key, validator),
            leases=tuple(
                (worker.task, worker.lease_until)
                for worker in own_workers(state, account)
                if str(worker.state) in ("spare", "seated") and _is_open(state.task(worker.task))
            ),
        )

    async def next_block(self) -> None:
        """Wait until another block is final."""
        await self.chain.next_block()


@asynccontextmanager
async def open_peer(
    config: PeerConfig, *, stage_factory: "StageFactory | None" = None, report: Report | None = None
) -> AsyncIterator[Peer]:
    """Run one peer while the block runs; raise `UserError` for everything that its owner can mend.

    `stage_factory` replaces how stages of tasks are built; `report` receives the `ready` event.
    """
    _check(config)
    with plain_errors():
        async with _open(config, stage_factory) as peer:
            if report is not None:
                report(
                    {
                        "event": "ready",
                        "peer": peer.name,
                        "invite": peer.invite,
                        "status_url": peer.status_url,
                        "height": peer.engine.state.height,
                    }
                )
            yield peer


def _trust(config: PeerConfig) -> Trust | None:
    try:
        return Trust.parse(config.trust) if config.trust else None
    except ValueError as error:
        raise UserError(f"--trust: {error}.", "tdml-chain block latest shows height and hash", USAGE) from None


def _check(config: PeerConfig) -> None:
    if config.device not in ("auto", "cpu"):
        raise UserError(f"--device {config.device} is not supported yet.", "peers compute on the CPU: use cpu", USAGE)
    if config.memory < 0:
        raise UserError("--memory cannot be negative.", "0 sets the usual bound", USAGE)
    if config.grace < 1:
        raise UserError(f"--grace cannot be {config.grace}.", "give seconds, 1 or more", USAGE)
    if 0 != config.keep < LEAST_KEPT:
        raise UserError(
            f"--keep cannot be {config.keep}.", f"peers catch up from the newest {LEAST_KEPT} blocks: keep them", USAGE
        )
    _trust(config)
    if config.threads < 1:
        raise UserError(f"--threads cannot be {config.threads}.", "give 1 or more", USAGE)


@asynccontextmanager
async def _open(config: PeerConfig, stage_factory: "StageFactory | None") -> AsyncIterator[Peer]:
    home = Home(config.home or default_home())
    home.create()
    with home.lock():
        key = home.load_key()
        origin = find_origin(home, key, config.join, _now_ms())
        network_config = NetworkConfig(
            listen=listen_addresses(config.listen, key.account),
            bootstrap=tuple(invite.address for invite in origin.invites if invite.peer != peer_id(key.account)),
            home=home.path,
        )
        async with Network.open(network_config, key, origin.chain_id) as network:
            genesis = await join_network(network, origin)
            home.save_genesis(genesis)
            serve_genesis(network, genesis)
            peer = Peer(config, home, key, genesis, network)
            serve_queries(network, peer.answer)
            control = ControlServer(peer, home.socket_path, _status_port(config))
            peer.status_url = control.status_url
            # A service that fails to start must not leave the sockets behind.
            with closing(control):
                async with trio.open_nursery() as nursery:
                    for service in _services(peer, control, stage_factory):
                        await nursery.start(service)
                    nursery.start_soon(peer.metrics.watch_stalls)
                    yield peer
                    nursery.cancel_scope.cancel()


def _services(
    peer: Peer, control: ControlServer, stage_factory: "StageFactory | None"
) -> list[Callable[..., Awaitable[None]]]:
    """Return everything that runs beside the network, in the order of starting."""
    from tdml_p2p.swarm.service import SwarmService

    peer.swarm = SwarmService(peer, stage_factory)
    tips = (lambda number: onion_of(peer.key, number).tip) if peer.config.validate else None
    wallet = Wallet(peer, tips)
    return [peer.chain.run, peer.swarm.run, wallet.run, control.run]


async def run_start(config: PeerConfig, report: Report, stage_factory: "StageFactory | None" = None) -> int:
    """Run a daemon until SIGINT or SIGTERM and return its exit code; a second signal forces.

    `stage_factory` replaces how stages of tasks are built.
    """
    configure_logs(config.log_level)
    with plain_errors():
        async with trio.open_nursery() as nursery:
            starting, serving, ready = trio.CancelScope(), trio.CancelScope(), trio.Event()
            await nursery.start(_watch_signals, starting, serving, ready)
            with starting:
                async with open_peer(config, stage_factory=stage_factory, report=report) as peer:
                    ready.set()
                    with serving:
                        await trio.sleep_forever()
                    await _leave(peer)
            nursery.cancel_scope.cancel()
    return 0


async def _leave(peer: Peer) -> None:
    """Give up the peer's seats before it stops, so that the swarms it works in need not find out."""
    assert peer.swarm is not None  # every peer has a swarm service
    with trio.move_on_after(_LEAVE_SECONDS) as leaving:
        await peer.swarm.leaving.leave()
    if not leaving.cancelled_caught:
        with trio.move_on_after(_HAND_OVER_SECONDS):
            await peer.swarm.leaving.hand_over()


async def _watch_signals(
    starting: trio.CancelScope,
    serving: trio.CancelScope,
    ready: trio.Event,
    *,
    task_status: "TaskStatus[None]" = trio.TASK_STATUS_IGNORED,
) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        task_status.started()
        async for received in signals:
            if serving.cancel_called:
                os._exit(128 + received)
            log.info("stopping", signal=signal.Signals(received).name)
            serving.cancel()
            if not ready.is_set():  # a peer that serves leaves its seats first
                starting.cancel()


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _is_open(task: Task | None) -> bool:
    return task is not None and task.is_open


def _status_port(config: PeerConfig) -> int | None:
    """Return the port of the status page: 0 is any free one, a negative one none."""
    return None if config.status_port < 0 else config.status_port


def _answer(path: Path, live: queries.Reader, query: str, arguments: dict[str, str]) -> Any:
    """Answer from a connection of its own, so that a long query neither blocks nor sees half a block."""
    try:
        with closing(Store.open_read_only(path)) as store:
            return queries.answer(replace(live, store=store), query, arguments)
    except queries.NotFound as error:
        raise ApiError(404, error.message, error.hint) from None
    except queries.BadQuery as error:
        raise ApiError(400, error.message, error.hint) from None
    except StoreCorrupt as error:
        raise ApiError(500, str(error), "see `tdml-chain db check`") from None
