"""The books of one step where teams compute every cell: a cell is in once most of its team have the same results."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import msgspec

from trainer.coordinator_book import StepBook
from trainer.messages import CellDone, NotFinite, Passed
from trainer.payloads import MessageError, Reason
from trainer.redundancy import Ballot
from trainer.schedule import in_flight_limit


class TeamBook(StepBook):
    """A `StepBook` whose routes name teams by one member; results are votes, and a step waits for all who are there.

    `teams` are disjoint; whoever leaves is counted out and its team goes on as long as it can find a majority.
    """

    def __init__(
        self, place: tuple[int, int], routes: Sequence[Sequence[str]], teams: Sequence[tuple[str, ...]], quorum: int
    ) -> None:
        super().__init__(*place, routes)
        self.teams = tuple(teams)
        self.quorum = quorum
        self._team_of = {peer: team for team in teams for peer in team}
        self._out: set[str] = set()
        self._passes: defaultdict[tuple[int, int], Ballot[float]] = defaultdict(lambda: Ballot(quorum))
        self._ballots: defaultdict[tuple[int, int], Ballot[float]] = defaultdict(lambda: Ballot(quorum))

    # what comes in

    def note_passed(self, sender: str, message: Passed) -> None:
        """Take a member's forward half; raise `MessageError` for a second one or a stranger's."""
        self._check(sender, message.stage, message.cell)
        self._passes[message.stage, message.cell].cast(sender, message.digest, 0.0)

    def note_done(self, sender: str, message: CellDone) -> None:
        """Take a member's results; raise `MessageError` for a second vote or a stranger's."""
        self._check(sender, message.stage, message.cell)
        value = message.digest + msgspec.msgpack.encode(message.loss)
        self._vote(sender, message.stage, message.cell, value, message.loss)

    def note_not_finite(self, sender: str, message: NotFinite, stage: int) -> bool:
        """Take the word of a member of `stage` that a cell cannot be computed; return whether most say the same."""
        self._check(sender, stage, message.cell)
        value = f"{message.stage} {message.what}".encode()
        return self._vote(sender, stage, message.cell, value, 0.0)

    def _vote(self, sender: str, stage: int, cell: int, value: bytes, loss: float) -> bool:
        chosen = self._ballots[stage, cell].cast(sender, value, loss)
        if chosen is None:
            return False
        if stage == self.stages - 1:
            self._losses[cell] = chosen
        return True

    def lose(self, peer: str) -> None:
        """Count a member out."""
        self._out.add(peer)

    # what follows

    def members(self, stage: int, cell: int) -> tuple[str, ...]:
        """Return who of a cell's team is there."""
        return self._live(self._team_of[self.routes[cell][stage]])

    @property
    def is_viable(self) -> bool:
        """Whether every team has enough members to find a majority."""
        return all(len(self._live(team)) >= self.quorum for team in self.teams)

    @property
    def is_heard(self) -> bool:
        """Whether every member that is there has reported all its cells."""
        return not any(self._missing(stage, cell) for cell in self.cells for stage in range(self.stages))

    @property
    def is_complete(self) -> bool:
        """Whether all have reported, and in every team enough members were with the majority in all its cells."""
        return self.is_heard and not self.split_teams

    @property
    def split_teams(self) -> tuple[tuple[str, ...], ...]:
        """The teams that cannot agree on a cell or, once all have reported, on the sum of their cells."""
        if self.is_heard:
            return tuple(team for team in self.teams if len(self._trusted(team)) < self.quorum)
        split = {
            self.routes[cell][stage]
            for ballots in (self._passes, self._ballots)
            for (stage, cell), ballot in ballots.items()
            if ballot.decided is None and ballot.votes.keys() >= set(self.members(stage, cell))
        }
        return tuple(team for team in self.teams if not split.isdisjoint(team))

    @property
    def outvoted(self) -> dict[tuple[int, str], tuple[int, ...]]:
        """By stage and member the cells that most of its team had otherwise."""
        found: defaultdict[tuple[int, str], list[int]] = defaultdict(list)
        for (stage, cell), ballot in sorted(self._ballots.items()):
            for peer in ballot.dissenters:
                found[stage, peer].append(cell)
        return {place: tuple(cells) for place, cells in found.items()}

    def owners(self, stage: int) -> tuple[str, ...]:
        """Return, for each cell at `stage`, one of its team that was with the majority in all its cells."""
        return tuple(self._speaker(route[stage]) for route in self.routes)

    def held(self, stage: int, peer: str) -> tuple[int, ...]:
        """Return the cells that `peer` computes at `stage`."""
        return tuple(cell for cell in self.cells if peer in self.members(stage, cell))

    def missing(self, stage: int, peer: str) -> tuple[int, ...]:
        """Return the cells that `peer` computes at `stage` and has not finished."""
        return tuple(cell for cell in self.held(stage, peer) if peer in self._missing(stage, cell))

    def waited_for(self) -> frozenset[str]:
        """Return the members that have all they need for their next half of some cell."""
        in_flight = Counter(
            (stage, peer)
            for (stage, cell), sent in self._passes.items()
            for peer in self._missing(stage, cell) & sent.votes.keys()
        )
        return frozenset(
            peer
            for cell in self.cells
            for stage in range(self.stages)
            for peer in self._missing(stage, cell)
            if self._is_due_at(stage, cell, peer, in_flight)
        )

    def _is_due_at(self, stage: int, cell: int, peer: str, in_flight: Mapping[tuple[int, str], int]) -> bool:
        if stage < self.stages - 1 and peer in self._passes[stage, cell].votes:
            return not self._missing(stage + 1, cell)
        before = stage - 1
        has_input = stage == 0 or self._missing(before, cell) <= self._passes[before, cell].votes.keys()
        has_room = in_flight.get((stage, peer), 0) < in_flight_limit(stage, self.stages)
        return has_input and (stage == self.stages - 1 or has_room)

    def _live(self, team: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(peer for peer in team if peer not in self._out)

    def _missing(self, stage: int, cell: int) -> set[str]:
        return set(self.members(stage, cell)).difference(self._ballots[stage, cell].votes)

    def _trusted(self, team: tuple[str, ...]) -> tuple[str, ...]:
        """Return the members that are there and were with the majority wherever they voted."""
        mine = [ballot for ballot in self._ballots.values() if not ballot.votes.keys().isdisjoint(team)]
        if any(ballot.decided is None for ballot in mine):
            return ()
        return tuple(p for p in self._live(team) if all(b.votes.get(p) == b.decided for b in mine))

    def _speaker(self, peer: str) -> str:
        team = self._team_of[peer]
        return next(iter(self._trusted(team) or self._live(team)), peer)

    def _check(self, sender: str, stage: int, cell: int) -> None:
        if cell not in self.cells or stage >= self.stages:
            raise MessageError(Reason.UNKNOWN_CELL, f"stage {stage}, cell {cell}")
        if sender not in self.members(stage, cell):
            raise MessageError(Reason.WRONG_SENDER, f"{sender} does not compute cell {cell} of stage {stage}")
