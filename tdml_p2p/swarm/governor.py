"""The coordinator's view of the chain: who holds which seat, what has settled, and when a rollback is due."""

import trio

from chain.engine import ChainEngine
from chain.keys import peer_id
from chain.records import Worker
from chain.state import Task
from trainer.coordinator_ports import Members, Settled


class TaskEnded(RuntimeError):
    """The task was closed or its deadline has passed."""


class ChainGovernor:
    """`trainer.coordinator.Governor` for one task, fed by final blocks. Must be run.

    `resume` is (generation, step): a resumed run goes on after that step while the generation is that one.
    """

    def __init__(self, engine: ChainEngine, task: bytes, resume: tuple[int, int] | None = None) -> None:
        self._engine = engine
        self._task = task
        self._resume = resume
        self._changed = trio.Event()

    async def run(self) -> None:
        """Follow the chain until cancelled."""
        async with self._engine.subscribe() as blocks:
            async for _ in blocks:
                self._changed.set()
                self._changed = trio.Event()

    @property
    def task(self) -> Task:
        """The task as the newest final block has it; raise `TaskEnded` when it is gone."""
        task = self._engine.state.task(self._task)
        if task is None:
            raise TaskEnded("the task is no longer on chain")
        return task

    @property
    def workers(self) -> tuple[Worker, ...]:
        """Everybody who has applied for a seat or holds one."""
        return tuple(self._engine.state.workers(self._task))

    def current(self) -> Members:
        """Return the seated peers by stage, with the generation and the step to resume after."""
        task = self.task
        stages: list[list[str]] = [[] for _ in range(task.stages)]
        cells: dict[str, int] = {}
        for worker in self.workers:
            if worker.stage >= 0 and worker.is_seated:
                name = peer_id(worker.account)
                stages[worker.stage].append(name)
                cells[name] = worker.settled_cells
        is_resumed = self._resume is not None and self._resume[0] == task.generation
        resume_step = self._resume[1] if self._resume is not None and is_resumed else task.settled
        seated = tuple(tuple(sorted(peers)) for peers in stages)
        return Members(task.generation, resume_step, seated, Settled(task.settled, cells))

    async def admit(self, step: int) -> Members:
        """Return the members once `step` fits into the ring of unsettled steps; raise `TaskEnded`."""
        generation = self.task.generation
        while True:
            task = self.task
            if not task.is_open:
                raise TaskEnded("the task was closed")
            if task.generation != generation or step <= task.settled + task.depth:
                return self.current()
            await self._changed.wait()

    async def settled(self, step: int) -> Members:
        """Return once `step` has settled or a rollback has changed the generation; raise `TaskEnded`."""
        generation = self.task.generation
        while self.task.settled < step and self.task.generation == generation:
            if not self.task.is_open:
                raise TaskEnded("the task was closed")  # nothing settles any more
            await self._changed.wait()
        return self.current()
