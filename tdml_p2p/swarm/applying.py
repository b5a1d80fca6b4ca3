"""Applications of a peer for seats: where it applies, and which tasks it is too small for."""

import math
from collections.abc import Awaitable, Callable, Container
from functools import partial

import structlog
import trio

from chain.engine import ChainEngine, SubmitRefused
from chain.state import State, Task
from chain.transactions import TakeSeat
from tdml_p2p.swarm.admission import WrongAnswer
from tdml_p2p.swarm.terms import unlike
from trainer.faults import COMPUTE_ERRORS, lacks_memory
from trainer.manifest import TaskManifest
from trainer.worker_ports import Compute

log = structlog.get_logger(__name__)

_MANIFEST_SECONDS = 60.0
"""After its start a peer waits so long for the manifests of tasks in which it has seats before it applies elsewhere."""


class Applicant:
    """Applies once for a seat of every task that this machine can hold.

    `memory` bounds what all seats take together, 0 sets no bound; `held` tells what those of other tasks than a given
    one take, also where a seat is only applied for (`reserved`).
    """

    def __init__(
        self,
        engine: ChainEngine,
        compute: Compute,
        memory: int,
        prove: Callable[[Task], Awaitable[int]],
        held: Callable[[bytes], int] = lambda _: 0,
    ) -> None:
        self._engine = engine
        self._compute = compute
        self._memory = memory
        self._prove = prove
        self._held = held
        self._applied: set[bytes] = set()
        self._one_by_one = trio.Lock()
        self._waits_below: dict[bytes, int] = {}
        self._unmeasured: set[bytes] = set()
        self._waits_until = math.inf
        self.reserved: dict[bytes, int] = {}
        """About how many bytes a seat takes, by task that this peer has applied for, or is about to."""
        self.declined: dict[bytes, str] = {}
        """Why this peer does not apply, by task."""
        self.answers: dict[bytes, int] = {}
        """Verified cells that this peer computed alike before it applied, by task."""

    def begin(self, task: bytes) -> bool:
        """Whether an application for a seat of this task is still to be made; it is from now on.

        One that other seats left no room for is made again once they take less. None is made while it is not known
        what the seats take that this peer has.
        """
        if self._unmeasured and trio.current_time() < self._waits_until:
            return False
        if task in self._waits_below and self._held(task) < self._waits_below[task]:
            del self._waits_below[task]
            self._applied.discard(task)
        is_new = task not in self._applied
        self._applied.add(task)
        return is_new

    def note_seats(self, state: State, account: bytes, known: Container[bytes]) -> frozenset[bytes]:
        """Return the tasks in which this peer has a seat, as after a restart, and nothing is set aside for it yet.

        `known` are those whose seats are measured already. A task that nobody tells about is not waited for for ever.
        """
        if not self._memory:
            return frozenset()
        seats = (task.id for task in state.open_tasks() if _is_present(state, task.id, account))
        self._unmeasured = {task for task in seats if task not in known and task not in self.reserved}
        self._waits_until = min(self._waits_until, trio.current_time() + _MANIFEST_SECONDS)
        return frozenset(self._unmeasured)

    async def hold(self, task: bytes, manifest: TaskManifest) -> None:
        """Set the memory of a seat aside that this peer has."""
        async with self._one_by_one:
            if task in self._unmeasured:
                _, self.reserved[task] = await self._compute(partial(_too_large, manifest, self._memory, 0))
                self._unmeasured.discard(task)

    async def apply(self, task: Task, manifest: TaskManifest) -> None:
        """Apply, unless the task is too large, or this machine computes what others have verified in another way.

        What the chain refuses for now is tried again with a later block.
        """
        kernel = b""
        self.declined.pop(task.id, None)
        try:
            kernel = await self._compute(partial(_kernel, manifest.precision))
            problem = _unlike(task, manifest, kernel) or await self._reserve(task.id, manifest)
            self.answers[task.id] = 0 if problem else await self._prove(task)
        except WrongAnswer as error:
            problem = f"this machine computes wrongly: {error}"
        except COMPUTE_ERRORS as error:
            problem = "too little memory" if lacks_memory(error) else f"this machine cannot compute: {error}"
        if problem is not None:
            self.decline(task.id, problem)
            log.warning("does not apply for a seat", task=task.id.hex(), reason=problem)
            return
        try:
            await self._engine.submit(TakeSeat(task.id, kernel))
        except SubmitRefused as error:
            log.warning("cannot apply for a seat yet", task=task.id.hex(), reason=error.reason)
            self._applied.discard(task.id)
            self.reserved.pop(task.id, None)
            return
        log.info("applied for a seat", task=task.id.hex())

    async def _reserve(self, task: bytes, manifest: TaskManifest) -> str | None:
        """Set the memory of a seat aside, or return why there is too little, one task after the other."""
        async with self._one_by_one:
            held = self._held(task)
            problem, need = await self._compute(partial(_too_large, manifest, self._memory, held))
            if problem is None:
                self.reserved[task] = need
            elif held and (await self._compute(partial(_too_large, manifest, self._memory, 0)))[0] is None:
                self._waits_below[task] = held
            return problem

    def decline(self, task: bytes, problem: str) -> None:
        """Note why this peer has no seat of a task, and let go of what was set aside for it."""
        self.declined[task] = problem
        self.reserved.pop(task, None)

    def forget_closed(self, state: State, account: bytes) -> None:
        """Forget why tasks that are over were declined, and what is set aside for those where the seat is gone."""
        for task in [task for task in self.reserved if _is_gone(state, task, account)]:
            del self.reserved[task]
        kept = {task: why for task, why in self.declined.items() if (found := state.task(task)) and found.is_open}
        self.declined = kept
        self.answers = {
            task: count for task, count in self.answers.items() if (found := state.task(task)) and found.is_open
        }


def _is_present(state: State, task: bytes, account: bytes) -> bool:
    worker = state.worker(task, account)
    return worker is not None and worker.is_present


def _is_gone(state: State, task: bytes, account: bytes) -> bool:
    """Whether a task is over, or an account's seat of it."""
    found, worker = state.task(task), state.worker(task, account)
    return found is None or not found.is_open or (worker is not None and not worker.is_present)


def _too_large(manifest: TaskManifest, memory: int, held: int) -> tuple[str | None, int]:
    """Return why there is no room for the largest seat of a task, None if there is, and how much that seat takes."""
    from trainer.footprint import available_bytes, largest, why_not

    return why_not(manifest, memory, available_bytes(), held), largest(manifest).total


def _unlike(task: Task, manifest: TaskManifest, kernel: bytes) -> str | None:
    """Return why a task is not what its manifest says, or results of this machine not comparable; None if they are."""
    if (problem := unlike(task, manifest)) is not None:
        return problem
    if task.kernel not in (b"", kernel):
        return f"its results are exact in kernel class {task.kernel.hex()} only, this machine is of {kernel.hex()}"
    return None


def _kernel(precision: str) -> bytes:
    from trainer.kernel import kernel_class

    return kernel_class(precision)
