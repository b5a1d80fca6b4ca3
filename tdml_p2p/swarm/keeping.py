"""What outlives a stage's last worker: the newest verified states, kept by the client, and when to start over.

All workers of a stage may vanish together, however many they are: two on one machine, or behind one link. So the
client fetches the states of all stages in the background, at most a twentieth of the time while some stage has a single
worker and a fiftieth while none has, and never more than two states of the model at once.
"""

import math
from collections.abc import Callable

import structlog
import trio

from chain.records import WorkerStatus
from tdml_p2p.swarm.governor import ChainGovernor
from trainer.coordinator import Coordinator
from trainer.coordinator_ports import StepDone
from trainer.footprint import available_bytes
from trainer.manifest import TaskManifest
from trainer.state import StageState
from trainer.worker_ports import StateUnavailable

log = structlog.get_logger(__name__)

_REST = 19
_LONG_REST = 49
"""Seconds without fetching for every second of fetching, while some stage has a single worker and while none has."""
_STATE_BYTES = 12
"""Of a parameter: its weight and two moments."""
_RETURN_SECONDS = 4.0
_CHECK_SECONDS = 0.5


def has_room_for(manifest: TaskManifest) -> bool:
    """Whether this machine has room for two states of a model, and as much again for everything else."""
    available = available_bytes()
    return available is None or available > 2 * 2 * _STATE_BYTES * manifest.parameters


class Keeper:
    """The newest verified states of one task, held in memory.

    States are fetched when they are new, while workers surely hold them, and count once their step has settled. While
    no stage hangs on one worker, nothing is held unless `has_room` says that there is memory for two states.
    """

    def __init__(
        self,
        governor: ChainGovernor,
        has_room: Callable[[], bool] = lambda: True,
        clock: Callable[[], float] = trio.current_time,
    ) -> None:
        self._governor = governor
        self._has_room = has_room
        self._clock = clock
        self._rested_at = -math.inf
        self._fetch_seconds = 0.0
        self._kept: tuple[StageState, ...] = ()
        self._fetched: tuple[int, tuple[StageState, ...]] | None = None
        # without a buffer: a step that ends while another is being fetched is left out
        self._done, self._taken = trio.open_memory_channel[StepDone](0)

    @property
    def states(self) -> tuple[StageState, ...]:
        """The newest states that are here and have settled, of every stage; empty when there are none."""
        if self._fetched is None:
            return self._kept
        generation, states = self._fetched
        task = self._governor.task
        if task.generation != generation:
            self._fetched = None
        elif task.settled >= states[0].step:
            self._kept, self._fetched = states, None
        return self._kept

    def note(self, event: StepDone) -> None:
        """Offer the states after a step."""
        try:
            self._done.send_nowait(event)
        except trio.WouldBlock:
            log.debug("state not kept: another is being fetched", step=event.step)

    async def run(self, coordinator: Coordinator) -> None:
        """Fetch states as they are offered, until cancelled."""
        async for event in self._taken:
            _ = self.states  # what has settled makes room
            is_single = min(map(len, coordinator.ready), default=0) <= 1
            rest = self._fetch_seconds * (_REST if is_single else _LONG_REST)
            if self._fetched is not None or self._clock() < self._rested_at + rest:
                continue
            if is_single or self._has_room():
                await self._fetch(event, coordinator)

    async def _fetch(self, event: StepDone, coordinator: Coordinator) -> None:
        started = self._clock()
        try:
            self._fetched = (event.generation, await coordinator.fetch_states(event.step))
        except (StateUnavailable, KeyError) as error:
            log.info("state not kept", step=event.step, reason=str(error))
        self._rested_at = self._clock()
        self._fetch_seconds = self._rested_at - started


async def until_lost(
    coordinator: Coordinator, governor: ChainGovernor, clock: Callable[[], float] = trio.current_time
) -> None:
    """Return once a stage has lost its last worker for good, while enough peers for all stages would go on.

    Whoever lost only its connection has some seconds to come back.
    """
    while True:
        await trio.sleep(_CHECK_SECONDS)
        since = coordinator.empty_since
        if since is None or clock() - since < _RETURN_SECONDS:
            continue
        waiting = sum(worker.state is WorkerStatus.SPARE for worker in governor.workers)
        if waiting + sum(map(len, coordinator.ready)) >= governor.task.stages * (governor.task.redundancy // 2 + 1):
            return
