"""A swarm of any shape inside one program, over the real coordinator and workers and an in-memory network."""

from collections.abc import Callable
from typing import TypeVar

import trio
import trio.testing

from trainer.coordinator import Coordinator
from trainer.coordinator_ports import CoordinatorConfig, CoordinatorPorts, Members, Patience, SwarmEvent
from trainer.data import Batches
from trainer.manifest import TaskManifest
from trainer.stage import build_stage
from trainer.state import StageState
from trainer.transport import Faults, InMemoryHub
from trainer.worker import Worker
from trainer.worker_ports import StateUnavailable, WorkerConfig, WorkerPorts
from trainer.worker_step import StepRecord

T = TypeVar("T")
CLIENT = "client"
_CELL_SECONDS = 0.01


class _Settled:
    """A chain on which every step settles at once."""

    def __init__(self, members: Members) -> None:
        self._members = members

    def current(self) -> Members:
        return self._members

    async def admit(self, step: int) -> Members:
        await trio.lowlevel.checkpoint()
        return self._members

    async def settled(self, step: int) -> Members:
        await trio.lowlevel.checkpoint()
        return self._members


def train(manifest: TaskManifest, batches: Batches, faults: Faults | None = None) -> tuple[StageState, ...]:
    """Return the last state of every stage of a run with the manifest's stages and replicas, in virtual time.

    Workers are called s0r0 and so on; `faults` says who dies when.
    """
    return trio.run(_train, manifest, batches, faults, clock=trio.testing.MockClock(autojump_threshold=0))


async def _train(manifest: TaskManifest, batches: Batches, faults: Faults | None) -> tuple[StageState, ...]:
    names = tuple(tuple(f"s{s}r{r}" for r in range(manifest.replicas)) for s in range(manifest.stages))
    hub, workers = InMemoryHub(faults), dict[str, Worker]()

    async def fetch(root: bytes, holders: tuple[str, ...]) -> StageState:
        await trio.lowlevel.checkpoint()
        for state in (state for holder in holders for state in workers[holder].states):
            if state.root == root:
                return state
        raise StateUnavailable

    ports = CoordinatorPorts(_Settled(Members(0, 0, names)), batches, _ignore, fetch)
    patience = Patience(factor=8.0, floor=10.0, first=60.0, join=20.0, empty=600.0, tick=1.0)
    coordinator = Coordinator(CoordinatorConfig(manifest, patience, 0), hub.join(CLIENT), ports)
    async with trio.open_nursery() as nursery:
        for index, stage in enumerate(names):
            for peer in stage:
                config = WorkerConfig(CLIENT, build_stage(manifest, index), manifest, ring_depth=2)
                scope = trio.CancelScope()
                workers[peer] = Worker(config, hub.join(peer, scope.cancel), WorkerPorts(_inline, fetch, _forget))
                nursery.start_soon(_live, workers[peer], scope)
        states = await coordinator.run()
        nursery.cancel_scope.cancel()
    return states


async def _live(worker: Worker, scope: trio.CancelScope) -> None:
    with scope:
        await worker.run()


async def _inline(work: Callable[[], T], /) -> T:
    await trio.sleep(_CELL_SECONDS)
    return work()


async def _forget(record: StepRecord) -> None:
    await trio.lowlevel.checkpoint()


def _ignore(event: SwarmEvent) -> None:
    pass
