"""The client's part in the step without I/O: form the swarm, open, reduce and commit steps, take messages."""

from collections import Counter
from math import isfinite
from typing import assert_never

from trainer.coordinator_book import StepBook
from trainer.coordinator_ports import Members, PeerJoined, PeerLeft, Share
from trainer.coordinator_probe import Evaluation
from trainer.coordinator_repair import Repairs, StepFailed
from trainer.coordinator_roster import Member, Roster, Status
from trainer.coordinator_round import Round
from trainer.coordinator_state import SwarmState
from trainer.joint import other_end
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
from trainer.monitors import Seen, Why
from trainer.payloads import MessageError, Reason
from trainer.schedule import plan_routes
from trainer.team_repair import TeamRepairs, open_team_book
from trainer.transport import Lost, Received


class Swarm:
    """The step's course on a `SwarmState`; what breaks is left to `Repairs`."""

    def __init__(self, state: SwarmState) -> None:
        self.refused: Counter[Reason] = Counter()
        self.state = state
        self._quorum = state.config.manifest.quorum
        self.repairs: Repairs = Repairs(state) if self._quorum == 1 else TeamRepairs(state)
        self._attempt = self._applied = 0
        self._opened = (-1, -1)
        self._is_joint = state.config.manifest.is_joint
        self.evaluation: Evaluation | None = None

    # forming and joining

    def form(self, members: Members) -> None:
        """Start a generation: ask every member for the state that it resumes from."""
        self.state.generation, self.state.step = members.generation, members.resume_step
        self.state.book = None
        self.state.clear_rounds()
        self.state.roots = {key: root for key, root in self.state.roots.items() if key[0] <= self.state.step}
        self.state.must_reopen = False
        self.state.roster = Roster(self._quorum)
        self.state.roster.update(members)
        for member in self.state.roster.of(Status.ABSENT):
            others = tuple(peer for peer in members.stages[member.stage] if peer != member.peer)
            self.state.invite(member, others)

    def reopen(self) -> None:
        """Begin the step under way again: whoever takes part goes back to the state before it."""
        self.state.must_reopen = False
        self.state.book = None
        self.state.clear_rounds()
        for member in self.state.roster.of(Status.READY):
            others = tuple(peer for peer in self.state.roster.ready(member.stage) if peer != member.peer)
            self.state.invite(member, others)

    @property
    def is_formed(self) -> bool:
        """Whether every stage has a worker, and nobody else is awaited."""
        return not self.state.roster.of(Status.PREPARING) and not self.state.roster.empty_stages()

    def agree(self) -> None:
        """Fix each stage's root by majority where it is not known; leave out whoever has another."""
        for stage in range(self.state.roster.stages):
            members = self.state.roster.of(Status.READY, stage)
            counts = Counter(member.root for member in members)
            usual = min(counts, key=lambda root: (-counts[root], root))
            if counts[usual] < self._quorum and (self.state.step, stage) not in self.state.roots:
                usual = b""  # nobody's word is enough
            else:
                usual = self.state.roots.setdefault((self.state.step, stage), usual)
            for member in members:
                if member.root != usual:
                    self.repairs.leave_out(member, Reason.STATE_MISMATCH)

    def update(self, members: Members) -> None:
        """Take the chain's present list of members."""
        self.state.pace.verified.update(members.settled)
        for member in self.state.roster.update(members):
            self.state.note_departed(member)
            if member.status is Status.READY:
                self.state.ports.report(PeerLeft(self.state.step + 1, member.stage, member.peer, "unseated"))
                self.repairs.repair(member, "unseated")

    def invite_absent(self) -> None:
        """Ask every absent member whose pause is over for the state of the last committed step."""
        for member in self.state.roster.due(self.state.step + 1):
            self.state.invite(member, self.state.roster.ready(member.stage))

    # the step

    def open(self) -> StepBook:
        """Route the next step's micro-batches over the replicas and feed the ends."""
        self.invite_absent()
        self.state.book = book = self._next_book()
        self.state.clear_rounds()
        self.repairs.start_step()
        if (book.generation, book.step) != self._opened:  # what is left of a former try must not count in this one
            self._attempt = self._applied = 0
        self._opened = (book.generation, book.step)
        self.state.pace.start()
        for stage in range(book.stages):
            replicas = self.state.roster.ready(stage)
            self.state.pace.forgive([peer for peer in replicas if not book.held(stage, peer)], replicas)
        self.state.broadcast(_opening(book))
        for cell in book.cells:
            for stage in {0, book.stages - 1}:
                self.state.feed(book, stage, cell)
        self.state.watch(book)
        return book

    def _next_book(self) -> StepBook:
        state = self.state
        if isinstance(self.repairs, TeamRepairs):
            return open_team_book(state, self.repairs.outvoted)
        weights = [state.pace.weights(state.roster.ready(stage)) for stage in range(state.roster.stages)]
        routes = plan_routes(state.config.manifest.microbatches, weights)
        return StepBook(state.generation, state.step + 1, routes)

    def reduce(self, book: StepBook) -> None:
        """Ask every stage that has no round under way to reduce; the step's cells must all be in."""
        self.repairs.note_complete(book)
        due = [stage for stage in range(book.stages) if stage not in self.state.rounds]
        self._attempt += bool(due)
        for stage in due:
            replicas, other = self.state.roster.ready(stage), other_end(self.state.config.manifest, stage)
            ends = () if other is None else self.state.roster.ready(other)
            request = Reduce(book.generation, book.step, self._attempt, book.owners(stage), replicas, ends)
            self.state.rounds[stage] = Round(request, stage, self.state.now())
            for peer in replicas:
                self.state.post(peer, request)

    @property
    def has_no_newcomer(self) -> bool:
        """Whether nobody is about to join the step under way."""
        return not self.state.roster.of(Status.PREPARING)

    @property
    def is_summed(self) -> bool:
        """Whether every stage has its mean gradient and waits for the others' norms."""
        return self._is_joint and not self.state.applies and self._is_over(self.state.rounds)

    @property
    def is_reduced(self) -> bool:
        """Whether every stage has agreed on its new state."""
        return self._is_over(self.state.applies if self._is_joint else self.state.rounds)

    def _is_over(self, rounds: dict[int, Round]) -> bool:
        return all(stage in rounds and rounds[stage].is_complete for stage in range(self.state.roster.stages))

    def apply(self, book: StepBook) -> None:
        """Ask every stage to do the optimiser's step with the norms of all; raise `StepFailed`.

        Whoever differs is left out first. If then a stage lacks somebody, nothing is asked yet.
        """
        for find in (self._apart, self._dissenters):
            for peer in find():
                self.repairs.leave_out(self.state.roster.get(peer), Reason.STATE_MISMATCH)
        if not self.is_summed:
            return
        rounds = [self.state.rounds[stage] for stage in range(book.stages)]
        squares = tuple(done.squares for done in rounds)
        for stage, square in enumerate(squares):
            if not (isfinite(square) and square >= 0.0):
                raise StepFailed(book.step, stage, "the norm of the gradient")
        self._applied += 1
        attempts = tuple(done.request.attempt for done in rounds)
        request = Apply(book.generation, book.step, self._applied, attempts, squares)
        for stage, done in enumerate(rounds):
            replicas = tuple(sorted(done.answers))
            self.state.applies[stage] = Round(request, stage, self.state.now(), replicas)
            for peer in replicas:
                self.state.post(peer, request)

    def _dissenters(self) -> tuple[str, ...]:
        """Return who differs from most of its stage."""
        return tuple(peer for done in self.state.rounds.values() if done.answers for peer in done.dissenters)

    def _apart(self) -> tuple[str, ...]:
        """Return who differs from most at both ends in the gradient of the tied tensor."""
        rounds = self.state.rounds
        ends = [rounds[stage] for stage in rounds if other_end(self.state.config.manifest, stage) is not None]
        digests = {p: a.digest for end in ends for p, a in end.answers.items() if isinstance(a, Summed)}
        counts = Counter(digests.values())
        usual = min(counts, key=lambda digest: (-counts[digest], digest), default=b"")
        return tuple(sorted(peer for peer, digest in digests.items() if digest != usual))

    def commit(self, book: StepBook) -> None:
        """Make the new states current; whoever has another root starts again from a holder."""
        self._judge(book)
        cells = {m.peer: len(book.held(m.stage, m.peer)) for m in self.state.roster.of(Status.READY)}
        self.state.pace.verified.note(book.step, cells)
        self.state.book, self.state.step = None, book.step
        took_part = set()
        rounds = self.state.applies or self.state.rounds
        for stage, done in rounds.items():
            self.state.roots[book.step, stage] = done.root
            for peer in done.roots.keys() - set(done.dissenters):
                took_part.add(peer)
                self.state.post(peer, Commit(book.generation, book.step))
        self.repairs.learn_reduction(max(d.since - d.started for d in (*rounds.values(), *self.state.rounds.values())))
        dissenters = {peer for done in rounds.values() for peer in done.dissenters}
        self.state.clear_rounds()
        for member in (*self.state.roster.of(Status.PREPARING), *self.state.roster.of(Status.READY)):
            if member.peer in took_part:
                member.failures, member.root = 0, self.state.roots[book.step, member.stage]
            else:
                is_dissenter = member.peer in dissenters
                self.repairs.leave_out(member, Reason.STATE_MISMATCH if is_dissenter else "late")
        oldest = self.state.step - self.state.config.manifest.audit.depth - 1
        self.state.roots = {key: root for key, root in self.state.roots.items() if key[0] >= oldest}

    def _judge(self, book: StepBook) -> None:
        """Name who is odd in a step that is about to be committed."""
        rounds = [self.state.rounds[stage] for stage in range(book.stages)]
        owners = [book.owners(stage) for stage in range(book.stages)]
        squares = [done.squares for done in rounds] if self._is_joint else ()
        self.state.name(self.state.monitors.judge(Seen(book.step, owners, book.losses, squares)), book.step)

    def shares(self, book: StepBook) -> tuple[Share, ...]:
        """Return what every replica that takes part did of a step."""
        found: list[Share] = []
        for stage in range(book.stages):
            for peer, speed in self.state.pace.speeds(self.state.roster.ready(stage)).items():
                found.append(Share(stage, peer, len(book.held(stage, peer)), speed))
        return tuple(found)

    def finish(self) -> None:
        """Tell every member that the task is over."""
        for status in Status:
            for member in self.state.roster.of(status):
                self.state.post(member.peer, Finish())

    # messages

    def take(self, received: Received) -> None:
        """Take a message; one that does not fit is refused and counted."""
        try:
            self._handle(received.sender, received.message)
        except MessageError as refusal:
            self.refused[refusal.reason] += 1

    def _handle(self, sender: str, message: Message | Lost) -> None:
        match message:
            case Lost():
                self.repairs.lose(message.peer, "lost")
            case Ready():
                self._on_ready(sender, message)
            case Passed() | CellDone():
                self._on_cell(sender, message)
            case Summed() | Reduced():
                self._open_book(message)
                self._on_sum(sender, message)
            case NotFinite():
                self.repairs.not_finite(self._open_book(message), self.state.roster.get(sender), message)
            case Probed():
                if self.evaluation is None:
                    raise MessageError(Reason.UNEXPECTED, "nothing is being evaluated")
                self.evaluation.note(sender, message)
            case Fault():
                self._on_fault(self.state.roster.get(sender), message)
            case (
                Prepare() | OpenStep() | Tokens() | Labels() | Reroute() | Reduce() | Repeat() | Apply() | Commit()
                | Finish() | Activation() | Gradient() | Partial() | Tied() | Probe() | Relay()
            ):  # fmt: skip
                raise MessageError(Reason.UNEXPECTED, type(message).__name__)
            case _:
                assert_never(message)

    def _on_ready(self, sender: str, message: Ready) -> None:
        member = self.state.roster.note_ready(sender, message)
        wanted = self.state.roots.get((self.state.step, member.stage), message.root)
        if message.root != wanted:
            self.repairs.leave_out(member, Reason.STATE_MISMATCH)
            return
        self.state.ports.report(PeerJoined(self.state.step + 1, member.stage, sender))
        self.repairs.is_getting_on(member.stage)
        if (book := self.state.book) is not None:
            self.state.post(sender, _opening(book))
            ready = self.state.roster.ready(member.stage)
            owners, lost = book.owners(member.stage), book.missing(member.stage, sender)
            cells = [cell for cell in book.cells if owners[cell] not in ready or cell in lost]
            self.repairs.reassign(book, member.stage, cells, ())
            self.state.watch(book)

    def _on_cell(self, sender: str, message: Passed | CellDone) -> None:
        book, member = self._open_book(message), self.state.roster.get(sender)
        if member.status is not Status.READY:  # its gradients are out of reach of a reduction
            raise MessageError(Reason.WRONG_SENDER, f"{sender} does not take part")
        is_new = True
        if isinstance(message, Passed):
            is_new = not book.has_passed(message.stage, message.cell)
            book.note_passed(sender, message)
        else:
            book.note_done(sender, message)
        if is_new:  # what is only repeated is no progress
            self.repairs.heard(member, isinstance(message, CellDone))
        if isinstance(message, CellDone):
            place, seconds = (book.step, message.stage, message.cell), self.state.pace.finished(sender)
            self.state.monitors.note_cell(place, sender, seconds, message.digest)
        self.repairs.note_cell(book)
        self.state.watch(book)

    def _on_fault(self, member: Member, fault: Fault) -> None:
        match fault.reason:
            case Reason.NO_STATE | Reason.STATE_MISMATCH:
                is_answer = member.asked == (fault.generation, fault.step)
                is_given_up = member.status is Status.READY and fault.generation == self.state.generation
                if is_given_up or (member.status is Status.PREPARING and is_answer):
                    self.repairs.leave_out(member, fault.reason)
            case Reason.PARTIAL_MISSING:
                self._on_missing(self._open_book(fault), member, fault)
                self.repairs.is_getting_on(member.stage)
            case Reason.PEER_UNREACHABLE:
                book = self._open_book(fault)
                for peer in fault.peers:
                    self.repairs.bypass(book, member, self.state.roster.get(peer))
            case Reason.NOT_FINITE:
                book = self._open_book(fault)
                for peer in fault.peers or (member.peer,):
                    self.repairs.bad_sum(book, self.state.roster.get(peer), member)
            case Reason.ODD_STATISTICS:
                self._open_book(fault)
                for peer in fault.peers:
                    if peer in self.state.roster.ready(member.stage):
                        self.state.suspect(member.stage, peer, Why.STATISTICS)
            case _:
                self.repairs.stall(self._open_book(fault), member, fault.reason)

    def _on_missing(self, book: StepBook, member: Member, fault: Fault) -> None:
        """Have parts that were lost on their way sent again."""
        current = self._round_of(member.peer)
        for peer in current.note_missing(member.peer, fault):
            if peer != member.peer and self.state.takes_part(peer):
                self.state.post(peer, Repeat(book.generation, book.step, current.request.attempt, member.peer))

    def _on_sum(self, sender: str, message: Summed | Reduced) -> None:
        current = self._round_of(sender)
        if isinstance(message, Reduced) != (isinstance(current.request, Apply) or not self._is_joint):
            raise MessageError(Reason.UNEXPECTED, type(message).__name__)
        current.note(sender, message, self.state.now())
        self.repairs.is_getting_on(current.stage)
        self.repairs.note_round(current)

    def _open_book(self, message: Passed | CellDone | NotFinite | Summed | Reduced | Fault) -> StepBook:
        book = self.state.book
        if book is None or (message.generation, message.step) != (book.generation, book.step):
            raise MessageError(Reason.STALE_STEP, f"step {message.step}")
        return book

    def _round_of(self, peer: str) -> Round:
        current = self.state.active(self.state.roster.get(peer).stage)
        if current is None:
            raise MessageError(Reason.STALE_STEP, "no reduction is under way")
        return current


def _opening(book: StepBook) -> OpenStep:
    return OpenStep(book.generation, book.step, tuple(tuple(route) for route in book.routes), book.teams)
