"""What a coordinator is given and what it reports: members, data, deadlines, events."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import trio

from trainer.data import Batch
from trainer.manifest import TaskManifest
from trainer.state import StageState


@dataclass(frozen=True)
class Members:
    """Who holds the seats now, by stage, and after which step this generation of the task resumes."""

    generation: int
    resume_step: int
    stages: tuple[tuple[str, ...], ...]


class Governor(Protocol):
    """The chain as the coordinator sees it; a changed generation tells a rollback."""

    def current(self) -> Members:
        """Return the members as known now."""
        ...

    async def admit(self, step: int) -> Members:
        """Return the members once the ring has room for `step`, or the generation has changed."""
        ...

    async def settled(self, step: int) -> Members:
        """Return the members once `step` has settled, or the generation has changed."""
        ...


class BatchSource(Protocol):
    """Micro-batches by step (from 1) and index."""

    def batch(self, step: int, microbatch: int) -> Batch:
        """Return the tokens and labels, int32 (B, T) each, of one micro-batch."""
        ...


@dataclass(frozen=True)
class StepDone:
    """A committed step: mean loss, tokens, seconds from opening to commit, seconds waited for the ring."""

    step: int
    generation: int
    loss: float
    tokens: int
    seconds: float
    waited: float


@dataclass(frozen=True)
class Rerouted:
    """Cells of a stage taken from `peer` because of `why`."""

    step: int
    stage: int
    peer: str
    cells: tuple[int, ...]
    why: str


@dataclass(frozen=True)
class PeerLeft:
    """A worker that is left out from now on: lost, slow or with another root; it may come back."""

    step: int
    stage: int
    peer: str
    why: str


@dataclass(frozen=True)
class PeerJoined:
    """A worker that holds the stage's state and takes part."""

    step: int
    stage: int
    peer: str


@dataclass(frozen=True)
class StageEmpty:
    """No worker of the stage is left; the step waits for one."""

    step: int
    stage: int


@dataclass(frozen=True)
class RolledBack:
    """An eviction: the swarm goes back to the state after `resume_step`."""

    generation: int
    resume_step: int


SwarmEvent: TypeAlias = StepDone | Rerouted | PeerLeft | PeerJoined | StageEmpty | RolledBack


@dataclass(frozen=True)
class Patience:
    """Deadlines in seconds: a worker may be silent for `factor` × the usual cell time, at least `floor`.

    `first` holds until a cell time is known; `join` is what a step waits for a newcomer's state;
    `empty` ends the run when a stage has had nobody for so long; `tick` is the pace of checking.
    """

    factor: float = 8.0
    floor: float = 10.0
    first: float = 60.0
    join: float = 20.0
    empty: float = 600.0
    tick: float = 0.25


def no_source(step: int, stage: int) -> tuple[bytes, tuple[str, ...]]:
    """Return no root and no holders: states come from the workers or from the seed."""
    return b"", ()


@dataclass(frozen=True)
class CoordinatorPorts:
    """Surroundings of a coordinator.

    `source(step, stage)` names a root and its holders outside the swarm, such as a checkpoint's;
    `fetch_state` brings the final states home.
    """

    governor: Governor
    batches: BatchSource
    report: Callable[[SwarmEvent], None]
    fetch_state: Callable[[bytes, tuple[str, ...]], Awaitable[StageState]]
    source: Callable[[int, int], tuple[bytes, tuple[str, ...]]] = no_source
    clock: Callable[[], float] = trio.current_time


@dataclass(frozen=True)
class CoordinatorConfig:
    """The task and the coordinator's deadlines."""

    manifest: TaskManifest
    patience: Patience = Patience()
