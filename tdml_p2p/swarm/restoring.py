"""Weight gradients that a worker had no room to keep, computed again where an audit asks for them."""

from typing import TYPE_CHECKING

import trio
from msgspec import structs

from tdml_p2p.swarm.inputs import Senders, Wanted
from tdml_p2p.swarm.reexecution import Cell, Reexecutor

if TYPE_CHECKING:
    from tdml_p2p.swarm.session import WorkerSession
    from tdml_p2p.swarm.traces import KeptCell

_NOBODY = Senders(frozenset(), frozenset())


async def restore_step(session: "WorkerSession", wanted: Wanted, reexecutor: Reexecutor) -> None:
    """Restore all gradients of a step of this worker, which the audit of its optimiser's step adds up."""
    for kept in session.book.without_gradient(wanted.generation, wanted.step):
        await _restore(session, wanted, kept, reexecutor)


async def restore_cell(session: "WorkerSession", wanted: Wanted, reexecutor: Reexecutor) -> None:
    """Restore the gradient of one cell of this worker, if it is not there."""
    kept = session.book.cell(wanted.generation, wanted.step, wanted.cell)
    if kept is not None and kept.record.gw is None:
        await _restore(session, wanted, kept, reexecutor)


async def _restore(session: "WorkerSession", wanted: Wanted, kept: "KeptCell", reexecutor: Reexecutor) -> None:
    place = structs.replace(wanted, cell=kept.record.cell)
    cell = Cell(place, session.seat.manifest, kept.trace.state, (session.peer,), _NOBODY)
    again = (await reexecutor.replay(cell, kept.trace.x, kept.trace.gy)).result.gw
    await trio.to_thread.run_sync(session.book.restore, (wanted.generation, wanted.step, place.cell), again)
