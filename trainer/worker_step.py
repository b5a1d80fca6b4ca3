"""What one worker knows of one step: its cells, their routes, what may run next, and the record of it."""

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, TypeAlias, assert_never

from trainer.content import address_of
from trainer.layout import StageSpec
from trainer.messages import Activation, Apply, Gradient, Labels, OpenStep, Reduce, Reroute, Tokens
from trainer.payloads import MessageError, Reason, TensorPayload
from trainer.reduction import Part, Reduction
from trainer.redundancy import Ballot
from trainer.schedule import in_flight_limit
from trainer.team_reduction import TeamReduction
from trainer.transport import Proof, Received

if TYPE_CHECKING:
    from torch import Tensor

CellData: TypeAlias = Tokens | Labels | Activation | Gradient


@dataclass(slots=True)
class Cell:
    """One cell's material as it comes in; x is tokens at the first stage, gy is absent at the last.

    `x_sent` and `gy_sent` are the bytes that came, where they are an encoding; `y_payload` and `gx_payload` what goes
    out. `ballots` hold what members of a team sent until most sent the same; `digest` is that of the results' content
    addresses, and `y_address` the output's, where teams compare them.
    """

    index: int
    x: "Tensor | None" = None
    x_sender: str = ""
    x_proof: Proof = ()
    x_sent: memoryview | None = None
    labels: "Tensor | None" = None
    labels_proof: Proof = ()
    y: "Tensor | None" = None
    boundaries: tuple[bytes, ...] = ()
    gy: "Tensor | None" = None
    gy_sender: str = ""
    gy_proof: Proof = ()
    gy_sent: memoryview | None = None
    gx: "Tensor | None" = None
    gw: "Tensor | None" = None
    y_payload: tuple[TensorPayload] | None = None
    gx_payload: tuple[TensorPayload] | None = None
    y_address: bytes = b""
    loss: float = 0.0
    seconds: float = 0.0
    is_failed: bool = False
    digest: bytes = b""
    ballots: "dict[type, Ballot[tuple[CellData, Received, Tensor]]]" = field(default_factory=dict)

    @property
    def is_in_flight(self) -> bool:
        """Whether the forward half is done and the backward half is not."""
        return self.y is not None and self.gw is None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held."""
        tensors = (self.x, self.labels, self.y, self.gy, self.gx, self.gw)
        encoded = sum(len(sent) for sent in (self.x_sent, self.gy_sent) if sent is not None)
        encoded += sum(ballot.size for ballot in self.ballots.values())
        out = (payload for payload in (self.y_payload, self.gx_payload) if payload is not None)
        encoded += sum(only.nbytes for (only,) in out if only.is_encoded)
        return encoded + sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def spoil(self, offset: int) -> None:
        """Drop what is not finite, made by the stage so many after this one; what came from beside may come again."""
        if offset < 0:
            self.x = None
        elif offset > 0:
            self.gy = None
        else:
            self.is_failed = True


@dataclass(frozen=True, slots=True)
class CellRecord:
    """The trace of a finished cell: inputs with their senders and proofs, outputs, layer boundaries.

    `x_sent` and `gy_sent` are the bytes that came, where they are an encoding of what was computed on. `gw` is
    absent where there was no room to keep it: re-execution gives it again.
    """

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
    gw: "Tensor | None"
    loss: float
    seconds: float
    x_sent: memoryview | None = None
    gy_sent: memoryview | None = None


@dataclass(frozen=True, slots=True)
class StepRecord:
    """A committed step at one worker: the cells it owns, their reduction, the new state's root.

    `applied` tells the norms of all stages' gradients where the optimiser's step needed them. `parts` are what the
    other contributors added, `far` the other end's part of the tied gradient; the proofs are the client's.
    """

    generation: int
    step: int
    stage: int
    root: bytes
    reduction: Reduce
    routes: tuple[tuple[str, ...], ...]
    cells: tuple[CellRecord, ...]
    applied: Apply | None = None
    parts: tuple[Part, ...] = ()
    far: Part | None = None
    proof: Proof = ()
    applied_proof: Proof = ()


class Half(Enum):
    """What to compute of a cell."""

    FORWARD = auto()
    BACKWARD = auto()
    WHOLE = auto()


@dataclass
class StepWork:
    """The cells of one open step at worker `me`, which holds stage `spec`.

    With a `quorum` above one a route's peer stands for its team: all of it computes the cell, and an input is what
    so many members of the team before, or after, sent alike.
    """

    opened: OpenStep
    me: str
    spec: StageSpec
    client: str
    quorum: int = 1
    routes: list[list[str]] = field(init=False)
    cells: dict[int, Cell] = field(init=False, default_factory=dict)
    is_short: bool = field(init=False, default=False)
    """Whether there was no room for some cell."""

    def __post_init__(self) -> None:
        if any(len(route) != self.spec.count for route in self.opened.routes):
            raise MessageError(Reason.MALFORMED, f"a route that has not {self.spec.count} stages")
        self.routes = [list(route) for route in self.opened.routes]
        self.teams = {peer: team for team in self.opened.teams for peer in team}

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

    def fits(self, message: CellData, whole: int, limit: int) -> bool:
        """Whether at most `limit` bytes will be held with a message: of a cell computed here, `whole` in the end."""
        held = {index: cell.nbytes for index, cell in self.cells.items()}
        held[message.cell] = held.get(message.cell, 0) + sum(payload.nbytes for payload in message.payload)
        return limit >= sum(max(known, whole) if self.owns(index) else known for index, known in held.items())

    def has_unfinished(self, but: int) -> bool:
        """Whether cells beside one that this worker has taken are still to be finished here."""
        return any(
            self.owns(index) and cell.gw is None and not cell.is_failed and index != but
            for index, cell in self.cells.items()
        )

    def members(self, peer: str) -> tuple[str, ...]:
        """Return the team of a peer, itself where there are no teams."""
        return self.teams.get(peer, (peer,))

    def owns(self, cell: int) -> bool:
        """Whether the cell is routed to this worker, or its team, now."""
        return self.me in self.members(self.routes[cell][self.spec.index])

    def producers(self, cell: int) -> tuple[str, ...]:
        """Who sends the cell's input."""
        return (self.client,) if self.spec.is_first else self.members(self.routes[cell][self.spec.index - 1])

    def consumers(self, cell: int) -> tuple[str, ...]:
        """Who takes the cell's output and sends its gradient; the client at the last stage."""
        return (self.client,) if self.spec.is_last else self.members(self.routes[cell][self.spec.index + 1])

    def expects(self, message: CellData, sender: str) -> bool:
        """Whether the cell is this worker's and `sender` is on its route for such a message.

        Raises `MessageError` for a cell that the step does not have, or a message for another stage.
        """
        self._check_cell(message.cell)
        here, spec = message.cell, self.spec
        wanted: tuple[str, ...]
        match message:
            case Tokens():
                is_right_stage, wanted = spec.is_first, (self.client,)
            case Labels():
                is_right_stage, wanted = spec.is_last, (self.client,)
            case Activation():
                is_right_stage, wanted = message.stage == spec.index - 1, self.producers(here)
            case Gradient():
                is_right_stage, wanted = message.stage == spec.index + 1, self.consumers(here)
            case _:
                assert_never(message)
        if not is_right_stage:
            raise MessageError(Reason.WRONG_STAGE)
        return self.owns(here) and sender in wanted

    def put(self, message: CellData, received: Received, tensor: "Tensor") -> None:
        """Keep an input of a cell, from a team what most of it sent; raise `MessageError` if it is already there."""
        cell = self.cells.setdefault(message.cell, Cell(message.cell))
        if self.quorum > 1 and isinstance(message, Activation | Gradient):
            ballot = cell.ballots.setdefault(type(message), Ballot(self.quorum))
            data = message.payload[0].data
            address = received.proof[0][0] if received.proof else address_of(data)
            chosen = ballot.cast(received.sender, address, (message, received, tensor), len(data))
            if chosen is None:
                return
            message, received, tensor = chosen
        sent = message.payload[0].data if message.payload[0].is_encoded else None
        match message:
            case Tokens() | Activation():
                _check_absent(cell.x)
                cell.x, cell.x_sender, cell.x_proof, cell.x_sent = tensor, received.sender, received.proof, sent
            case Labels():
                _check_absent(cell.labels)
                cell.labels, cell.labels_proof = tensor, received.proof
            case Gradient():
                _check_absent(cell.gy)
                cell.gy, cell.gy_sender, cell.gy_proof, cell.gy_sent = tensor, received.sender, received.proof, sent
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

    def reduction(self, request: Reduce) -> Reduction:
        """Return the reduction that is asked for; raise `MessageError` while cells that it needs are not finished."""
        finished = [cell.index for cell in self.cells.values() if cell.gw is not None]
        if self.quorum > 1:
            return TeamReduction(request, self.me, self.teams, finished, self.quorum)
        reduction = Reduction(request, self.me)
        if unfinished := sorted(set(reduction.own_cells).difference(finished)):
            raise MessageError(Reason.UNKNOWN_CELL, f"cells {unfinished} are not finished")
        return reduction

    def record(self, root: bytes, reduction: Reduction) -> StepRecord:
        """Return the record of the cells that count as this worker's, or its team's, in the final reduction."""
        owners = reduction.request.owners
        mine = [c for c, owner in enumerate(owners) if self.me in self.members(owner)]
        if self.quorum > 1:  # the others have finished what this worker has not
            mine = [c for c in mine if c in self.cells and self.cells[c].gw is not None]
        owned = [self.cells[c] for c in mine]
        return StepRecord(
            generation=self.generation,
            step=self.step,
            stage=self.spec.index,
            root=root,
            reduction=reduction.request,
            routes=tuple(tuple(route) for route in self.routes),
            cells=tuple(_record_of(cell) for cell in owned),
            applied=reduction.order,
            parts=tuple(part for _, part in sorted(reduction.parts.items())),
            far=reduction.far_part,
            proof=reduction.proof,
            applied_proof=reduction.order_proof,
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
        x_sent=cell.x_sent,
        gy_sent=cell.gy_sent,
    )
