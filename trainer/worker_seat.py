"""A worker's part in the step without I/O: messages and results go in, messages go out through `post`.

Life of a step here: prepared → open (cells come in and go out) → reducing → pending → committed.
Everything is keyed by (generation, step, cell) and idempotent; what does not fit is refused by name.
"""

from collections import Counter
from collections.abc import Callable
from typing import TypeAlias, assert_never

from torch import Tensor

from trainer.messages import (
    Activation,
    CellDone,
    Commit,
    Fault,
    Finish,
    Gradient,
    Labels,
    Message,
    MessageError,
    OpenStep,
    Partial,
    Passed,
    Prepare,
    Ready,
    Reason,
    Reduce,
    Reduced,
    Reroute,
    Tokens,
    pack,
    unpack,
)
from trainer.reduction import Reduction
from trainer.stage import Backward, Forward
from trainer.state import StageState
from trainer.transport import Lost, Received
from trainer.worker_mail import EarlyMail
from trainer.worker_ports import WorkerConfig
from trainer.worker_step import Cell, CellData, StepRecord, StepWork

_OfStep: TypeAlias = OpenStep | CellData | Reroute | Reduce | Partial | Commit


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
        self._me = me
        self._post = post
        self._early = EarlyMail(config.early_limit)

    # results of computing

    def restored(self, state: StageState) -> None:
        """Make the wanted state current and tell the client."""
        self.wanted, self.current = None, state
        self._tell(Ready(self.generation, state.step, state.root))

    def computed(self, work: StepWork, cell: Cell, forward: Forward | None, backward: Backward | None) -> None:
        """Keep a cell's results and send them on."""
        if forward is not None:
            cell.y, cell.boundaries = forward
            self._send_output(work, cell)
        if backward is not None:
            cell.gx, cell.gw = backward
            cell.loss = float(cell.y.mean()) if self._spec.is_last and cell.y is not None else 0.0
            self._send_gradient(work, cell)
            self._tell_done(work, cell)

    def summed(self, reduction: Reduction, total: Tensor) -> None:
        """Contribute this worker's partial sum."""
        reduction.is_summed = True
        reduction.add(self._me, total)
        request = reduction.request
        partial = Partial(request.generation, request.step, request.attempt, self._spec.index, pack(total))
        for peer in reduction.others:
            self._post(peer, partial)

    def applied(self, reduction: Reduction, state: StageState) -> None:
        """Hold the state that a complete reduction leads to until the client commits it."""
        self.pending = state
        self._tell_reduced(reduction.request, state)

    def report(self, during: Prepare | OpenStep | Reduce, reason: Reason, peers: tuple[str, ...] = ()) -> None:
        """Tell the client what stops this worker."""
        self._tell(Fault(during.generation, during.step, reason, peers))

    def undelivered(self, to: str, message: Message) -> None:
        """Tell the client that a neighbour or a replica cannot be reached."""
        if isinstance(message, Activation | Gradient | Partial):
            self._tell(Fault(message.generation, message.step, Reason.PEER_UNREACHABLE, (to,)))

    # messages

    def take(self, received: Received) -> None:
        """Take a message; one that does not fit is refused and counted."""
        try:
            self._handle(received)
        except MessageError as refusal:
            self.refused[refusal.reason] += 1

    def _handle(self, received: Received) -> None:
        match message := received.message:
            case Lost():
                pass  # the client decides who replaces whom
            case Activation() | Gradient() | Tokens() | Labels():
                self._on_tensor(received, message)
            case Partial():
                self._on_partial(received, message)
            case Ready() | Passed() | CellDone() | Reduced() | Fault():
                raise MessageError(Reason.UNEXPECTED, type(message).__name__)
            case Prepare() | OpenStep() | Reroute() | Reduce() | Commit() | Finish():
                if received.sender != self._client:
                    raise MessageError(Reason.WRONG_SENDER, received.sender)
                self._obey(message)
                for early in self._early.take():
                    self.take(early)
            case _:
                assert_never(message)

    def _obey(self, message: Prepare | OpenStep | Reroute | Reduce | Commit | Finish) -> None:
        match message:
            case Prepare():
                self._on_prepare(message)
            case OpenStep():
                self._on_open(message)
            case Reroute():
                self._on_reroute(message)
            case Reduce():
                self._on_reduce(message)
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
        self.work = StepWork(message, self._me, self._spec, self._client)

    def _on_tensor(self, received: Received, message: CellData) -> None:
        work = None if self._is_ahead(message) else self.work
        if work is None or not work.expects(message, received.sender):
            self._hold(received, message)
            return
        self._check_shape(message)
        size = sum(payload.nbytes for payload in message.payload)
        if work.nbytes + size > self._config.memory_limit:
            self.report(work.opened, Reason.MEMORY_FULL)
            raise MessageError(Reason.MEMORY_FULL, f"{size} bytes more")
        work.put(message, received, unpack(message.payload))

    def _on_reroute(self, message: Reroute) -> None:
        work = self._open_work(message)
        was_mine = work.reroute(message)
        cell = work.cells.get(message.cell)
        if cell is None:
            return
        if work.owns(cell.index):
            self._send_again(work, cell, message.stage)
        elif was_mine and cell.is_in_flight:
            cell.y = None
            self.dropped.append(cell)

    def _send_again(self, work: StepWork, cell: Cell, stage: int) -> None:
        """Send what the new holder of `stage` lacks; if that is this worker, all it has, to everyone."""
        if stage - self._spec.index in (0, 1):
            self._send_output(work, cell)
        if stage - self._spec.index in (0, -1):
            self._send_gradient(work, cell)
        if stage == self._spec.index:
            self._tell_done(work, cell)

    def _on_reduce(self, message: Reduce) -> None:
        work = self._open_work(message)
        if len(message.owners) != len(work.routes):
            raise MessageError(Reason.UNKNOWN_CELL)
        if self.reduction is not None and message.attempt <= self.reduction.attempt:
            self._answer_again(message, self.reduction)
            return
        reduction = Reduction(message, self._me)
        unfinished = [c for c in reduction.own_cells if c not in work.cells or work.cells[c].gw is None]
        if unfinished:
            raise MessageError(Reason.UNKNOWN_CELL, f"cells {unfinished} are not finished")
        self.reduction, self.pending = reduction, None

    def _answer_again(self, message: Reduce, reduction: Reduction) -> None:
        if message != reduction.request:
            raise MessageError(Reason.DUPLICATE, f"attempt {message.attempt}")
        if self.pending is not None:
            self._tell_reduced(message, self.pending)
        else:
            self.report(message, Reason.PARTIAL_MISSING, reduction.missing)

    def _on_partial(self, received: Received, message: Partial) -> None:
        reduction = None if self._is_ahead(message) else self.reduction
        if message.stage != self._spec.index:
            raise MessageError(Reason.WRONG_STAGE)
        if reduction is None or message.attempt > reduction.attempt:
            self._hold(received, message)
            return
        if message.attempt < reduction.attempt:
            raise MessageError(Reason.STALE_STEP, f"attempt {message.attempt}")
        if self.current is None or message.payload[0].shape != tuple(self.current.weights.shape):
            raise MessageError(Reason.TENSOR_SHAPE)
        reduction.add(received.sender, unpack(message.payload))

    def _on_commit(self, message: Commit) -> None:
        work = self._open_work(message)
        if self.pending is None or self.reduction is None:
            raise MessageError(Reason.UNEXPECTED, "nothing to commit")
        record = work.record(self.pending.root, self.reduction.request)
        self.committed.append((self.pending, record))
        self.current = self.pending
        self.work = self.reduction = self.pending = None
        self.dropped.clear()

    def _hold(self, received: Received, message: CellData | Partial) -> None:
        if isinstance(message, Tokens | Labels) or received.sender == self._client:
            raise MessageError(Reason.UNKNOWN_CELL, "the client sends after it has routed")
        self._early.hold(received, message)

    # what fits now

    def _open_work(self, message: Reroute | Reduce | Commit) -> StepWork:
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
        opened = self.work.opened if self.work is not None else None
        return opened is None or (message.generation, message.step) != (opened.generation, opened.step)

    def _check_shape(self, message: CellData) -> None:
        manifest = self._config.manifest
        tokens = (manifest.batch, manifest.sequence)
        wanted = tokens if isinstance(message, Tokens | Labels) else (*tokens, manifest.hidden)
        if message.payload[0].shape != wanted:
            raise MessageError(Reason.TENSOR_SHAPE, f"{message.payload[0].shape}, not {wanted}")

    # what goes out

    def _tell(self, message: Message) -> None:
        self._post(self._client, message)

    def _tell_reduced(self, request: Reduce, state: StageState) -> None:
        self._tell(Reduced(request.generation, request.step, request.attempt, state.root))

    def _send_output(self, work: StepWork, cell: Cell) -> None:
        if cell.y is not None and not self._spec.is_last:
            at = (work.generation, work.step, cell.index, self._spec.index)
            self._post(work.consumer(cell.index), Activation(*at, pack(cell.y)))
            self._tell(Passed(*at))

    def _send_gradient(self, work: StepWork, cell: Cell) -> None:
        if cell.gx is not None and not self._spec.is_first:
            at = (work.generation, work.step, cell.index, self._spec.index)
            self._post(work.producer(cell.index), Gradient(*at, pack(cell.gx)))

    def _tell_done(self, work: StepWork, cell: Cell) -> None:
        if cell.gw is not None:
            at = (work.generation, work.step, cell.index, self._spec.index)
            self._tell(CellDone(*at, cell.loss, cell.seconds))
