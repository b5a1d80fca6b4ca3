"""A worker's part in the step without I/O: messages and results go in, messages go out through `post`.

Life of a step here: prepared → open (cells come in and go out) → reducing → pending → committed; where the stages'
optimiser steps depend on each other, a replica with the mean gradient tells of it and awaits `Apply`. Everything is
keyed by (generation, step, cell) and idempotent; what does not fit is refused by name.
"""

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import TypeAlias, assert_never

from torch import Tensor

from trainer.faults import fault_of
from trainer.footprint import cell_bytes
from trainer.joint import other_end, tied_part
from trainer.messages import (
    Activation,
    Apply,
    CellDone,
    Commit,
    Fault,
    Finish,
    Gradient,
    Labels,
    Message,
    NotFinite,
    OpenStep,
    Partial,
    Passed,
    Prepare,
    Probe,
    Probed,
    Ready,
    Reduce,
    Reduced,
    Relay,
    Repeat,
    Reroute,
    Summed,
    Tied,
    Tokens,
)
from trainer.payloads import MessageError, Reason, TensorPayload, pack
from trainer.reduction import Part, Reduction
from trainer.stage import Backward, Forward, stage_layout
from trainer.state import StageState
from trainer.tensor_shapes import check_part, check_shape
from trainer.transport import Lost, Proof, Received
from trainer.worker_compute import NotFiniteError
from trainer.worker_intake import Opened, Opener
from trainer.worker_mail import EarlyMail
from trainer.worker_ports import WorkerConfig
from trainer.worker_probe import HeldProbe, Probes
from trainer.worker_step import Cell, CellData, StepRecord, StepWork
from trainer.worker_voice import Voice

_Order: TypeAlias = Prepare | OpenStep | Reroute | Reduce | Repeat | Apply | Commit | Finish
_OfStep: TypeAlias = OpenStep | CellData | Reroute | Reduce | Repeat | Partial | Tied | Apply | Commit


class Seat:
    """State of worker `me`: what it was asked for, the open step, the reduction, the state to commit."""

    def __init__(self, config: WorkerConfig, me: str, post: Callable[[str, Message], None]) -> None:
        self.generation = 0
        self.wanted: Prepare | None = None
        self.current: StageState | None = None
        self.work: StepWork | None = None
        self.reduction: Reduction | None = None
        self.pending: StageState | None = None
        self.is_finished = False
        self.refused: Counter[Reason] = Counter()
        self.committed: list[tuple[StageState, StepRecord]] = []
        self.dropped: list[Cell] = []
        self._config = config
        self._client = config.client
        self._spec = config.stage.spec
        self._other_end = other_end(config.manifest, self._spec.index)
        tied = tied_part(config.manifest, self._spec.index)
        self._layout, self._tied_size = stage_layout(config.manifest, self._spec.index), tied.stop - tied.start
        self._me = me
        self._post = post
        self.voice = Voice(config, post)
        self._opener, self._cell_bytes = Opener(config), cell_bytes(config.manifest, self._spec.index)
        self._early = EarlyMail(config.early_limit)
        self._probes = Probes(config, me)

    # results of computing

    def restored(self, wanted: Prepare, state: StageState) -> None:
        """Make the wanted state current and tell the client."""
        self.wanted, self.current = None, state
        self.voice.tell(Ready(self.generation, state.step, state.root, wanted.question))

    def lose_state(self) -> None:
        """Give up the state, as when there was no memory for the next one, until the client has it restored."""
        step = self._next_step
        self.wanted = self.current = self.work = self.reduction = self.pending = None
        self.dropped.clear()
        self.voice.tell(Fault(self.generation, step, Reason.NO_STATE, ()))

    def computed(self, work: StepWork, cell: Cell, forward: Forward | None, backward: Backward | None) -> None:
        """Keep a cell's results and send them on."""
        if forward is not None:
            cell.y, cell.boundaries = forward
            self.voice.output(work, cell)
        if backward is not None:
            cell.gx, cell.gw = backward
            cell.loss = float(cell.y.mean()) if self._spec.is_last and cell.y is not None else 0.0
            self.voice.gradient(work, cell)
            self.voice.done(work, cell)
            self._tell_short(work, cell.index)

    def summed(self, reduction: Reduction, total: Tensor, payload: tuple[TensorPayload]) -> None:
        """Contribute this worker's partial sum."""
        reduction.is_summed = True
        reduction.add(self._me, total)
        for peer, part in reduction.to_send(Partial, self._spec.index, payload):
            self._post(peer, part)

    def due_probe(self) -> HeldProbe | None:
        """Take out the forward pass to validate that is due on the current state."""
        return None if self.current is None else self._probes.next(self.generation, self.current.step)

    def probed(self, probe: HeldProbe, y: Tensor | None) -> None:
        """Send a probe's output on, or word that there is none."""
        self._post(*self._probes.answer(probe, y))

    def averaged(self, reduction: Reduction, gradient: Tensor, tied: Tensor) -> None:
        """Keep the stage's mean gradient, and send its part of the tied tensor to the other end."""
        reduction.gradient = gradient
        for peer, part in reduction.to_send(Tied, self._spec.index, pack(tied)):
            self._post(peer, part)

    def joined(self, reduction: Reduction, squares: float, digest: bytes) -> None:
        """Tell the client of the gradient that the other stages' steps depend on."""
        reduction.told = Summed(*reduction.place, squares, digest)
        self.voice.tell(reduction.told)

    def applied(self, reduction: Reduction, state: StageState) -> None:
        """Hold the state that a complete reduction leads to until the client commits it."""
        self.pending = state
        self.voice.reduced(reduction.order or reduction.request, state)

    def not_finite(self, work: StepWork, cell: Cell, found: NotFiniteError) -> None:
        """Tell the client what of a cell is not finite; what came from beside may come again."""
        cell.spoil(found.stage - self._spec.index)
        self.voice.tell(NotFinite(work.generation, work.step, cell.index, found.stage, found.what))

    # messages

    def take(self, received: Received, opened: Opened | None = None) -> tuple[Received, ...]:
        """Take a message, its tensor `opened` before or now; one that does not fit is refused and counted.

        Return those that came early and are to be looked at again now.
        """
        try:
            return self._handle(received, opened)
        except MessageError as refusal:
            self.refused[refusal.reason] += 1
        except (MemoryError, RuntimeError) as error:
            self.lack(received.message, error)
        return ()

    def opening(self, received: Received) -> Callable[[], Opened] | None:
        """Return how to open what a message brings, if it would be taken now; raise `MessageError`."""
        match message := received.message:
            case Activation() | Gradient() | Tokens() | Labels():
                work = self._work_for(received, message)
                is_due = work is not None and work.fits(message, self._cell_bytes, self._config.memory_limit)
            case Partial() | Tied():
                is_due = self._reduction_for(message) is not None
            case _:
                return None
        return partial(self._opener.open, message, self.current) if is_due else None

    def lack(self, message: Message | Lost, error: Exception) -> None:
        """Tell the client of what could not be taken for lack of memory: one of its cells, or all of the step."""
        self.refused[fault_of(error)] += 1
        if isinstance(message, CellData) and self.work is not None:
            self.voice.report(self.work.opened, fault_of(error))
        elif self.current is not None:
            self.lose_state()

    def _handle(self, received: Received, opened: Opened | None) -> tuple[Received, ...]:
        match message := received.message:
            case Lost():
                pass  # the client decides who replaces whom
            case Activation() | Gradient() | Tokens() | Labels():
                self._on_tensor(received, message, opened)
            case Partial() | Tied():
                self._on_part(received, message, opened)
            case Probe() | Relay():
                if self.current is None:
                    raise MessageError(Reason.NO_STATE)
                self._probes.take(received, message, self.generation, self.current.step)
            case Ready() | Passed() | CellDone() | NotFinite() | Summed() | Reduced() | Fault() | Probed():
                raise MessageError(Reason.UNEXPECTED, type(message).__name__)
            case Prepare() | OpenStep() | Reroute() | Reduce() | Repeat() | Apply() | Commit() | Finish():
                if received.sender != self._client:
                    raise MessageError(Reason.WRONG_SENDER, received.sender)
                self._obey(message, received.proof)
                return self._early.take()
            case _:
                assert_never(message)
        return ()

    def _obey(self, message: _Order, proof: Proof) -> None:
        match message:
            case Prepare():
                self._on_prepare(message)
            case OpenStep():
                self._on_open(message)
            case Reroute():
                self._on_reroute(message)
            case Reduce():
                self._on_reduce(message, proof)
            case Repeat():
                self._on_repeat(message)
            case Apply():
                self._on_apply(message, proof)
            case Commit():
                self._on_commit(message)
            case Finish():
                self.is_finished = True
            case _:
                assert_never(message)

    def _on_prepare(self, message: Prepare) -> None:
        if message.generation < self.generation:
            raise MessageError(Reason.STALE_GENERATION)
        if message.stage != self._spec.index:
            raise MessageError(Reason.WRONG_STAGE)
        self.generation = message.generation
        self.wanted = message
        self.current = self.work = self.reduction = self.pending = None
        self.dropped.clear()

    def _on_open(self, message: OpenStep) -> None:
        if not self._is_ahead(message):
            raise MessageError(Reason.DUPLICATE)
        if self.current is None or (message.generation, message.step) != (self.generation, self._next_step):
            raise MessageError(Reason.NO_STATE)
        if len(message.routes) != self._config.manifest.microbatches:
            raise MessageError(Reason.UNKNOWN_CELL, f"{len(message.routes)} routes")
        self.work = StepWork(message, self._me, self._spec, self._client, self._config.manifest.quorum)

    def _on_tensor(self, received: Received, message: CellData, opened: Opened | None) -> None:
        work = self._work_for(received, message)
        if work is None:
            self._hold(received, message)
            return
        if not work.fits(message, self._cell_bytes, self._config.memory_limit):
            work.is_short = True
            self._tell_short(work, message.cell)
            raise MessageError(Reason.MEMORY_FULL, f"cell {message.cell}")
        work.put(message, received, (opened or self._opener.open(message, self.current)).tensor)

    def _tell_short(self, work: StepWork, cell: int) -> None:
        """Tell the client of lack of memory once what there was room for is done: it takes all the rest elsewhere."""
        if work.is_short and not work.has_unfinished(cell):
            work.is_short = False
            self.voice.report(work.opened, Reason.MEMORY_FULL)

    def _work_for(self, received: Received, message: CellData) -> StepWork | None:
        """Return the step that a tensor is of, None while it is ahead of that or of its route."""
        work = None if self._is_ahead(message) else self.work
        if work is None or not work.expects(message, received.sender):
            return None
        check_shape(self._config.manifest, message)
        return work

    def _on_reroute(self, message: Reroute) -> None:
        work = self._open_work(message)
        was_mine = work.reroute(message)
        cell = work.cells.get(message.cell)
        if cell is None:
            return
        if work.owns(cell.index):
            cell.is_failed = False  # as when there was no memory for it a moment ago
            self.voice.again(work, cell, message.stage)
        elif was_mine and cell.is_in_flight:
            cell.y = None
            self.dropped.append(cell)
            self._tell_short(work, cell.index)

    def _on_reduce(self, message: Reduce, proof: Proof) -> None:
        work = self._open_work(message)
        if len(message.owners) != len(work.routes):
            raise MessageError(Reason.UNKNOWN_CELL)
        if bool(message.ends) != (self._other_end is not None):  # its auditors would find such a step false
            raise MessageError(Reason.UNEXPECTED, "the other end")
        if self.reduction is not None and message.attempt <= self.reduction.attempt:
            self._answer_again(message, self.reduction)
            return
        self.reduction, self.pending = work.reduction(message), None
        self.reduction.proof = proof

    def _answer_again(self, message: Reduce, reduction: Reduction) -> None:
        if message != reduction.request:
            raise MessageError(Reason.DUPLICATE, f"attempt {message.attempt}")
        if reduction.told is not None:
            self.voice.tell(reduction.told)
        elif self.pending is not None:
            self.voice.reduced(message, self.pending)
        else:
            self.voice.report(message, Reason.PARTIAL_MISSING, reduction.awaited)

    def _on_repeat(self, message: Repeat) -> None:
        self._open_work(message)
        if self.reduction is None or message.attempt != self.reduction.attempt:
            raise MessageError(Reason.STALE_STEP, f"attempt {message.attempt}")
        if (part := self.reduction.sent.get(message.peer)) is not None:
            self._post(message.peer, part)

    def _on_apply(self, message: Apply, proof: Proof) -> None:
        self._open_work(message)
        reduction, index = self.reduction, self._spec.index
        if reduction is None or reduction.told is None or len(message.attempts) != self._spec.count:
            raise MessageError(Reason.UNEXPECTED, "nothing to apply")
        if len(message.squares) != self._spec.count or message.attempts[index] != reduction.attempt:
            raise MessageError(Reason.STALE_STEP, f"attempts {message.attempts}")
        if message.squares[index] != reduction.told.squares:
            raise MessageError(Reason.UNEXPECTED, "another norm than this worker's")
        if reduction.order is None or message.attempt > reduction.order.attempt:
            reduction.order, reduction.order_proof, self.pending = message, proof, None
        elif message != reduction.order:
            raise MessageError(Reason.DUPLICATE, f"attempt {message.attempt}")
        elif self.pending is not None:
            self.voice.reduced(message, self.pending)
        else:
            self.voice.report(message, Reason.PARTIAL_MISSING)

    def _on_part(self, received: Received, message: Partial | Tied, opened: Opened | None) -> None:
        """Take a replica's partial sum, or the other end's gradient of the tied tensor."""
        reduction = self._reduction_for(message)
        if reduction is None:
            self._hold(received, message)
            return
        part = opened or self._opener.open(message, self.current)
        if not part.is_finite:
            self.voice.report(reduction.request, Reason.NOT_FINITE, (received.sender,))
            raise MessageError(Reason.NOT_FINITE, f"a sum of {received.sender}")
        if part.is_odd:
            self.voice.report(reduction.request, Reason.ODD_STATISTICS, (received.sender,))
        address = received.proof[0][0] if received.proof else b""
        add = reduction.add if isinstance(message, Partial) else reduction.add_far
        add(received.sender, part.tensor, address)
        reduction.keep(Part(received.sender, message, received.proof))

    def _reduction_for(self, message: Partial | Tied) -> Reduction | None:
        """Return the reduction that a part is of, None while it is ahead of that."""
        reduction, is_sum = None if self._is_ahead(message) else self.reduction, isinstance(message, Partial)
        if message.stage != (self._spec.index if is_sum else self._other_end):
            raise MessageError(Reason.WRONG_STAGE)
        if reduction is None or message.attempt > reduction.attempt:
            return None
        if message.attempt < reduction.attempt:
            raise MessageError(Reason.STALE_STEP, f"attempt {message.attempt}")
        check_part(self._config.manifest, message, self._layout.total if is_sum else self._tied_size)
        return reduction

    def _on_commit(self, message: Commit) -> None:
        work = self._open_work(message)
        if self.pending is None or self.reduction is None:
            raise MessageError(Reason.UNEXPECTED, "nothing to commit")
        record = work.record(self.pending.root, self.reduction)
        self.committed.append((self.pending, record))
        self.current = self.pending
        self.work = self.reduction = self.pending = None
        self.dropped.clear()

    def _hold(self, received: Received, message: CellData | Partial | Tied) -> None:
        if isinstance(message, Tokens | Labels) or received.sender == self._client:
            raise MessageError(Reason.UNKNOWN_CELL, "the client sends after it has routed")
        self._early.hold(received, message)

    def _open_work(self, message: Reroute | Reduce | Repeat | Apply | Commit) -> StepWork:
        if self._is_ahead(message) or self.work is None:
            raise MessageError(Reason.NO_STATE, f"step {message.step} is not open")
        return self.work

    @property
    def _next_step(self) -> int:
        if self.work is not None:
            return self.work.step
        if self.wanted is not None:
            return self.wanted.step + 1
        return 0 if self.current is None else self.current.step + 1

    def _is_ahead(self, message: _OfStep) -> bool:
        """Whether the message is of a step not open yet; raise `MessageError` for one that is over."""
        if message.generation < self.generation:
            raise MessageError(Reason.STALE_GENERATION)
        if message.generation == self.generation and message.step < self._next_step:
            raise MessageError(Reason.STALE_STEP)
        return self.work is None or (message.generation, message.step) != (self.work.generation, self.work.step)
