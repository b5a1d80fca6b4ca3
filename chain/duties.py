"""What the parties of an audit owe, and by when."""

from collections.abc import Iterator
from dataclasses import dataclass

from chain.hashing import ZERO, digest
from chain.records import Audit, AuditStatus, Voter


@dataclass(frozen=True, slots=True)
class Duty:
    """What an account owes now: commit, open or reveal a re-execution by `deadline`, with its sketch key."""

    kind: str
    audit: bytes
    round: int
    key: bytes
    deadline: int
    drawn_at: int


def parties(audit: Audit) -> set[bytes]:
    """Return the accounts that an open audit may still ask or charge."""
    return {audit.auditor, audit.worker, *(voter.account for voter in audit.voters)} | (
        {audit.third.account} if audit.third else set()
    )


def duties_of(audit: Audit, account: bytes) -> Iterator[Duty]:
    """Yield what `account` owes in an audit now."""
    match audit.state:
        case AuditStatus.DRAWN if audit.auditor == account:
            yield Duty("commit", audit.id, 0, audit.key, audit.deadline, audit.drawn_at)
        case AuditStatus.COMMITTED if audit.worker == account:
            yield Duty("open", audit.id, 0, audit.key, audit.deadline, audit.drawn_at)
        case AuditStatus.OPENED if audit.auditor == account:
            yield Duty("reveal", audit.id, 0, audit.key, audit.deadline, audit.drawn_at)
        case AuditStatus.OPINION if audit.third is not None and audit.third.account == account:
            yield from _voter_duties(audit, audit.third, 1)
        case AuditStatus.VOTING:
            for voter in audit.voters:
                if voter.account == account:
                    yield from _voter_duties(audit, voter, 2)
        case _:
            pass


def _voter_duties(audit: Audit, voter: Voter, round_: int) -> Iterator[Duty]:
    key = digest("sketch key", audit.dispute_seed or ZERO, voter.account, audit.id)
    if voter.commitment is None:
        if round_ == 1 or not has_commit_phase_ended(audit):
            yield Duty("commit", audit.id, round_, key, audit.deadline, audit.drawn_at)
    elif not voter.has_revealed and (round_ == 1 or has_commit_phase_ended(audit)):
        yield Duty("reveal", audit.id, round_, key, audit.deadline, audit.drawn_at)


def has_commit_phase_ended(audit: Audit) -> bool:
    """Whether the voters reveal now: all have committed, or the commit window is over."""
    return audit.is_revealing or all(voter.commitment is not None for voter in audit.voters)
