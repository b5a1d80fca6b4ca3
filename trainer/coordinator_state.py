"""What the client knows of the swarm: members, pace, books, rounds, roots, and how it addresses them."""

from collections.abc import Callable
from dataclasses import dataclass, field

from trainer.coordinator_book import StepBook
from trainer.coordinator_pace import Pace
from trainer.coordinator_ports import CoordinatorConfig, CoordinatorPorts
from trainer.coordinator_roster import Member, Roster, Status
from trainer.coordinator_round import Round
from trainer.messages import Labels, Message, Prepare, Tokens, pack


@dataclass
class SwarmState:
    """State shared by the step and the repairs; `step` is the last committed one, `book` that of the next."""

    config: CoordinatorConfig
    ports: CoordinatorPorts
    post: Callable[[str, Message], None]
    pace: Pace
    roster: Roster = field(default_factory=Roster)
    generation: int = -1
    step: int = 0
    book: StepBook | None = None
    rounds: dict[int, Round] = field(default_factory=dict)
    roots: dict[tuple[int, int], bytes] = field(default_factory=dict)

    def now(self) -> float:
        """Return the time in seconds."""
        return self.ports.clock()

    def invite(self, member: Member, holders: tuple[str, ...]) -> None:
        """Ask a member for the state of the last committed step."""
        root = self.roots.get((self.step, member.stage), b"")
        if not root or not holders:
            source_root, source_holders = self.ports.source(self.step, member.stage)
            root, holders = root or source_root, holders + source_holders
        member.status, member.asked = Status.PREPARING, (self.generation, self.step)
        member.asked_at = self.now()
        self.post(member.peer, Prepare(self.generation, self.step, member.stage, root, holders))

    def feed(self, book: StepBook, stage: int, cell: int) -> None:
        """Send a cell's tokens to its first worker, or its labels to its last."""
        batch = self.ports.batches.batch(book.step, cell)
        peer = book.routes[cell][stage]
        if stage == 0:
            self.post(peer, Tokens(book.generation, book.step, cell, pack(batch.tokens)))
        if stage == book.stages - 1:
            self.post(peer, Labels(book.generation, book.step, cell, pack(batch.labels)))

    def broadcast(self, message: Message) -> None:
        """Send a message to everyone who takes part."""
        for member in self.roster.of(Status.READY):
            self.post(member.peer, message)

    def watch(self, book: StepBook) -> None:
        """Start and stop the clocks of those whose turn it is."""
        self.pace.watch(book.waited_for(), self.now())
