"""Audits: commitments, openings, reveals, the third opinion and the vote."""

from msgspec.structs import replace

from chain.commitment import is_member, leaf
from chain.duties import has_commit_phase_ended
from chain.hashing import digest
from chain.ledger.book import Book, name
from chain.ledger.claims import start_audit
from chain.ledger.convictions import convict
from chain.ledger.pools import Pools
from chain.ledger.reaudits import draw_second, judge_auditor, reopen
from chain.ledger.settlement import end_audit
from chain.ledger.strikes import end_with_strike, is_new_occasion, withhold
from chain.ledger.transitions import leaves_of
from chain.reasons import Reason, Refused
from chain.records import Audit, AuditStatus, ClaimRecord, Voter, status_of
from chain.state import Table
from chain.transactions import EXACT, Commit, Commitment, Open, Opening, Reveal, RevealAll, reveal_commitment
from chain.verdicts import (
    Ballot,
    ballot,
    decided,
    deviations,
    finding,
    is_blank,
    is_fraud,
    is_match,
    limits_for,
    quorum,
    rests_on_tolerance,
    step_ballot,
    tally,
)

_AUDITOR_OWES = (AuditStatus.DRAWN, AuditStatus.OPENED)


def commit(book: Book, sender: bytes, payload: Commit) -> None:
    """Take commitments to re-executions; those not owed are refused, all or none."""
    _check_not_barred(book, sender)
    for entry in payload.entries:
        _commit(book, sender, entry)


def _check_not_barred(book: Book, sender: bytes) -> None:
    """Let nobody who was convicted judge others."""
    if book.account(sender).barred:
        raise Refused(Reason.BARRED)


def _commit(book: Book, sender: bytes, entry: Commitment) -> None:
    audit = _audit(book, entry.audit)
    state = audit.state
    if entry.round == 0 and state is AuditStatus.DRAWN and audit.auditor == sender:
        deadline = book.height + book.params.open_window + book.task(audit.task).patience
        newest = max(audit.drawn_at, book.account(sender).committed_draw)
        book.set_account(sender, committed_at=book.height, committed_draw=newest)
        book.set_audit(audit, AuditStatus.COMMITTED, commitment=entry.digest, deadline=deadline)
        book.note("committed", audit=audit.id.hex(), by=name(sender))
        return
    third = audit.third if entry.round == 1 and state is AuditStatus.OPINION else None
    if third is not None and third.account == sender and third.commitment is None:
        book.set_audit(audit, third=replace(third, commitment=entry.digest))
        return
    if entry.round == 2 and state is AuditStatus.VOTING and not has_commit_phase_ended(audit):
        voters = _with_voter(audit, sender, commitment=entry.digest)
        if voters is not None:
            _start_reveals(book, book.set_audit(audit, voters=voters))
            return
    raise Refused(Reason.NOT_OWED)


def _with_voter(audit: Audit, account: bytes, commitment: bytes) -> tuple[Voter, ...] | None:
    """Return the voters with one more commitment; None if this account owes none."""
    if not any(v.account == account and v.commitment is None for v in audit.voters):
        return None
    return tuple(replace(v, commitment=commitment) if v.account == account else v for v in audit.voters)


def _start_reveals(book: Book, audit: Audit) -> None:
    """Once all voters have committed they have the whole reveal window, whatever was left of the first."""
    if has_commit_phase_ended(audit):
        book.set_audit(audit, is_revealing=True, deadline=book.height + _reveal_window(book, audit))


def _reveal_window(book: Book, audit: Audit) -> int:
    """Return the blocks for a reveal, before which the claimed tensors may have to be fetched."""
    return book.params.reveal_window + book.task(audit.task).patience


def open_cells(book: Book, sender: bytes, payload: Open) -> None:
    """Take a worker's openings of audited cells."""
    for opening in payload.entries:
        _open(book, sender, opening)


def _open(book: Book, sender: bytes, opening: Opening) -> None:
    audit = _audit(book, opening.audit)
    if audit.state is not AuditStatus.COMMITTED or audit.worker != sender:
        raise Refused(Reason.NOT_OWED)
    claim = book.claim(audit.claim).claim
    one = leaf(opening.salt, opening.trace)
    leaves = leaves_of(book.task(audit.task), claim)
    if not is_member(claim.root, one, leaves.index(audit.cell), len(leaves), opening.proof):
        raise Refused(Reason.FALSE_OPENING)
    if opening.trace.state != claim.state_before:
        raise Refused(Reason.FALSE_OPENING)
    deadline = book.height + _reveal_window(book, audit)
    book.set_audit(audit, AuditStatus.OPENED, opening=opening, deadline=deadline)
    book.note("opened", audit=audit.id.hex(), by=name(sender))


def reveal(book: Book, sender: bytes, payload: RevealAll) -> None:
    """Take reveals of committed re-executions."""
    _check_not_barred(book, sender)
    for entry in payload.entries:
        _reveal(book, sender, entry)


def _reveal(book: Book, sender: bytes, entry: Reveal) -> None:
    audit = _audit(book, entry.audit)
    expected = _owed(audit, sender, entry.round)
    if expected is None:
        raise Refused(Reason.NOT_OWED)
    if reveal_commitment(sender, entry) != expected:
        raise Refused(Reason.WRONG_COMMITMENT)
    task = book.task(audit.task)
    if entry.other_kernel and (not task.kernel or audit.cell == task.transition):
        raise Refused(Reason.OTHER_KERNEL)
    if _is_misplaced(audit, entry, is_step=audit.cell == task.transition):
        raise Refused(Reason.MISPLACED)
    if entry.tolerance != EXACT and (task.kernel or audit.cell == task.transition):
        raise Refused(Reason.EXACT_RESULTS)
    match entry.round:
        case 0:
            _judge_audit(book, book.set_audit(audit, reveal=entry))
        case 1:
            assert audit.third is not None
            _judge_opinion(book, book.set_audit(audit, third=replace(audit.third, reveal=entry)))
        case _:
            said = status_of(Ballot, note_ballot(book, audit, sender, entry))
            voters = tuple(replace(v, said=said) if v.account == sender else v for v in audit.voters)
            changed = book.set_audit(audit, voters=voters)
            if all(v.said is not None for v in voters if v.commitment is not None):
                decide(book, changed)


def _is_misplaced(audit: Audit, entry: Reveal, *, is_step: bool) -> bool:
    """Whether a reveal shows inputs, or has a word on them, where they cannot speak for the auditor.

    Only who reports other inputs than were opened has any to show: an audit that passed never rests on them.
    """
    is_excuse = entry.round == 0 and entry.contradiction and not is_step
    has_excuse = entry.round == 2 and audit.reveal is not None and bool(audit.reveal.shown)
    return bool(entry.shown and not is_excuse) or (entry.misled and not has_excuse)


def _owed(audit: Audit, sender: bytes, round_: int) -> bytes | None:
    """Return the commitment that `sender` must reveal now in `round_`."""
    state, third = audit.state, audit.third
    if round_ == 0 and state is AuditStatus.OPENED and audit.auditor == sender:
        return audit.commitment
    if round_ == 1 and state is AuditStatus.OPINION and third is not None and third.account == sender:
        return third.commitment
    if round_ == 2 and state is AuditStatus.VOTING and has_commit_phase_ended(audit):
        return next((v.commitment for v in audit.voters if v.account == sender and v.said is None), None)
    return None


def _judge_audit(book: Book, audit: Audit) -> None:
    assert audit.opening is not None
    assert audit.reveal is not None
    found = deviations(audit.opening.sketch, audit.reveal.shared)
    is_right = is_match(found, limits_for(book.params, audit.reveal))
    if is_right and not audit.reveal.contradiction and not audit.reveal.missing:
        end_audit(book, audit, AuditStatus.PASSED)
        rests = rests_on_tolerance(audit.reveal, audit.opening.sketch, book.params)
        draw_second(book, audit, is_certain=rests)
        return
    book.note(
        "disputed",
        audit=audit.id.hex(),
        task=audit.task.hex(),
        step=audit.step,
        stage=audit.stage,
        cell=audit.cell,
        worker=name(audit.worker),
        auditor=name(audit.auditor),
        deviations=list(map(_shown, found)),
    )
    _ask_third(book, audit)


def _shown(value: float) -> float | str:
    return value if value < float("inf") else "inf"


def _ask_third(book: Book, audit: Audit) -> None:
    """Draw a third peer; without one the voters decide at once."""
    record: ClaimRecord = book.claim(audit.claim)
    drawn = Pools(book).draw(record, audit.cell, digest("third", book.seed, audit.id), (audit.auditor,))
    changed = book.set_audit(audit, dispute_seed=book.seed)
    if drawn is None:
        open_vote(book, changed)
        return
    third = Voter(drawn, book.account(drawn).bonded)
    deadline = book.height + book.params.commit_window + book.params.reveal_window + book.task(audit.task).patience
    book.set_audit(changed, AuditStatus.OPINION, third=third, deadline=deadline)


def _judge_opinion(book: Book, audit: Audit) -> None:
    """Let the voters decide, unless it is one more small deviation of an occasion that is known already."""
    assert audit.opening is not None
    assert audit.reveal is not None
    assert audit.third is not None
    assert audit.third.reveal is not None
    found = deviations(audit.opening.sketch, audit.third.reveal.shared)
    book.note(
        "opinion",
        audit=audit.id.hex(),
        by=name(audit.third.account),
        deviations=list(map(_shown, found)),
        contradiction=audit.third.reveal.contradiction,
        missing=audit.third.reveal.missing,
    )
    reveals = (audit.reveal, audit.third.reveal)
    both = [(deviations(audit.opening.sketch, entry.shared), limits_for(book.params, entry)) for entry in reveals]
    is_small = all(not is_match(*one) and not is_fraud(*one) for one in both)
    is_plain = not any(entry.contradiction or entry.missing for entry in reveals)
    if is_small and is_plain and not is_new_occasion(book, audit):
        end_audit(book, audit, AuditStatus.FAULTED)
    else:
        open_vote(book, audit)


def open_vote(book: Book, audit: Audit) -> None:
    """Let every validator but accused, accuser and who was convicted before re-execute and vote."""
    parties = (audit.worker, audit.auditor)
    members = ((a, power) for a, power in book.validators.members if not book.account(a).barred)
    voters = tuple(Voter(a, power) for a, power in members if a not in parties)
    deadline = book.height + book.params.vote_window + book.task(audit.task).patience
    changed = book.set_audit(audit, AuditStatus.VOTING, voters=voters, deadline=deadline)
    if not voters:
        decide(book, changed)


def note_ballot(book: Book, audit: Audit, sender: bytes, entry: Reveal) -> Ballot:
    """Record and return what a voter's re-execution says."""
    assert audit.opening is not None
    assert audit.reveal is not None
    said = _ballot(book, audit, entry)
    found = deviations(audit.opening.sketch, entry.shared)
    book.note(
        "ballot",
        audit=audit.id.hex(),
        by=name(sender),
        ballot=str(said),
        deviations=list(map(_shown, found)),
        finding=finding(found, limits_for(book.params, entry)),
        contradiction=entry.contradiction,
        missing=entry.missing,
    )
    return said


def _ballot(book: Book, audit: Audit, entry: Reveal) -> Ballot:
    """Return what a re-execution says of an audit's opened result, and of its auditor's."""
    assert audit.opening is not None
    assert audit.reveal is not None
    is_step = audit.cell == book.task(audit.task).transition
    if is_step:
        return step_ballot(entry, audit.opening.sketch, audit.reveal, book.params)
    return ballot(entry, audit.opening.sketch, audit.reveal, book.params, is_passed=audit.is_reopened)


def _accuser(book: Book, audit: Audit) -> Voter:
    """Return the auditor as a voter: with its power in the set, if it has any, for what it has found."""
    assert audit.reveal is not None
    power = 0 if book.account(audit.auditor).barred else book.validators.powers.get(audit.auditor, 0)
    return Voter(audit.auditor, power, said=status_of(Ballot, _ballot(book, audit, audit.reveal)))


def decide(book: Book, audit: Audit) -> None:
    """Count the stake of the ballots and carry out the verdict."""
    if audit.is_reopened:
        least = quorum(sum(voter.power for voter in audit.voters))
        judge_auditor(book, audit, is_false=tally(audit.voters)[Ballot.AGAINST_AUDITOR] >= least)
        return
    match decided(audit.voters, _accuser(book, audit)):
        case Ballot.AGAINST_WORKER:
            convict(book, audit)
            if first := reopen(book, audit):
                open_vote(book, first)
        case Ballot.AGAINST_AUDITOR:
            _acquit(book, audit)
        case Ballot.DATA_MISSING:
            withhold(book, audit)
        case Ballot.SMALL_DEVIATION:
            end_with_strike(book, audit, AuditStatus.FAULTED)
        case Ballot.AGAINST_NEITHER:
            _dismiss(book, audit)
        case Ballot.AUDITOR_MISLED:
            end_audit(book, audit, AuditStatus.ACQUITTED)
        case _:
            end_audit(book, audit, AuditStatus.UNDECIDED)


def _dismiss(book: Book, audit: Audit) -> None:
    """Clear the worker; the accuser has the draws pass it over, unless it lacked data and yet computed the cell.

    Somebody may have kept data from it alone; who had nothing to compute on is not charged either.
    """
    assert audit.reveal is not None
    if not audit.reveal.missing or is_blank(audit.reveal):
        _mark_absent(book, audit, audit.auditor)
    end_audit(book, audit, AuditStatus.ACQUITTED)


def _acquit(book: Book, audit: Audit) -> None:
    """Charge the accuser one worker bond, from its stake, for a false accusation."""
    task = book.task(audit.task)
    charge = book.seize(audit.auditor, max(task.worker_bond, 1))
    book.burn(charge)
    book.note("charged", audit=audit.id.hex(), auditor=name(audit.auditor), amount=str(charge))
    end_audit(book, audit, AuditStatus.ACQUITTED)


def expire(book: Book, due: list[bytes]) -> None:
    """End or redraw the audits whose deadline has passed, unless their auditor works on what came before them."""
    woken: list[Audit] = [book.draft.get(Table.AUDITS, identity) for identity in due]
    overdue = [audit for audit in woken if not _is_extended(book, audit)]
    for audit in overdue:
        _expire(book, audit)
    pools = Pools(book)  # nobody becomes absent or loses a seat from here on
    for audit in overdue:
        if audit.state in _AUDITOR_OWES:
            _redraw(pools, audit)


def _is_extended(book: Book, audit: Audit) -> bool:
    """Give an auditor with more than one cell to re-execute a whole window after each; whether that is not over.

    It has to take them in the order of their draws: who goes on to later ones has missed this one.
    """
    auditor = book.account(audit.auditor)
    if audit.state is not AuditStatus.DRAWN or auditor.absent_until > book.height:
        return False
    deadline = auditor.committed_at + book.params.commit_window + book.task(audit.task).patience
    if deadline < book.height or auditor.committed_draw > audit.drawn_at:
        return False
    book.set_audit(audit, deadline=deadline)
    return True


def _expire(book: Book, audit: Audit) -> None:
    match audit.state:
        case AuditStatus.DRAWN | AuditStatus.OPENED:
            _mark_absent(book, audit, audit.auditor)
        case AuditStatus.COMMITTED:
            withhold(book, audit)
        case AuditStatus.OPINION:
            if audit.third is not None:
                _mark_absent(book, audit, audit.third.account)
            open_vote(book, audit)
        case AuditStatus.VOTING:
            _expire_vote(book, audit)
        case _:
            raise AssertionError(f"audit {audit.id.hex()} is {audit.state} and has no deadline")


def _expire_vote(book: Book, audit: Audit) -> None:
    if not has_commit_phase_ended(audit) and any(v.commitment is not None for v in audit.voters):
        book.set_audit(audit, is_revealing=True, deadline=book.height + _reveal_window(book, audit))
        return
    for voter in audit.voters:
        if voter.said is None:
            _mark_absent(book, audit, voter.account)
    decide(book, audit)


def _mark_absent(book: Book, audit: Audit, account: bytes) -> None:
    """Keep an account that missed a duty out of the draws for a while; never a slash."""
    book.set_account(account, absent_until=book.height + book.params.absence_blocks)
    book.note("absent", audit=audit.id.hex(), peer=name(account))


def _redraw(pools: Pools, audit: Audit) -> None:
    """Give the audit to another auditor, a few times; then it ends."""
    record: ClaimRecord = pools.book.claim(audit.claim)
    if audit.redraws >= pools.book.params.redraws or not start_audit(pools, record, audit.cell, audit.id, audit):
        end_audit(pools.book, audit, AuditStatus.ABSENT)


def _audit(book: Book, identity: bytes) -> Audit:
    audit: Audit | None = book.draft.get(Table.AUDITS, identity)
    if audit is None:
        raise Refused(Reason.UNKNOWN_AUDIT)
    return audit
