"""What the client knows of the swarm: members, pace, books, rounds, roots, and how it addresses them."""

from collections.abc import Callable
from dataclasses import dataclass, field

from trainer.coordinator_book import StepBook
from trainer.coordinator_pace import Pace
from trainer.coordinator_ports import CoordinatorConfig, CoordinatorPorts, Suspicious
from trainer.coordinator_roster import Member, Roster, Status
from trainer.coordinator_round import Round
from trainer.joint import other_end
from trainer.messages import MAX_REPLICAS, Labels, Message, Prepare, Tokens
from trainer.monitors import Monitors, Suspicion, Why
from trainer.payloads import pack

_MAX_DEPARTED = 4


@dataclass
class SwarmState:
    """State shared by the step and the repairs; `step` is the last committed one, `book` that of the next."""

    config: CoordinatorConfig
    ports: CoordinatorPorts
    post: Callable[[str, Message], None]
    pace: Pace
    roster: Roster = field(default_factory=Roster)
    monitors: Monitors = field(default_factory=Monitors)
    generation: int = -1
    step: int = 0
    questions: int = 0
    book: StepBook | None = None
    rounds: dict[int, Round] = field(default_factory=dict)
    applies: dict[int, Round] = field(default_factory=dict)
    roots: dict[tuple[int, int], bytes] = field(default_factory=dict)
    departed: dict[int, tuple[str, ...]] = field(default_factory=dict)
    """Who last gave up a seat of a stage, newest first: for a while they serve their state."""
    must_reopen: bool = False
    """Whether the step under way cannot end with those who are left, and begins again."""

    def now(self) -> float:
        """Return the time in seconds."""
        return self.ports.clock()

    def takes_part(self, peer: str) -> bool:
        """Whether a peer is a member that takes part."""
        return self.roster.has(peer) and self.roster.get(peer).status is Status.READY

    def active(self, stage: int) -> Round | None:
        """Return the round that a stage's workers are at, None if there is none."""
        return self.applies.get(stage) or self.rounds.get(stage)

    def clear_rounds(self) -> None:
        """Forget all reductions."""
        self.rounds.clear()
        self.applies.clear()

    def drop_round(self, stage: int) -> tuple[int, ...]:
        """Have a stage reduce again, the other end with it if they share a tensor; return these.

        Nothing is applied till then.
        """
        self.applies.clear()
        other = other_end(self.config.manifest, stage)
        again = (stage,) if other is None else (stage, other)
        for each in again:
            self.rounds.pop(each, None)
        return again

    def invite(self, member: Member, holders: tuple[str, ...]) -> None:
        """Ask a member for the state of the last committed step, which `holders` may have.

        Whoever is asked at the same time may lack it as well: who left lately, and whoever gave the run its first
        state, are named after them.
        """
        root = self.roots.get((self.step, member.stage), b"")
        source_root, source_holders = self.ports.source(self.step, member.stage)
        known = (*holders, *(self.departed.get(member.stage, ()) if root else ()))
        if not root or root == source_root:
            root, known = root or source_root, (*known, *source_holders)
        holders = tuple(peer for peer in dict.fromkeys(known) if peer != member.peer)[:MAX_REPLICAS]
        self.questions += 1
        member.status, member.asked, member.question = Status.PREPARING, (self.generation, self.step), self.questions
        member.asked_at = self.now()
        self.post(member.peer, Prepare(self.generation, self.step, member.stage, root, holders, self.questions))

    def note_departed(self, member: Member) -> None:
        """Remember a worker that gave up its seat, and held its stage's state, as a holder of it."""
        if not member.root or member.root != self.roots.get((self.step, member.stage)):
            return
        known = (peer for peer in self.departed.get(member.stage, ()) if peer != member.peer)
        self.departed[member.stage] = (member.peer, *known)[:_MAX_DEPARTED]

    def feed(self, book: StepBook, stage: int, cell: int) -> None:
        """Send a cell's tokens to its first worker, or its labels to its last."""
        batch = self.ports.batches.batch(book.step, cell)
        for peer in book.members(stage, cell):
            if stage == 0:
                self.post(peer, Tokens(book.generation, book.step, cell, pack(batch.tokens)))
            if stage == book.stages - 1:
                self.post(peer, Labels(book.generation, book.step, cell, pack(batch.labels)))

    def broadcast(self, message: Message) -> None:
        """Send a message to everyone who takes part."""
        for member in self.roster.of(Status.READY):
            self.post(member.peer, message)

    def suspect(self, stage: int, peer: str, why: Why) -> None:
        """Tell of a worker that is odd, unless it was named lately."""
        if self.monitors.is_news(peer, self.step + 1):
            self.name((Suspicion(stage, peer, why),), self.step + 1)

    def name(self, suspicions: tuple[Suspicion, ...], step: int) -> None:
        """Tell of workers that are odd; not of the client's own ends, which nobody audits."""
        for each in suspicions:
            if each.stage in self.config.manifest.seated:
                self.ports.report(Suspicious(step, each.stage, each.peer, each.why))

    def watch(self, book: StepBook) -> None:
        """Start and stop the clocks of those whose turn it is."""
        self.pace.watch(book.waited_for(), self.now())
