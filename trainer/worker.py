"""The worker's side of the step: hold one stage, run its cells in 1F1B order, reduce with the replicas.

Two loops share a `Seat`: `_listen` takes messages, each handled at once and without waiting; `_do_next`
does what is due, one piece of torch work at a time. Sending has its own tasks, so it overlaps computing.
"""

from collections import Counter
from typing import TYPE_CHECKING

import trio

from trainer.faults import COMPUTE_ERRORS, fault_of
from trainer.messages import Prepare
from trainer.payloads import MessageError, Reason
from trainer.reduction import Reduction
from trainer.state import StageState
from trainer.trace import lane, span
from trainer.transport import Transport
from trainer.worker_compute import NotFiniteError, StageComputer
from trainer.worker_intake import Intake
from trainer.worker_mail import Outbox
from trainer.worker_ports import WorkerConfig, WorkerPorts
from trainer.worker_probe import HeldProbe
from trainer.worker_seat import Seat
from trainer.worker_step import Cell, Half, StepRecord, StepWork

if TYPE_CHECKING:
    from torch import Tensor


class Worker:
    """A worker of one stage of one task."""

    def __init__(self, config: WorkerConfig, transport: Transport, ports: WorkerPorts) -> None:
        self._transport = transport
        self._ports = ports
        self._report_depth = config.ring_depth
        self._is_joint = config.manifest.is_joint
        self._computer = StageComputer(config, ports)
        self._outbox = Outbox(transport, lambda to, message: self._seat.voice.undelivered(to, message))
        self._seat = Seat(config, transport.peer, self._outbox.post)
        self._intake = Intake(self._seat, ports.offload)
        self._wake = trio.Event()
        self._restoring = trio.CancelScope()

    @property
    def refused(self) -> Counter[Reason]:
        """How many messages were refused, by reason."""
        return self._seat.refused

    @property
    def states(self) -> tuple[StageState, ...]:
        """States kept for audits and rollback, oldest first, and the one that waits for its commit."""
        newest = (self._seat.current, self._seat.pending)
        kept = tuple(self._computer.ring)
        return (*kept, *(state for state in newest if state is not None and state not in kept))

    def forget(self, step: int) -> None:
        """Drop the states before `step`, which has settled."""
        self._computer.forget(step)

    async def run(self) -> None:
        """Serve the client until it says `Finish`; records of committed steps are reported before the end."""
        records, arrivals = trio.open_memory_channel[StepRecord](self._report_depth)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._report_committed, arrivals)
            async with trio.open_nursery() as services:
                self._outbox.open(services)
                services.start_soon(self._listen)
                with lane("worker"):
                    await self._work_until_finished(records)
                services.cancel_scope.cancel()
            await records.aclose()

    async def _report_committed(self, arrivals: trio.MemoryReceiveChannel[StepRecord]) -> None:
        with lane("claims"):
            async for record in arrivals:
                with span("claim", record.step):
                    await self._ports.on_committed(record)

    async def _listen(self) -> None:
        while not self._seat.is_finished:
            received = await self._transport.receive()
            await self._intake.take(received)
            if self._seat.wanted is received.message:
                self._restoring.cancel()
            self._wake.set()

    async def _work_until_finished(self, records: trio.MemorySendChannel[StepRecord]) -> None:
        while True:
            while self._seat.committed:
                state, record = self._seat.committed.pop(0)
                self._computer.ring.push(state)
                await records.send(record)
            if self._seat.is_finished:
                return
            try:
                is_idle = not await self._do_next()
            except COMPUTE_ERRORS:
                self._seat.lose_state()
                continue
            if is_idle:
                self._wake = trio.Event()
                with span("wait"):
                    await self._wake.wait()

    async def _do_next(self) -> bool:
        """Do one piece of due work; return False, without having waited, when there is none."""
        seat, work, reduction = self._seat, self._seat.work, self._seat.reduction
        if seat.wanted is not None:
            await self._restore(seat.wanted)
        elif seat.current is not None and self._computer.loaded is not seat.current:
            await self._computer.load(seat.current)
        elif (probe := seat.due_probe()) is not None:
            await self._run_probe(probe)
        elif work is None or seat.current is None:
            return False
        elif reduction is not None and not reduction.is_summed:
            total, payload = await self._computer.own_sum(reduction, work)
            if reduction is seat.reduction:
                seat.summed(reduction, total, payload)
        elif reduction is not None and await self._go_on(seat.current, reduction):
            pass
        elif (due := work.next()) is not None:
            await self._run_cell(work, *due)
        else:
            return False
        return True

    async def _go_on(self, current: StageState, reduction: Reduction) -> bool:
        """Do the next piece of work on a stage's gradient; return False when it waits for others."""
        seat, step, order = self._seat, current.step + 1, reduction.order
        if reduction.gradient is None:
            if reduction.missing:
                return False
            gradient, tied = await self._computer.mean(reduction, step)
            if reduction is seat.reduction:
                seat.averaged(reduction, gradient, tied)
        elif self._is_joint and reduction.told is None:
            if reduction.awaited:
                return False
            squares, digest = await self._computer.join(reduction.gradient, reduction.far, step)
            if reduction is seat.reduction:
                seat.joined(reduction, squares, digest)
        elif seat.pending is not None or reduction.is_failed or (self._is_joint and order is None):
            return False
        else:
            await self._apply(current, reduction, reduction.gradient)
        return True

    async def _apply(self, current: StageState, reduction: Reduction, gradient: "Tensor") -> None:
        order = reduction.order
        try:
            after = await self._computer.apply(current, gradient, () if order is None else order.squares)
        except NotFiniteError:
            reduction.is_failed = True
            self._seat.voice.report(reduction.request, Reason.NOT_FINITE)
            return
        if reduction is self._seat.reduction and order is reduction.order:
            self._seat.applied(reduction, after)

    async def _restore(self, wanted: Prepare) -> None:
        with trio.CancelScope() as self._restoring:
            try:
                state = await self._computer.restore(wanted)
            except (MessageError, *COMPUTE_ERRORS) as error:
                if self._seat.wanted is wanted:
                    self._seat.wanted = None
                    self._seat.voice.report(
                        wanted, error.reason if isinstance(error, MessageError) else Reason.NO_STATE
                    )
                return
            if self._seat.wanted is wanted:
                self._seat.restored(wanted, state)

    async def _run_probe(self, probe: HeldProbe) -> None:
        try:
            y = await self._computer.evaluate(probe)
        except COMPUTE_ERRORS:
            y = None
        self._seat.probed(probe, y)

    async def _run_cell(self, work: StepWork, cell: Cell, half: Half) -> None:
        seat = self._seat
        self._computer.drop(work, seat.dropped)
        try:
            forward, backward = await self._computer.run(work, cell, half)
            if backward is not None and work.quorum > 1:
                cell.digest = await self._computer.digest(cell.y if forward is None else forward.y, backward)
        except NotFiniteError as error:
            if work is seat.work:
                seat.not_finite(work, cell, error)
            return
        except COMPUTE_ERRORS as error:
            cell.is_failed = True
            seat.voice.report(work.opened, fault_of(error))
            return
        is_whole = forward is not None or cell.y is not None  # else it went to another worker and back meanwhile
        if work is seat.work and work.owns(cell.index) and is_whole:
            seat.computed(work, cell, forward, backward)
        elif half is Half.FORWARD:
            self._computer.drop(work, [cell])
