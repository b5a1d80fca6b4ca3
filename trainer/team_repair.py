"""What the client does when members of a team die, stall or disagree: the others go on, or the step begins again."""

from collections import Counter, defaultdict
from collections.abc import Sequence

from trainer.coordinator_book import StepBook
from trainer.coordinator_ports import Outvoted, SplitTeam
from trainer.coordinator_repair import Repairs, StepFailed
from trainer.coordinator_roster import Member
from trainer.coordinator_round import Round
from trainer.coordinator_state import SwarmState
from trainer.messages import NotFinite
from trainer.redundancy import quorum_of, teams_of
from trainer.schedule import plan_routes
from trainer.team_book import TeamBook


def open_team_book(swarm: SwarmState, outvoted: Counter[str]) -> TeamBook:
    """Return the next step's book: teams of the replicas that were outvoted least, cells by each team's slowest."""
    manifest, stages = swarm.config.manifest, range(swarm.roster.stages)
    weights: list[dict[str, float]] = []
    teams: list[tuple[str, ...]] = []
    for stage in stages:
        pace = swarm.pace.weights(swarm.roster.ready(stage))
        formed = teams_of(tuple(pace), manifest.audit.redundancy, lambda peer: (outvoted[peer],))
        weights.append({team[0]: min(pace[peer] for peer in team) for team in formed})
        teams += formed
    routes = plan_routes(manifest.microbatches, weights)
    used = {route[stage] for route in routes for stage in stages}
    return TeamBook((swarm.generation, swarm.step + 1), routes, [t for t in teams if t[0] in used], manifest.quorum)


class TeamRepairs(Repairs):
    """Repairs where teams compute every cell: nothing is moved to others while a majority can still be found."""

    def __init__(self, swarm: SwarmState) -> None:
        super().__init__(swarm)
        self.outvoted: Counter[str] = Counter()
        self._quorum = quorum_of(swarm.config.manifest.audit.redundancy)
        self._counted: StepBook | None = None
        self._not_finite: defaultdict[int, set[str]] = defaultdict(set)

    def start_step(self) -> None:
        """Forget what was not finite in the step before."""
        super().start_step()
        self._not_finite.clear()

    def repair(self, member: Member, why: str) -> None:
        """Go on without a member, or begin the step again where its team is left too small."""
        book = self._swarm.book
        if not isinstance(book, TeamBook):
            return
        book.lose(member.peer)
        for each in (self._swarm.rounds.get(member.stage), self._swarm.applies.get(member.stage)):
            if each is not None:
                each.spare(member.peer)
                self.note_round(each)
        if not book.is_viable:
            self._swarm.must_reopen = True
        self.note_cell(book)
        self._swarm.watch(book)

    def stall(self, book: StepBook, member: Member, why: str) -> None:
        """Go on without a member that makes no progress."""
        self._swarm.pace.penalise(member.peer, self._swarm.now())
        self.leave_out(member, why)

    def note_cell(self, book: StepBook) -> None:
        """Leave out teams that have no majority in a cell although all have reported."""
        if isinstance(book, TeamBook) and not self._swarm.must_reopen:
            for team in book.split_teams:
                self._dissolve(team)

    def note_complete(self, book: StepBook) -> None:
        """Tell who was outvoted in a step, once."""
        if isinstance(book, TeamBook) and book is not self._counted:
            self._counted = book
            for (stage, peer), cells in book.outvoted.items():
                self.outvoted[peer] += 1
                self._swarm.ports.report(Outvoted(book.step, stage, peer, cells))

    def note_round(self, current: Round) -> None:
        """Leave out a stage's replicas if they cannot agree on what the step leads to; too few do not differ."""
        if self._swarm.must_reopen or not current.is_complete:
            return
        if len(current.answers) < self._quorum:
            self._swarm.must_reopen = True
        elif Counter(current.roots.values())[current.root] < self._quorum:
            self._dissolve(tuple(current.answers))

    def _dissolve(self, team: tuple[str, ...]) -> None:
        """Begin the step again without a team, if others are there; who of it is wrong nobody can tell."""
        self._swarm.must_reopen = True
        there = [self._swarm.roster.get(peer) for peer in team if self._swarm.roster.has(peer)]
        if there:
            self._swarm.ports.report(SplitTeam(self._swarm.step + 1, there[0].stage, team))
        for member in there:
            self.lose(member.peer, "split")

    def not_finite(self, book: StepBook, member: Member, message: NotFinite) -> None:
        """Count the word of one member; raise `StepFailed` when most of its team say the same."""
        if isinstance(book, TeamBook) and book.note_not_finite(member.peer, message, member.stage):
            is_loss = message.stage == book.stages - 1 and message.what == "output"
            what = "loss" if is_loss else message.what
            raise StepFailed(book.step, message.stage, f"the {what} of micro-batch {message.cell}")
        self.note_cell(book)

    def bad_sum(self, book: StepBook, member: Member, _reporter: Member) -> None:
        """Count a replica's word on its own sum; raise `StepFailed` when most of the stage say the same."""
        if member is not _reporter:
            return
        told = self._not_finite[member.stage]
        told.add(member.peer)
        if len(told) >= self._quorum:
            raise StepFailed(book.step, member.stage, "the sum of the gradients")

    def bypass(self, book: StepBook, member: Member, unreachable: Member) -> None:
        """Leave a broken link alone: what is lost on it comes from the others of the team."""

    def reassign(self, book: StepBook, stage: int, cells: Sequence[int], excluded: tuple[str, ...]) -> None:
        """Leave the cells with their teams, which are as they were when the step was opened."""
