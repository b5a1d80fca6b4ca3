"""How a peer takes leave of the swarms it works in: seats given up, and material served until nobody needs it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import structlog
import trio

from chain.engine import ChainEngine, SubmitRefused
from chain.transactions import LeaveSeat

if TYPE_CHECKING:
    from tdml_p2p.swarm.session import WorkerSession

log = structlog.get_logger(__name__)

_NOTICE_SECONDS = 1.0
_SILENT_SECONDS = 5.0
"""Without a block, before who leaves waits for nobody any more."""


class Leaving:
    """The seats of one account, and what is still asked of it when it has left them; `sessions` are by task."""

    def __init__(self, engine: ChainEngine, account: bytes, sessions: "Mapping[bytes, WorkerSession]") -> None:
        self._engine = engine
        self._account = account
        self._sessions = sessions

    async def leave(self) -> None:
        """Give up all seats, and return once the chain says so: until then the work goes on."""
        held = [task for task in self._sessions if self.is_seated(task)]
        for task in held:
            try:
                await self._engine.submit(LeaveSeat(task))
            except SubmitRefused as error:
                log.warning("the seat ends with its lease", task=task.hex(), reason=error.reason)
        async with self._engine.subscribe() as blocks:
            while any(self.is_seated(task) for task in held):
                await anext(blocks)
        if held:
            await trio.sleep(_NOTICE_SECONDS)  # clients may have the block a little later

    async def hand_over(self) -> None:
        """Keep serving what others need of this peer's work, for as long as blocks come.

        That are states of stages that were left to a newcomer alone, until it has claimed work of its own, and the
        material of audits, until what this peer has claimed has settled.
        """
        async with self._engine.subscribe() as blocks:
            needed = [task for task, session in self._sessions.items() if self._is_needed(task, session.seat.on_chain)]
            if needed:
                log.info("stays for its audits and whoever takes over", tasks=[task.hex() for task in needed])
            while any(self._is_needed(task, session.seat.on_chain) for task, session in self._sessions.items()):
                with trio.move_on_after(_SILENT_SECONDS) as waiting:
                    await anext(blocks)
                if waiting.cancelled_caught:
                    return

    def _is_needed(self, task: bytes, stage: int) -> bool:
        worker = self._engine.state.worker(task, self._account)
        return self._is_awaited(task, stage) or (worker is not None and worker.engaged > 0)

    def _is_awaited(self, task_id: bytes, stage: int) -> bool:
        """Whether the others in a stage, if there are any, have yet to do their first work."""
        task = self._engine.state.task(task_id)
        if task is None or not task.is_open or self.is_seated(task_id):
            return False
        others = [worker for worker in self._engine.state.workers(task_id) if worker.is_seated]
        stays = [worker.engaged + worker.settled_cells for worker in others if worker.stage == stage]
        return bool(stays) and not any(stays)

    def is_seated(self, task_id: bytes) -> bool:
        """Whether the account has a seat in an open task."""
        task, worker = self._engine.state.task(task_id), self._engine.state.worker(task_id, self._account)
        return task is not None and task.is_open and worker is not None and worker.is_seated
