"""A whole training run in this process: sessions with their transports, joined by streams in memory.

Everything is what a peer runs but the network below the transport and the chain: claims stay in the outboxes.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import trio
import trio.testing

from chain.keys import PrivateKey, peer_id
from chain.transactions import Claim
from tdml_p2p.swarm.feed import ClientFeed
from tdml_p2p.swarm.inputs import Descriptor, InputsRefused, Senders, Wanted, decode_wanted, encode
from tdml_p2p.swarm.material import Unavailable
from tdml_p2p.swarm.outbox import Entry, Outbox
from tdml_p2p.swarm.preparation import Prepared
from tdml_p2p.swarm.reexecution import Cell
from tdml_p2p.swarm.session import Seat, WorkerSession
from tdml_p2p.swarm.states import fetch_state
from tdml_p2p.swarm.transport import SwarmTransport
from tdml_p2p.tensor_sessions import Frame, LinkLost
from tdml_p2p.tensors import TensorStreams
from tests.trainer.swarm_kit import PATIENCE, FakeGovernor, batches_of, manifest_of
from trainer.adapted_run import FrozenModel
from trainer.base_weights import stage_base
from trainer.coordinator import Coordinator
from trainer.coordinator_ports import CoordinatorConfig, CoordinatorPorts, Members, SwarmEvent
from trainer.manifest import TaskManifest
from trainer.stage import StageLike, build_stage
from trainer.state import StageState

T = TypeVar("T")
TASK = bytes(range(32))
CLIENT_KEY = PrivateKey(bytes([99]) * 32)
CLIENT = peer_id(CLIENT_KEY.account)
Factory = Callable[[TaskManifest, int], StageLike]


async def inline(work: Callable[..., T], /, *arguments: Any) -> T:
    """Return what `work` returns, without a thread that virtual time would not wait for."""
    await trio.lowlevel.checkpoint()
    return work(*arguments)


@contextmanager
def without_threads() -> Iterator[None]:
    """Let what goes to a thread run at once."""
    threaded = trio.to_thread.run_sync
    trio.to_thread.run_sync = inline  # type: ignore[assignment]
    try:
        yield
    finally:
        trio.to_thread.run_sync = threaded


class Wires:
    """Tensor streams between the peers of one program."""

    def __init__(self) -> None:
        self._ends: dict[str, trio.MemorySendChannel[Frame | LinkLost]] = {}

    def of(self, peer: str) -> TensorStreams:
        return cast(TensorStreams, _Streams(self, peer))

    def open(self, peer: str) -> "trio.MemoryReceiveChannel[Frame | LinkLost]":
        self._ends[peer], frames = trio.open_memory_channel[Frame | LinkLost](math.inf)
        return frames

    def deliver(self, to: str, frame: Frame) -> None:
        self._ends[to].send_nowait(frame)


@dataclass
class _Streams:
    wires: Wires
    peer: str

    def open_session(self, session: bytes) -> "trio.MemoryReceiveChannel[Frame | LinkLost]":
        assert session == TASK
        return self.wires.open(self.peer)

    def close_session(self, session: bytes) -> None:
        assert session == TASK

    async def send(
        self, peer: str, session: bytes, header: bytes, tensors: Sequence[memoryview], deadline: float
    ) -> None:
        await trio.lowlevel.checkpoint()
        copies = tuple(memoryview(bytes(tensor)) for tensor in tensors)
        self.wires.deliver(peer, Frame(self.peer, header, copies))


@dataclass
class Entries:
    """An outbox that keeps what is put in it."""

    claims: list[Entry] = field(default_factory=list)

    def put(self, entry: Entry) -> None:
        self.claims.append(entry)


class Run:
    """A run of `stages` × `replicas`; `factories` builds the stages of some workers, by (stage, replica)."""

    def __init__(
        self,
        manifest: TaskManifest | None = None,
        replicas: int = 1,
        factories: dict[tuple[int, int], Factory] | None = None,
        frozen: FrozenModel | None = None,
    ) -> None:
        self.frozen = frozen
        self.manifest = manifest or manifest_of(stages=2, steps=3)
        self.wires = Wires()
        self.sessions: dict[str, WorkerSession] = {}
        self.outboxes: dict[str, Entries] = {}
        self.transports: dict[str, SwarmTransport] = {}
        self.events: list[SwarmEvent] = []
        self.stages: list[tuple[str, ...]] = []
        self.states: tuple[StageState, ...] = ()
        places = [[(stage, replica) for replica in range(replicas)] for stage in range(self.manifest.stages)]
        for row in places:
            self.stages.append(tuple(self._seat(place, factories or {}) for place in row))
        prepared = Prepared(self.manifest, batches_of(self.manifest), cast(Any, None), frozen=frozen)
        self.feed = ClientFeed(CLIENT_KEY, TASK, prepared)
        self.client = self._transport(CLIENT_KEY)
        ports = CoordinatorPorts(
            FakeGovernor(Members(0, 0, tuple(self.stages))),
            prepared.batches,
            self.events.append,
            self._fetch_state,
            lambda step, stage: (b"", ()),
        )
        self.coordinator = Coordinator(CoordinatorConfig(self.manifest, PATIENCE), self.client, ports)

    async def train(self) -> None:
        """Run to the end of the training."""
        with without_threads():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.client.run)
                async with trio.open_nursery() as working:
                    for session in self.sessions.values():
                        working.start_soon(session.run, _compute, self.fetch)
                    self.states = await self.coordinator.run()
                nursery.cancel_scope.cancel()

    def claim(self, stage: int, step: int, replica: int = 0) -> Claim:
        """Return what a worker claimed of a step."""
        entries = self.outboxes[self.stages[stage][replica]].claims
        return next(entry for entry in entries if isinstance(entry, Claim) and entry.step == step)

    def cell(self, wanted: Wanted) -> Cell:
        """Return what an auditor knows of a cell from the chain."""
        before = self.stages[wanted.stage - 1] if wanted.stage else (CLIENT,)
        is_last = wanted.stage == self.manifest.stages - 1
        after = (CLIENT,) if is_last else self.stages[wanted.stage + 1]
        holders = tuple(dict.fromkeys((*self.stages[wanted.stage], *before, *after, CLIENT)))
        state = self.claim(wanted.stage, wanted.step).state_before
        return Cell(wanted, self.manifest, state, holders, Senders(frozenset(before), frozenset(after)))

    def describe(self, peer: str, wanted: Wanted) -> Descriptor | None:
        """Return what a peer says of a cell's inputs."""
        return self.feed.describe(wanted) if peer == CLIENT else self.sessions[peer].describe(wanted)

    async def ask(self, peer: str, request: bytes) -> bytes:
        """Answer a request for inputs as the peer's service does."""
        await trio.lowlevel.checkpoint()
        found = self.describe(peer, decode_wanted(request))
        if found is None:
            raise InputsRefused("this peer does not hold that cell")
        return encode(found)

    async def fetch(self, address: bytes, holders: Sequence[str]) -> memoryview:
        """Return a blob that one of `holders` has."""
        await trio.lowlevel.checkpoint()
        for holder in holders:
            found = self.feed.blob(address) if holder == CLIENT else self.sessions[holder].blob(address)
            if found is not None:
                return found
        raise Unavailable("nobody has it")

    def _seat(self, place: tuple[int, int], factories: dict[tuple[int, int], Factory]) -> str:
        stage, replica = place
        key = PrivateKey(bytes([10 * stage + replica + 1]) * 32)
        peer = peer_id(key.account)
        seat = Seat(TASK, CLIENT, stage, 4, self.manifest)
        self.outboxes[peer] = Entries()
        self.transports[peer] = self._transport(key)
        built = factories.get(place, build_stage)(self.manifest, stage)
        if self.frozen is not None:
            built.load_base(stage_base(self.frozen.base, self.manifest, stage))
        outbox = cast(Outbox, self.outboxes[peer])
        self.sessions[peer] = WorkerSession(seat, key, self.transports[peer], outbox, built)
        return peer

    def _transport(self, key: PrivateKey) -> SwarmTransport:
        peer = peer_id(key.account)
        return SwarmTransport(TASK, key, peer, self.wires.of(peer), lambda _: True)

    async def _fetch_state(self, root: bytes, holders: tuple[str, ...]) -> StageState:
        return await fetch_state(self.fetch, root, holders)


async def _compute(work: Callable[[], T], /) -> T:
    await trio.sleep(0.01)
    return work()
