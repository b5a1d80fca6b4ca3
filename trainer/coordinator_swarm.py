"""The client's part in the step without I/O: form the swarm, open, reduce and commit steps, take messages."""

from collections import Counter
from typing import assert_never

from trainer.coordinator_book import StepBook
from trainer.coordinator_ports import Members, PeerJoined, PeerLeft
from trainer.coordinator_repair import Repairs
from trainer.coordinator_roster import Member, Roster, Status
from trainer.coordinator_round import Round
from trainer.coordinator_state import SwarmState
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
)
from trainer.schedule import plan_routes
from trainer.transport import Lost, Received


class Swarm:
    """The step's course on a `SwarmState`; what breaks is left to `Repairs`."""

    def __init__(self, state: SwarmState) -> None:
        self.refused: Counter[Reason] = Counter()
        self.state = state
        self.repairs = Repairs(state)
        self._attempt = 0

    # forming and joining

    def form(self, members: Members) -> None:
        """Start a generation: ask every member for the state that it resumes from."""
        self.state.generation, self.state.step = members.generation, members.resume_step
        self.state.book = None
        self.state.rounds.clear()
        self.state.roots = {key: root for key, root in self.state.roots.items() if key[0] <= self.state.step}
        self.state.roster = Roster()
        self.state.roster.update(members)
        for member in self.state.roster.of(Status.ABSENT):
            others = tuple(peer for peer in members.stages[member.stage] if peer != member.peer)
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
            root = self.state.roots.setdefault((self.state.step, stage), usual)
            for member in members:
                if member.root != root:
                    self.repairs.leave_out(member, Reason.STATE_MISMATCH)

    def update(self, members: Members) -> None:
        """Take the chain's present list of members."""
        for member in self.state.roster.update(members):
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
        weights = [self.state.pace.weights(self.state.roster.ready(stage)) for stage in range(self.state.roster.stages)]
        routes = plan_routes(self.state.config.manifest.microbatches, weights)
        self.state.book = book = StepBook(self.state.generation, self.state.step + 1, routes)
        self.state.rounds.clear()
        self._attempt = 0
        self.state.pace.start()
        for stage in range(book.stages):
            replicas = self.state.roster.ready(stage)
            self.state.pace.forgive(set(replicas) - set(book.owners(stage)), replicas)
        self.state.broadcast(OpenStep(book.generation, book.step, routes))
        for cell in book.cells:
            for stage in {0, book.stages - 1}:
                self.state.feed(book, stage, cell)
        self.state.watch(book)
        return book

    def reduce(self, book: StepBook) -> None:
        """Ask every stage that has no round under way to reduce; the step's cells must all be in."""
        for stage in range(book.stages):
            if stage not in self.state.rounds:
                self._attempt += 1
                replicas = self.state.roster.ready(stage)
                request = Reduce(book.generation, book.step, self._attempt, book.owners(stage), replicas)
                self.state.rounds[stage] = Round(request, stage, self.state.now())
                for peer in replicas:
                    self.state.post(peer, request)

    @property
    def has_no_newcomer(self) -> bool:
        """Whether nobody is about to join the step under way."""
        return not self.state.roster.of(Status.PREPARING)

    @property
    def is_reduced(self) -> bool:
        """Whether every stage has agreed on its new state."""
        stages = range(self.state.roster.stages)
        return all(stage in self.state.rounds and self.state.rounds[stage].is_complete for stage in stages)

    def commit(self, book: StepBook) -> None:
        """Make the new states current; whoever has another root starts again from a holder."""
        self.state.book, self.state.step = None, book.step
        took_part = set()
        for stage, done in self.state.rounds.items():
            self.state.roots[book.step, stage] = done.root
            for peer in done.roots.keys() - set(done.dissenters):
                took_part.add(peer)
                self.state.post(peer, Commit(book.generation, book.step))
        self.repairs.learn_reduction(max(done.since - done.started for done in self.state.rounds.values()))
        dissenters = {peer for done in self.state.rounds.values() for peer in done.dissenters}
        self.state.rounds.clear()
        for member in (*self.state.roster.of(Status.PREPARING), *self.state.roster.of(Status.READY)):
            if member.peer in took_part:
                member.failures = 0
            else:
                is_dissenter = member.peer in dissenters
                self.repairs.leave_out(member, Reason.STATE_MISMATCH if is_dissenter else "late")
        oldest = self.state.step - self.state.config.manifest.audit.depth - 1
        self.state.roots = {key: root for key, root in self.state.roots.items() if key[0] >= oldest}

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
            case Reduced():
                self._open_book(message)
                self._round_of(sender).note(sender, message, self.state.now())
            case Fault():
                self._on_fault(self.state.roster.get(sender), message)
            case (
                Prepare() | OpenStep() | Tokens() | Labels() | Reroute() | Reduce() | Commit() | Finish()
                | Activation() | Gradient() | Partial()
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
        if (book := self.state.book) is not None:
            routes = tuple(tuple(route) for route in book.routes)
            self.state.post(sender, OpenStep(book.generation, book.step, routes))
            ready = self.state.roster.ready(member.stage)
            owners = book.owners(member.stage)
            self.repairs.reassign(book, member.stage, [c for c in book.cells if owners[c] not in ready], ())
            self.state.watch(book)

    def _on_cell(self, sender: str, message: Passed | CellDone) -> None:
        book = self._open_book(message)
        if isinstance(message, Passed):
            book.note_passed(sender, message)
        else:
            book.note_done(sender, message)
        self.repairs.heard(sender)
        if isinstance(message, CellDone):
            self.state.pace.finished(sender)
        self.state.watch(book)

    def _on_fault(self, member: Member, fault: Fault) -> None:
        match fault.reason:
            case Reason.NO_STATE | Reason.STATE_MISMATCH:
                is_answer = member.asked == (fault.generation, fault.step)
                if member.status is Status.PREPARING and is_answer:
                    self.repairs.leave_out(member, fault.reason)
            case Reason.PARTIAL_MISSING:
                self._open_book(fault)
                self._round_of(member.peer).note_missing(member.peer, fault)
            case Reason.PEER_UNREACHABLE:
                book = self._open_book(fault)
                for peer in fault.peers:
                    self.repairs.bypass(book, member, self.state.roster.get(peer))
            case _:
                self.repairs.stall(self._open_book(fault), member, fault.reason)

    def _open_book(self, message: Passed | CellDone | Reduced | Fault) -> StepBook:
        book = self.state.book
        if book is None or (message.generation, message.step) != (book.generation, book.step):
            raise MessageError(Reason.STALE_STEP, f"step {message.step}")
        return book

    def _round_of(self, peer: str) -> Round:
        current = self.state.rounds.get(self.state.roster.get(peer).stage)
        if current is None:
            raise MessageError(Reason.STALE_STEP, "no reduction is under way")
        return current
