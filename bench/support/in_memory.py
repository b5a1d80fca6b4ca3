"""A swarm of any shape inside one program, over the real coordinator and workers and an in-memory network."""

from collections.abc import Callable
from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class Trouble:
    """What happens to a run: who dies, who pauses for `seconds` at a piece of work, who comes to a stage at a step."""

    faults: Callable[[], Faults] = Faults
    pause: tuple[str, int, float] | None = None
    joiner: tuple[str, int, int] | None = None


QUIET = Trouble()


class _Settled:
    """A chain on which every step settles at once; at the step of `on_step` somebody may come."""

    def __init__(self, members: Members, on_step: Callable[[int, Members], Members]) -> None:
        self._members = members
        self._on_step = on_step

    def current(self) -> Members:
        return self._members

    async def admit(self, step: int) -> Members:
        await trio.lowlevel.checkpoint()
        self._members = self._on_step(step, self._members)
        return self._members

    async def settled(self, step: int) -> Members:
        await trio.lowlevel.checkpoint()
        return self._members


def train(manifest: TaskManifest, batches: Batches, trouble: Trouble = QUIET) -> tuple[StageState, ...]:
    """Return the last state of every stage of a run with the manifest's stages and replicas, in virtual time.

    Workers are called s0r0 and so on.
    """
    return trio.run(_train, manifest, batches, trouble, clock=trio.testing.MockClock(autojump_threshold=0))


async def _train(manifest: TaskManifest, batches: Batches, trouble: Trouble) -> tuple[StageState, ...]:
    names = tuple(tuple(f"s{s}r{r}" for r in range(manifest.replicas)) for s in range(manifest.stages))
    hub, workers = InMemoryHub(trouble.faults()), dict[str, Worker]()

    async def fetch(root: bytes, holders: tuple[str, ...]) -> StageState:
        await trio.lowlevel.checkpoint()
        for state in (state for holder in holders for state in workers[holder].states):
            if state.root == root:
                return state
        raise StateUnavailable

    def start(peer: str, index: int) -> None:
        config = WorkerConfig(CLIENT, build_stage(manifest, index), manifest, ring_depth=2)
        scope = trio.CancelScope()
        compute = _Inline(trouble.pause[1:] if trouble.pause and trouble.pause[0] == peer else (0, 0.0))
        workers[peer] = Worker(config, hub.join(peer, scope.cancel), WorkerPorts(compute, fetch, _forget))
        nursery.start_soon(_live, workers[peer], scope)

    def on_step(step: int, members: Members) -> Members:
        if trouble.joiner is None or step != trouble.joiner[2] or trouble.joiner[0] in workers:
            return members
        peer, stage, _ = trouble.joiner
        start(peer, stage)
        seats = tuple((*held, peer) if index == stage else held for index, held in enumerate(members.stages))
        return replace(members, stages=seats)

    ports = CoordinatorPorts(_Settled(Members(0, 0, names), on_step), batches, _ignore, fetch)
    patience = Patience(factor=8.0, floor=10.0, first=60.0, join=20.0, empty=600.0, tick=1.0)
    coordinator = Coordinator(CoordinatorConfig(manifest, patience, 0), hub.join(CLIENT), ports)
    async with trio.open_nursery() as nursery:
        for index, stage in enumerate(names):
            for peer in stage:
                start(peer, index)
        states = await coordinator.run()
        nursery.cancel_scope.cancel()
    return states


class _Inline:
    """Torch work at once, every piece of the same virtual time; one of them takes longer."""

    def __init__(self, pause: tuple[int, float]) -> None:
        self._at, self._seconds = pause
        self._count = 0

    async def __call__(self, work: Callable[[], T], /) -> T:
        """Return what `work` returns."""
        self._count += 1
        await trio.sleep(self._seconds if self._count == self._at else _CELL_SECONDS)
        return work()


async def _live(worker: Worker, scope: trio.CancelScope) -> None:
    with scope:
        await worker.run()


async def _forget(record: StepRecord) -> None:
    await trio.lowlevel.checkpoint()


def _ignore(event: SwarmEvent) -> None:
    pass
