"""Who takes part: the members that the chain seats, and how far each has come.

ABSENT → PREPARING → READY
   ↑         │         │
   └─────────┴─────────┘   lost, slow, failed, or with another root; tried again later
"""

from dataclasses import dataclass
from enum import StrEnum

from trainer.coordinator_ports import Members
from trainer.messages import Ready
from trainer.payloads import MessageError, Reason

_LONGEST_PAUSE = 64


class Status(StrEnum):
    """How far a member has come."""

    ABSENT = "absent"
    PREPARING = "preparing"
    READY = "ready"


@dataclass
class Member:
    """A seated worker; `asked` is what it was last asked to prepare, (generation, step), by question `question`.

    `root` is that of the last state it is known to hold: the one it came with, then of each committed step.
    """

    peer: str
    stage: int
    status: Status = Status.ABSENT
    asked: tuple[int, int] = (-1, -1)
    question: int = 0
    asked_at: float = 0.0
    root: bytes = b""
    failures: int = 0
    retry_step: int = 0


class Roster:
    """Members by peer and by stage; a stage needs `least` of them."""

    def __init__(self, least: int = 1) -> None:
        self._least = least
        self._members: dict[str, Member] = {}
        self.stages = 0

    def update(self, members: Members) -> tuple[Member, ...]:
        """Take the chain's list: new members are absent at first; return those that are no longer on it."""
        self.stages = len(members.stages)
        listed = {peer: stage for stage, peers in enumerate(members.stages) for peer in peers}
        gone = tuple(m for m in self._members.values() if listed.get(m.peer) != m.stage)
        for member in gone:
            del self._members[member.peer]
        for peer, stage in listed.items():
            self._members.setdefault(peer, Member(peer, stage))
        return gone

    def has(self, peer: str) -> bool:
        """Whether a peer is a member."""
        return peer in self._members

    def get(self, peer: str) -> Member:
        """Return a member; raise `MessageError` for a stranger."""
        member = self._members.get(peer)
        if member is None:
            raise MessageError(Reason.WRONG_SENDER, f"{peer} is not a member")
        return member

    def of(self, status: Status, stage: int | None = None) -> tuple[Member, ...]:
        """Return the members of a status, of one stage or of all, in order of their names."""
        found = (m for m in self._members.values() if m.status is status and stage in (None, m.stage))
        return tuple(sorted(found, key=lambda member: member.peer))

    def ready(self, stage: int) -> tuple[str, ...]:
        """Return the names of the replicas that take part in `stage`."""
        return tuple(member.peer for member in self.of(Status.READY, stage))

    def newcomers(self, stage: int) -> tuple[Member, ...]:
        """Return who was asked for a stage's state and has not failed since it last took part, if it ever did."""
        return tuple(member for member in self.of(Status.PREPARING, stage) if not member.failures)

    def others(self, stage: int) -> tuple[Member, ...]:
        """Return the members of a stage that do not take part."""
        return (*self.of(Status.ABSENT, stage), *self.of(Status.PREPARING, stage))

    def empty_stages(self) -> tuple[int, ...]:
        """Return the stages that nobody, or too few, take part in."""
        return tuple(stage for stage in range(self.stages) if len(self.of(Status.READY, stage)) < self._least)

    def due(self, step: int) -> tuple[Member, ...]:
        """Return the absent members to be asked (again) at `step`."""
        return tuple(member for member in self.of(Status.ABSENT) if member.retry_step <= step)

    def note_ready(self, sender: str, message: Ready) -> Member:
        """Take a member's answer; raise `MessageError` unless it answers the last question."""
        member = self.get(sender)
        is_answer = member.question == message.question and member.asked == (message.generation, message.step)
        if member.status is not Status.PREPARING or not is_answer:
            raise MessageError(Reason.STALE_STEP, f"{sender} answers an old question")
        member.status, member.root = Status.READY, message.root
        return member

    def leave_out(self, member: Member, step: int) -> None:
        """Leave a member out, each time for twice as many steps."""
        member.status = Status.ABSENT
        member.retry_step = step + min(1 << member.failures, _LONGEST_PAUSE)
        member.failures += 1
