"""What one worker knows of one step: its cells, their routes, what may run next, and the record of it."""

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, TypeAlias, assert_never

from trainer.layout import StageSpec
from trainer.messages import (
    Activation,
    Gradient,
    Labels,
    MessageError,
    OpenStep,
    Reason,
    Reduce,
    Reroute,
    Tokens,
)
from trainer.schedule import in_flight_limit
from trainer.transport import Proof, Received

if TYPE_CHECKING:
    from torch import Tensor

CellData: TypeAlias = Tokens | Labels | Activation | Gradient


@dataclass(slots=True)
class Cell:
    """One cell's material as it comes in; x is tokens at the first stage, gy is absent at the last."""

    index: int
    x: "Tensor | None" = None
    x_sender: str = ""
    x_proof: Proof = ()
    labels: "Tensor | None" = None
    labels_proof: Proof = ()
    y: "Tensor | None" = None
    boundaries: tuple[bytes, ...] = ()
    gy: "Tensor | None" = None
    gy_sender: str = ""
    gy_proof: Proof = ()
    gx: "Tensor | None" = None
    gw: "Tensor | None" = None
    loss: float = 0.0
    seconds: float = 0.0
    is_failed: bool = False

    @property
    def is_in_flight(self) -> bool:
        """Whether the forward half is done and the backward half is not."""
        return self.y is not None and self.gw is None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held."""
        tensors = (self.x, self.labels, self.y, self.gy, self.gx, self.gw)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


@dataclass(frozen=True, slots=True)
class CellRecord:
    """The trace of a finished cell: inputs with their senders and proofs, outputs, layer boundaries."""

    cell: int
    x: "Tensor"
    x_sender: str
    x_proof: Proof
    labels: "Tensor | None"
    labels_proof: Proof
    y: "Tensor"
    boundaries: tuple[bytes, ...]
    gy: "Tensor | None"
    gy_sender: str
    gy_proof: Proof
    gx: "Tensor"
    gw: "Tensor"
    loss: float
    seconds: float


@dataclass(frozen=True, slots=True)
class StepRecord:
    """A committed step at one worker: the cells it owns, their reduction, the new state's root."""

    generation: int
    step: int
    stage: int
    root: bytes
    reduction: Reduce
    routes: tuple[tuple[str, ...], ...]
    cells: tuple[CellRecord, ...]


class Half(Enum):
    """What to compute of a cell."""

    FORWARD = auto()
    BACKWARD = auto()
    WHOLE = auto()


@dataclass
class StepWork:
    """The cells of one open step at worker `me`, which holds stage `spec`."""

    opened: OpenStep
    me: str
    spec: StageSpec
    client: str
    routes: list[list[str]] = field(init=False)
    cells: dict[int, Cell] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        if any(len(route) != self.spec.count for route in self.opened.routes):
            raise MessageError(Reason.MALFORMED, f"a route that has not {self.spec.count} stages")
        self.routes = [list(route) for route in self.opened.routes]

    @property
    def generation(self) -> int:
        """Generation of the task."""
        return self.opened.generation

    @property
    def step(self) -> int:
        """Index of the step."""
        return self.opened.step

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held."""
        return sum(cell.nbytes for cell in self.cells.values())

    def owns(self, cell: int) -> bool:
        """Whether the cell is routed to this worker now."""
        return self.routes[cell][self.spec.index] == self.me

    def producer(self, cell: int) -> str:
        """Who sends the cell's input."""
        return self.client if self.spec.is_first else self.routes[cell][self.spec.index - 1]

    def consumer(self, cell: int) -> str:
        """Who takes the cell's output and sends its gradient; the client at the last stage."""
        return self.client if self.spec.is_last else self.routes[cell][self.spec.index + 1]

    def expects(self, message: CellData, sender: str) -> bool:
        """Whether the cell is this worker's and `sender` is on its route for such a message.

        Raises `MessageError` for a cell that the step does not have, or a message for another stage.
        """
        self._check_cell(message.cell)
        here, spec = message.cell, self.spec
        match message:
            case Tokens():
                is_right_stage, wanted = spec.is_first, self.client
            case Labels():
                is_right_stage, wanted = spec.is_last, self.client
            case Activation():
                is_right_stage, wanted = message.stage == spec.index - 1, self.producer(here)
            case Gradient():
                is_right_stage, wanted = message.stage == spec.index + 1, self.consumer(here)
            case _:
                assert_never(message)
        if not is_right_stage:
            raise MessageError(Reason.WRONG_STAGE)
        return self.owns(here) and sender == wanted

    def put(self, message: CellData, received: Received, tensor: "Tensor") -> None:
        """Keep an input of a cell; raise `MessageError` if it is already there."""
        cell = self.cells.setdefault(message.cell, Cell(message.cell))
        match message:
            case Tokens() | Activation():
                _check_absent(cell.x)
                cell.x, cell.x_sender, cell.x_proof = tensor, received.sender, received.proof
            case Labels():
                _check_absent(cell.labels)
                cell.labels, cell.labels_proof = tensor, received.proof
            case Gradient():
                _check_absent(cell.gy)
                cell.gy, cell.gy_sender, cell.gy_proof = tensor, received.sender, received.proof
            case _:
                assert_never(message)

    def reroute(self, message: Reroute) -> bool:
        """Change a cell's route; return whether the cell was this worker's before."""
        self._check_cell(message.cell)
        if message.stage >= self.spec.count:
            raise MessageError(Reason.WRONG_STAGE)
        was_mine = self.owns(message.cell)
        self.routes[message.cell][message.stage] = message.peer
        return was_mine

    def _check_cell(self, cell: int) -> None:
        if cell >= len(self.routes):
            raise MessageError(Reason.UNKNOWN_CELL, f"cell {cell} of {len(self.routes)}")

    def next(self) -> tuple[Cell, Half] | None:
        """Return what 1F1B computes next: a ready backward half, else a forward half within the window."""
        mine = sorted(
            (c for c in self.cells.values() if self.owns(c.index) and c.gw is None and not c.is_failed),
            key=lambda c: c.index,
        )
        in_flight = [cell for cell in mine if cell.is_in_flight]
        for cell in in_flight:
            if cell.gy is not None:
                return cell, Half.BACKWARD
        if len(in_flight) >= in_flight_limit(self.spec.index, self.spec.count):
            return None
        for cell in mine:
            if cell.y is None and cell.x is not None and not (self.spec.is_last and cell.labels is None):
                return cell, Half.WHOLE if self.spec.is_last else Half.FORWARD
        return None

    def record(self, root: bytes, reduction: Reduce) -> StepRecord:
        """Return the record of the cells that count as this worker's in the final reduction."""
        owned = [self.cells[c] for c, owner in enumerate(reduction.owners) if owner == self.me]
        return StepRecord(
            generation=self.generation,
            step=self.step,
            stage=self.spec.index,
            root=root,
            reduction=reduction,
            routes=tuple(tuple(route) for route in self.routes),
            cells=tuple(_record_of(cell) for cell in owned),
        )


def _check_absent(tensor: "Tensor | None") -> None:
    if tensor is not None:
        raise MessageError(Reason.DUPLICATE)


def _record_of(cell: Cell) -> CellRecord:
    if cell.x is None or cell.y is None or cell.gx is None or cell.gw is None:
        raise ValueError(f"cell {cell.index} is not finished")
    return CellRecord(
        cell=cell.index,
        x=cell.x,
        x_sender=cell.x_sender,
        x_proof=cell.x_proof,
        labels=cell.labels,
        labels_proof=cell.labels_proof,
        y=cell.y,
        boundaries=cell.boundaries,
        gy=cell.gy,
        gy_sender=cell.gy_sender,
        gy_proof=cell.gy_proof,
        gx=cell.gx,
        gw=cell.gw,
        loss=cell.loss,
        seconds=cell.seconds,
    )
