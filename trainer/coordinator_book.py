"""The books of one step: who owns each (stage, cell), what is in, and whose turn it is."""

from collections import Counter
from collections.abc import Sequence

from trainer.messages import CellDone, Passed
from trainer.payloads import MessageError, Reason
from trainer.schedule import in_flight_limit


class StepBook:
    """Exactly-once accounting of a step's cells; a result counts only from the cell's present owner."""

    def __init__(self, generation: int, step: int, routes: Sequence[Sequence[str]]) -> None:
        self.generation = generation
        self.step = step
        self.routes = [list(route) for route in routes]
        self.stages = len(self.routes[0])
        self.teams: tuple[tuple[str, ...], ...] = ()
        self.moves: Counter[tuple[int, int]] = Counter()
        self._passed: set[tuple[int, int]] = set()
        self._done: set[tuple[int, int]] = set()
        self._losses: dict[int, float] = {}

    @property
    def cells(self) -> range:
        """Indices of the micro-batches."""
        return range(len(self.routes))

    @property
    def is_complete(self) -> bool:
        """Whether every (stage, cell) is in."""
        return len(self._done) == self.stages * len(self.routes)

    @property
    def losses(self) -> tuple[float, ...]:
        """Each micro-batch's loss in a complete step."""
        return tuple(self._losses[cell] for cell in self.cells)

    @property
    def loss(self) -> float:
        """Mean loss over the micro-batches of a complete step."""
        return sum(self.losses) / len(self.routes)

    def note_passed(self, sender: str, message: Passed) -> None:
        """Take a forward half; raise `MessageError` unless it is the owner's."""
        self._check(sender, message.stage, message.cell)
        self._passed.add((message.stage, message.cell))

    def note_done(self, sender: str, message: CellDone) -> None:
        """Take a finished cell; raise `MessageError` for a second one or another peer's."""
        self._check(sender, message.stage, message.cell)
        if (message.stage, message.cell) in self._done:
            raise MessageError(Reason.DUPLICATE)
        self._done.add((message.stage, message.cell))
        if message.stage == self.stages - 1:
            self._losses[message.cell] = message.loss

    def owners(self, stage: int) -> tuple[str, ...]:
        """Return the owner of each cell at `stage`."""
        return tuple(route[stage] for route in self.routes)

    def members(self, stage: int, cell: int) -> tuple[str, ...]:
        """Return who computes a cell."""
        return (self.routes[cell][stage],)

    def held(self, stage: int, peer: str) -> tuple[int, ...]:
        """Return the cells that `peer` owns at `stage`."""
        return tuple(cell for cell in self.cells if self.routes[cell][stage] == peer)

    def missing(self, stage: int, peer: str) -> tuple[int, ...]:
        """Return the cells that `peer` owns at `stage` and has not finished."""
        return tuple(cell for cell in self.held(stage, peer) if (stage, cell) not in self._done)

    def move(self, stage: int, cell: int, peer: str) -> None:
        """Give a cell to another owner, who has everything still to do."""
        self.routes[cell][stage] = peer
        self.moves[stage, cell] += 1
        self.reopen(stage, cell)

    def reopen(self, stage: int, cell: int) -> None:
        """Count a cell as not begun: what its owner had is gone."""
        self._passed.discard((stage, cell))
        self._done.discard((stage, cell))

    def has_passed(self, stage: int, cell: int) -> bool:
        """Whether the forward half is done."""
        return (stage, cell) in self._passed

    def waited_for(self) -> frozenset[str]:
        """Return the owners that have all they need for their next half of some cell."""
        in_flight = Counter(
            (stage, self.routes[cell][stage]) for stage, cell in self._passed if (stage, cell) not in self._done
        )
        return frozenset(
            self.routes[cell][stage]
            for cell in self.cells
            for stage in range(self.stages)
            if (stage, cell) not in self._done and self._is_due(stage, cell, in_flight)
        )

    def _is_due(self, stage: int, cell: int, in_flight: Counter[tuple[int, str]]) -> bool:
        is_last = stage == self.stages - 1
        if (stage, cell) in self._passed:
            return (stage + 1, cell) in self._done
        has_input = stage == 0 or (stage - 1, cell) in self._passed | self._done
        has_room = in_flight[stage, self.routes[cell][stage]] < in_flight_limit(stage, self.stages)
        return has_input and (is_last or has_room)

    def _check(self, sender: str, stage: int, cell: int) -> None:
        if cell not in self.cells or stage >= self.stages:
            raise MessageError(Reason.UNKNOWN_CELL, f"stage {stage}, cell {cell}")
        if self.routes[cell][stage] != sender:
            raise MessageError(Reason.WRONG_SENDER, f"{sender} does not own cell {cell} of stage {stage}")
