"""Audits: commitments, openings, reveals, the third opinion and the vote."""

from msgspec.structs import replace

from chain.commitment import is_member, leaf
from chain.duties import has_commit_phase_ended
from chain.hashing import digest
from chain.ledger.book import Book, name
from chain.ledger.claims import start_audit
from chain.ledger.convictions import convict, evict_without_slash
from chain.ledger.pools import Pools
from chain.ledger.settlement import end_audit, flag
from chain.ledger.tasks import bond_for
from chain.reasons import Reason, Refused
from chain.records import Audit, AuditStatus, ClaimRecord, Voter, status_of
from chain.state import Table
from chain.transactions import Commit, Commitment, Open, Opening, Reveal, RevealAll, reveal_commitment
from chain.verdicts import Ballot, ballot, deviations, finding, is_fraud, is_match, quorum, tally

_AUDITOR_OWES = (AuditStatus.DRAWN, AuditStatus.OPENED)


def commit(book: Book, sender: bytes, payload: Commit) -> None:
    """Take commitments to re-executions; those not owed are refused, all or none."""
    for entry in payload.entries:
        _commit(book, sender, entry)


def _commit(book: Book, sender: bytes, entry: Commitment) -> None:
    audit = _audit(book, entry.audit)
    state = audit.state
    if entry.round == 0 and state is AuditStatus.DRAWN and audit.auditor == sender:
        deadline = book.height + book.params.open_window
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
        book.set_audit(audit, is_revealing=True, deadline=book.height + book.params.reveal_window)


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
    index = claim.cells.index(audit.cell)
    if not is_member(claim.root, one, index, len(claim.cells), opening.proof):
        raise Refused(Reason.FALSE_OPENING)
    if opening.trace.state != claim.state_before:
        raise Refused(Reason.FALSE_OPENING)
    deadline = book.height + book.params.reveal_window
    book.set_audit(audit, AuditStatus.OPENED, opening=opening, deadline=deadline)
    book.note("opened", audit=audit.id.hex(), by=name(sender))


def reveal(book: Book, sender: bytes, payload: RevealAll) -> None:
    """Take reveals of committed re-executions."""
    for entry in payload.entries:
        _reveal(book, sender, entry)


def _reveal(book: Book, sender: bytes, entry: Reveal) -> None:
    audit = _audit(book, entry.audit)
    expected = _owed(audit, sender, entry.round)
    if expected is None:
        raise Refused(Reason.NOT_OWED)
    if reveal_commitment(sender, entry) != expected:
        raise Refused(Reason.WRONG_COMMITMENT)
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
    if is_match(found, book.params) and not audit.reveal.contradiction:
        end_audit(book, audit, AuditStatus.PASSED)
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
    deadline = book.height + book.params.commit_window + book.params.reveal_window
    book.set_audit(changed, AuditStatus.OPINION, third=third, deadline=deadline)


def _judge_opinion(book: Book, audit: Audit) -> None:
    """End as a fault if auditor and third peer both find a small deviation only; else let the voters decide."""
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
    )
    reveals = (audit.reveal, audit.third.reveal)
    both = [deviations(audit.opening.sketch, entry.shared) for entry in reveals]
    is_small = all(not is_match(one, book.params) and not is_fraud(one, book.params) for one in both)
    if is_small and not any(entry.contradiction for entry in reveals):
        end_audit(book, audit, AuditStatus.FAULTED)
    else:
        open_vote(book, audit)


def open_vote(book: Book, audit: Audit) -> None:
    """Let every validator but accused and accuser re-execute and vote."""
    parties = (audit.worker, audit.auditor)
    voters = tuple(Voter(a, power) for a, power in book.validators.members if a not in parties)
    deadline = book.height + book.params.vote_window
    changed = book.set_audit(audit, AuditStatus.VOTING, voters=voters, deadline=deadline)
    if not voters:
        end_audit(book, changed, AuditStatus.UNDECIDED)


def note_ballot(book: Book, audit: Audit, sender: bytes, entry: Reveal) -> Ballot:
    """Record and return what a voter's re-execution says."""
    assert audit.opening is not None
    assert audit.reveal is not None
    said = ballot(entry, audit.opening.sketch, audit.reveal.shared, book.params)
    found = deviations(audit.opening.sketch, entry.shared)
    book.note(
        "ballot",
        audit=audit.id.hex(),
        by=name(sender),
        ballot=str(said),
        deviations=list(map(_shown, found)),
        finding=finding(found, book.params),
        contradiction=entry.contradiction,
    )
    return said


def decide(book: Book, audit: Audit) -> None:
    """Count the stake of the ballots and carry out the verdict."""
    against = tally(audit.voters)
    least = quorum(sum(voter.power for voter in audit.voters))
    if against[Ballot.AGAINST_WORKER] >= least:
        convict(book, audit)
    elif against[Ballot.AGAINST_AUDITOR] >= least:
        _acquit(book, audit)
    else:
        end_audit(book, audit, AuditStatus.UNDECIDED)


def _acquit(book: Book, audit: Audit) -> None:
    """Charge the accuser one worker bond, from its stake, for a false accusation."""
    task = book.task(audit.task)
    charge = book.seize(audit.auditor, max(task.worker_bond, 1))
    book.burn(charge)
    book.note("charged", audit=audit.id.hex(), auditor=name(audit.auditor), amount=str(charge))
    end_audit(book, audit, AuditStatus.ACQUITTED)


def expire(book: Book, due: list[bytes]) -> None:
    """End or redraw the audits whose deadline has passed."""
    overdue: list[Audit] = [book.draft.get(Table.AUDITS, identity) for identity in due]
    for audit in overdue:
        _expire(book, audit)
    pools = Pools(book)  # nobody becomes absent or loses a seat from here on
    for audit in overdue:
        if audit.state in _AUDITOR_OWES:
            _redraw(pools, audit)


def _expire(book: Book, audit: Audit) -> None:
    match audit.state:
        case AuditStatus.DRAWN | AuditStatus.OPENED:
            _mark_absent(book, audit, audit.auditor)
        case AuditStatus.COMMITTED:
            _withhold(book, audit)
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
        deadline = book.height + book.params.reveal_window
        book.set_audit(audit, is_revealing=True, deadline=deadline)
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
    if audit.redraws >= pools.book.params.redraws or not start_audit(
        pools, record, audit.cell, audit.id, (audit.auditor,), audit.redraws + 1
    ):
        end_audit(pools.book, audit, AuditStatus.ABSENT)


def _withhold(book: Book, audit: Audit) -> None:
    """A worker that does not open loses the cell's pay and is charged; three times, and it loses the seat.

    One occasion, such as a crash, costs a cell's price for each audit, which pays the auditor. Who withholds
    again later, and might do so whenever it has cheated, is charged what makes that a loss.
    """
    task, worker = book.task(audit.task), book.worker(audit.task, audit.worker)
    assert worker is not None  # audits are of workers' claims only
    is_again = worker.withholdings > 0 and worker.flagged_until <= book.height
    fine = bond_for(task.price, task.audit_rate, book.params.colluding_share, 0) if is_again else 0
    charge = min(max(fine, task.price), worker.bond + worker.withheld)
    bond, kept = min(worker.bond, charge), min(task.price, charge)
    book.set_worker(worker, bond=worker.bond - bond, withheld=worker.withheld - charge + bond)
    book.set_task(task, escrow=task.escrow + kept)
    book.burn(charge - kept)
    end_audit(book, audit, AuditStatus.WITHHELD)
    flag(book, audit)
    worker = book.worker(audit.task, audit.worker)
    assert worker is not None
    changed = book.set_worker(worker, withholdings=worker.withholdings + 1)
    if changed.is_seated and changed.withholdings >= book.params.withheld_limit:
        evict_without_slash(book, changed, audit)


def _audit(book: Book, identity: bytes) -> Audit:
    audit: Audit | None = book.draft.get(Table.AUDITS, identity)
    if audit is None:
        raise Refused(Reason.UNKNOWN_AUDIT)
    return audit
