"""A whole swarm inside one trio program: tiny models, virtual time, torch work inline."""

from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import msgspec
import numpy as np
import torch
import trio
import trio.testing

from tests.trainer.image_samples import classes_of, image_batches, image_set
from trainer.base_weights import StageBase, stage_base
from trainer.coordinator import Coordinator
from trainer.coordinator_ports import (
    CoordinatorConfig,
    CoordinatorPorts,
    Members,
    Patience,
    StepDone,
    SwarmEvent,
)
from trainer.data import Batches, HeldBack, RunData, validation_of
from trainer.image_data import validation_on
from trainer.manifest import TaskManifest, complete
from trainer.stage import StageLike, build_stage
from trainer.state import StageState
from trainer.transport import Faults, InMemoryHub
from trainer.worker import Worker
from trainer.worker_ports import DEFAULT_MEMORY_LIMIT, Compute, StateUnavailable, T, WorkerConfig, WorkerPorts
from trainer.worker_step import StepRecord

CLIENT = "client"
PATIENCE = Patience(factor=8.0, floor=10.0, first=60.0, join=20.0, empty=600.0, tick=1.0)


TIED: dict[str, int | float | bool | str] = {
    "vocab_size": 64,
    "n_embd": 16,
    "n_layer": 4,
    "n_head": 2,
    **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
}


def tied_manifest(stages: int = 2, steps: int = 4, microbatches: int = 4) -> TaskManifest:
    """Return a task whose end stages hold one tensor."""
    base = manifest_of(stages, steps, microbatches, layers=4)
    return complete(msgspec.structs.replace(base, family="gpt2", config=TIED, cuts=()))


def manifest_of(stages: int = 2, steps: int = 4, microbatches: int = 4, layers: int = 2) -> TaskManifest:
    config: dict[str, int | float | bool | str] = {
        "vocab_size": 64,
        "hidden_size": 16,
        "num_hidden_layers": layers,
        "intermediate_size": 24,
        "num_attention_heads": 2,
    }
    return complete(
        TaskManifest(
            family="llama",
            config=config,
            seed=5,
            stages=stages,
            batch=2,
            microbatches=microbatches,
            sequence=8,
            steps=steps,
        )
    )


def batches_of(manifest: TaskManifest) -> RunData:
    if manifest.images is not None:
        return image_batches(manifest)
    numbers = np.arange(3000)
    return Batches((numbers * numbers % 61).astype(np.int32), manifest)


def held_back(manifest: TaskManifest) -> HeldBack:
    if manifest.images is not None:
        images = image_set(manifest, 24, seed=2)
        return validation_on(images, np.arange(24), classes_of(manifest), manifest)
    return validation_of((np.arange(200) * 7 % 61).astype(np.int32), manifest)


class FakeGovernor:
    """A chain that settles at once; tests change `members` and `hooks` run before a step is admitted."""

    def __init__(self, members: Members) -> None:
        self.members = members
        self.hooks: dict[int, Callable[[], None]] = {}

    def current(self) -> Members:
        return self.members

    async def admit(self, step: int) -> Members:
        await trio.lowlevel.checkpoint()
        if hook := self.hooks.pop(step, None):
            hook()
        return self.members

    async def settled(self, step: int) -> Members:
        return await self.admit(step + 1)


@dataclass
class Kit:
    """Members `s<stage>r<replica>` and a client, joined by an in-memory network."""

    manifest: TaskManifest
    replicas: int = 2
    faults: Faults = field(default_factory=Faults)
    cell_seconds: dict[str, float] = field(default_factory=dict)
    patience: Patience = PATIENCE
    given: tuple[StageState, ...] = ()
    eval_every: int = 0
    base: StageBase | None = None
    memory_limits: dict[str, int] = field(default_factory=dict)
    cheats: dict[str, Callable[[StageLike], StageLike]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.hub = InMemoryHub(self.faults)
        names = [[f"s{s}r{r}" for r in range(self.replicas)] for s in range(self.manifest.stages)]
        self.governor = FakeGovernor(Members(0, 0, tuple(tuple(stage) for stage in names)))
        self.workers: dict[str, Worker] = {}
        self.records: list[tuple[str, StepRecord]] = []
        self.events: list[SwarmEvent] = []
        self.unreachable: set[str] = set()
        self.computes: dict[str, Compute] = {}
        self.report: Callable[[SwarmEvent], None] = self.events.append
        self.nursery: trio.Nursery | None = None
        self.seconds = 0.0
        ports = CoordinatorPorts(
            self.governor,
            batches_of(self.manifest),
            lambda event: self.report(event),
            self.fetch_state,
            self.source,
            validation=held_back(self.manifest),
        )
        config = CoordinatorConfig(self.manifest, self.patience, self.eval_every)
        self.coordinator = Coordinator(config, self.hub.join(CLIENT), ports)

    async def train(self) -> tuple[StageState, ...]:
        began = trio.current_time()
        async with trio.open_nursery() as self.nursery:
            for stage, peers in enumerate(self.governor.members.stages):
                for peer in peers:
                    self.start(peer, stage)
            try:
                states = await self.coordinator.run()
            finally:
                self.seconds = trio.current_time() - began
            self.nursery.cancel_scope.cancel()
        return states

    def start(self, peer: str, stage: int) -> None:
        """Start a worker process, or start it again with nothing in memory."""
        scope = trio.CancelScope()
        transport = self.hub.join(peer, scope.cancel)
        built = build_stage(self.manifest, stage)
        if self.base is not None:
            built.load_base(stage_base(self.base, self.manifest, stage))
        wrapped = self.cheats.get(peer, lambda stage: stage)(built)
        limit = self.memory_limits.get(peer, DEFAULT_MEMORY_LIMIT)
        config = WorkerConfig(CLIENT, wrapped, self.manifest, ring_depth=8, memory_limit=limit)

        async def on_committed(record: StepRecord) -> None:
            self.records.append((peer, record))

        worker = Worker(
            config,
            transport,
            WorkerPorts(self.computes.get(peer) or self.compute(peer), self.fetch_state, on_committed),
        )
        self.workers[peer] = worker

        async def live() -> None:
            with scope:
                await worker.run()

        assert self.nursery is not None
        self.nursery.start_soon(live)

    def compute(self, peer: str) -> Compute:
        async def inline(work: Callable[[], T], /) -> T:
            await trio.sleep(self.cell_seconds.get(peer, 0.01))
            return work()

        return inline

    def source(self, step: int, stage: int) -> tuple[bytes, tuple[str, ...]]:
        """Name the client as holder of the states that the run was given."""
        if step or not self.given:
            return b"", ()
        return self.given[stage].root, (CLIENT,)

    async def fetch_state(self, root: bytes, holders: tuple[str, ...]) -> StageState:
        await trio.lowlevel.checkpoint()
        if CLIENT in holders:
            return next(state for state in self.given if state.root == root)
        for holder in holders:
            if holder in self.workers and holder not in self.unreachable:
                for state in self.workers[holder].states:
                    if state.root == root:
                        return state
        raise StateUnavailable

    @property
    def losses(self) -> list[float]:
        return [event.loss for event in self.events if isinstance(event, StepDone)]

    def check_exactly_once(self) -> None:
        """Every (generation, step, stage, cell) was recorded by exactly one worker, or by no more than a team."""
        seen = [(r.generation, r.step, r.stage, c.cell) for _, r in self.records for c in r.cells]
        assert max(Counter(seen).values(), default=0) <= self.manifest.audit.redundancy
        for done in (event for event in self.events if isinstance(event, StepDone)):
            for stage in range(self.manifest.stages):
                cells = {c for g, t, s, c in seen if (g, t, s) == (done.generation, done.step, stage)}
                assert cells <= set(range(self.manifest.microbatches))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def assert_same_model(states: tuple[StageState, ...], expected: tuple[StageState, ...]) -> None:
    assert [state.step for state in states] == [state.step for state in expected]
    for state, other in zip(states, expected, strict=True):
        assert relative(state.weights, other.weights) < 1e-5


def in_virtual_time(body: Callable[[], Awaitable[object]]) -> None:
    trio.run(body, clock=trio.testing.MockClock(autojump_threshold=0))


def trained(kit: Kit) -> tuple[StageState, ...]:
    """Return the final states of a kit that was run to its end."""
    torch.set_num_threads(1)
    outcome: list[tuple[StageState, ...]] = []

    async def train() -> None:
        outcome.append(await kit.train())

    in_virtual_time(train)
    kit.check_exactly_once()
    return outcome[0]
