"""What a coordinator is given and what it reports: members, data, deadlines, events."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeAlias

import trio

from trainer.data import Batch, HeldBack
from trainer.manifest import TaskManifest
from trainer.state import StageState


@dataclass(frozen=True)
class Settled:
    """The task's newest settled step, and how many cells of each member have been claimed, stood and settled."""

    step: int = 0
    cells: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Members:
    """Who holds the seats now, by stage, and after which step this generation of the task resumes.

    Members are the same whatever has settled meanwhile.
    """

    generation: int
    resume_step: int
    stages: tuple[tuple[str, ...], ...]
    settled: Settled = field(default=Settled(), compare=False)


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
        """Return the tokens and labels, int32 (B, T) each, of one micro-batch, or its images and labels."""
        ...


@dataclass(frozen=True)
class Share:
    """What one replica did of a step: cells of its stage, and cells per second as the client sees them."""

    stage: int
    peer: str
    cells: int
    speed: float


@dataclass(frozen=True)
class StepDone:
    """A committed step: mean loss, tokens, seconds from opening to commit, seconds waited for the ring.

    `validation` is the mean loss of the new state on text that is never trained on, where it was measured.
    """

    step: int
    generation: int
    loss: float
    tokens: int
    seconds: float
    waited: float
    validation: float | None = None
    shares: tuple[Share, ...] = ()


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
class NotValidated:
    """An evaluation after `step` that a worker's loss or silence cut short; the training goes on."""

    step: int


@dataclass(frozen=True)
class RolledBack:
    """An eviction: the swarm goes back to the state after `resume_step`."""

    generation: int
    resume_step: int


@dataclass(frozen=True)
class Outvoted:
    """A worker whose results of these cells were not those of most of its team; theirs went on."""

    step: int
    stage: int
    peer: str
    cells: tuple[int, ...]


@dataclass(frozen=True)
class SplitTeam:
    """A team no majority of which agrees on its part of a step: the step begins again with others."""

    step: int
    stage: int
    peers: tuple[str, ...]


@dataclass(frozen=True)
class Suspicious:
    """A worker that a monitor names; it proves nothing, and asks for audits of what the worker claims."""

    step: int
    stage: int
    peer: str
    why: str


SwarmEvent: TypeAlias = (
    StepDone | Rerouted | PeerLeft | PeerJoined | StageEmpty | RolledBack | NotValidated | Outvoted | SplitTeam
    | Suspicious
)  # fmt: skip


@dataclass(frozen=True)
class Patience:
    """Deadlines in seconds: a worker may be silent for `factor` × the usual cell time, at least `floor`.

    `first` holds until a cell time is known; `join` is what a step waits for a newcomer's state;
    `empty` ends the run when the only worker of a stage has made no progress for so long, `vacant` when a stage
    has had nobody; `tick` is the pace of checking.
    """

    factor: float = 8.0
    floor: float = 10.0
    first: float = 60.0
    join: float = 20.0
    empty: float = 600.0
    vacant: float = 600.0
    tick: float = 0.25


_SLOW_FLOPS = 5e8
"""Operations per second of the slowest machine that is not yet taken for a dead one."""
_SLOW_LINK = 2e6
"""Bytes per second of the slowest link over which a newcomer's state is waited for."""


def patience_for(parameters: int, tokens: int) -> Patience:
    """Return deadlines for a model whose largest stage has so many parameters, trained on cells of so many tokens.

    Until a cell time is known only the size tells what is slow: 6 operations a parameter and token, 12 bytes a state.
    """
    usual = Patience()
    first = max(usual.first, 6.0 * parameters * tokens / _SLOW_FLOPS)
    join = max(usual.join, 12.0 * parameters / _SLOW_LINK)
    return replace(usual, first=first, join=join, empty=max(usual.empty, 10 * first, 10 * join))


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
    validation: HeldBack | None = None


@dataclass(frozen=True)
class CoordinatorConfig:
    """The task, the coordinator's deadlines, and steps of the whole training between evaluations; 0 for none."""

    manifest: TaskManifest
    patience: Patience = Patience()
    eval_every: int = 0
