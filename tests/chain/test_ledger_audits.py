"""Golden scenarios of verification: every end that an audit can have, and what it costs whom."""

import pytest
from msgspec import structs

from chain.hashing import digest
from chain.keys import peer_id
from chain.reasons import Reason
from chain.records import Audit, AuditStatus, WorkerStatus
from chain.state import Table
from chain.transactions import (
    CloseTask,
    Commit,
    Commitment,
    LeaveSeat,
    Open,
    Reveal,
    RevealAll,
    SubmitClaims,
    TakeSeat,
    reveal_commitment,
)
from tests.chain.ledger_kit import (
    BALANCE,
    KEYS,
    STAKE,
    Ledger,
    Swarm,
    by_account,
    genesis_of,
    sketch,
    start_swarm,
)

FRAUD = -2.0
SMALL = 1e-4
"""Above every τ, below 100 τ of y."""


def test_an_honest_task_from_posting_to_the_last_payment() -> None:
    swarm = start_swarm()
    swarm.work(40)
    task = swarm.state.task(swarm.task)
    assert task is not None
    assert (task.settled, task.generation) == (8, 0)
    assert len(swarm.ledger.happened("passed")) == 8 * 2 * (4 + 2)  # cells, and the step of each replica
    paid = 8 * 2 * (4 + 4 + 2) * 10
    assert task.escrow == 0
    assert swarm.ledger.one(swarm.client, CloseTask(swarm.task)) == ""
    assert all(w.bond == 0 and w.state is WorkerStatus.LEFT for w in swarm.state.workers(swarm.task))
    balances = sum(swarm.state.account(key.account).balance for key in KEYS[:6])
    assert balances == 6 * BALANCE + paid
    assert swarm.state.account(swarm.client.account).balance == BALANCE - paid
    assert not swarm.state.is_busy()
    assert set(swarm.ledger.kinds()) == {
        "posted", "seated", "claimed", "drawn", "committed", "opened", "passed", "settled", "closed",
    }  # fmt: skip


def test_the_draw_comes_two_blocks_after_the_claim_with_the_seed_of_that_block() -> None:
    swarm = start_swarm()
    swarm.ledger.block(*swarm.claims(1))
    claimed_at = swarm.state.height
    swarm.ledger.skip(1)
    assert swarm.audits() == []
    swarm.ledger.skip(1)
    audits = swarm.audits()
    assert len(audits) == 2 * (4 + 2)
    for audit in audits:
        assert audit.drawn_at == claimed_at + 2
        assert audit.key == digest("sketch key", swarm.state.seed, audit.auditor, audit.id)
        assert audit.auditor not in swarm.seated(1 - audit.stage)
        assert audit.auditor != audit.worker


@pytest.mark.parametrize(
    ("validators", "microbatches", "stages"),
    [(7, 2, {None}), (7, 4, {None}), (6, 2, {None}), (6, 4, {None, 0}), (4, 4, {0})],
)
def test_replicas_of_a_stage_audit_each_other_only_where_hardly_anybody_outside_can(
    validators: int, microbatches: int, stages: set[int | None]
) -> None:
    swarm = start_swarm(Ledger(genesis_of(validators, 2)), microbatches=microbatches)
    swarm.work(20)
    seats = {peer_id(w.account): w.stage for w in swarm.state.workers(swarm.task)}
    drawn = [event for event in swarm.ledger.happened("drawn") if event["stage"] == 0]
    assert len(drawn) > 10
    assert {seats.get(str(event["auditor"])) for event in drawn} == stages
    assert swarm.settled > 2


def convicted_swarm() -> tuple[Swarm, bytes]:
    swarm = start_swarm()
    cheat = swarm.seated(0)[0]
    swarm.deviation[cheat] = FRAUD
    swarm.work(40)
    return swarm, cheat


def test_a_cheat_is_convicted_slashed_and_the_task_goes_on() -> None:
    swarm, cheat = convicted_swarm()
    ledger = swarm.ledger
    conviction = ledger.happened("slashed")
    assert [entry["amount"] for entry in conviction] == ["1000"]
    assert [entry["reward"] for entry in conviction] == ["250"]
    made_good = sum(r.audit_pay for r in swarm.state.tables[Table.CLAIMS].values() if r.is_void)
    assert 0 < made_good < 1000 - 250
    assert swarm.state.chain.burned == 1000 - 250 - made_good
    worker = swarm.state.worker(swarm.task, cheat)
    assert worker is not None
    assert (worker.state, worker.bond) == (WorkerStatus.EVICTED, 0)
    assert swarm.state.account(cheat).barred
    assert swarm.state.account(cheat).bonded == STAKE
    task = swarm.state.task(swarm.task)
    assert task is not None
    assert (task.settled, task.generation) == (8, 1)
    evicted = [event for event in ledger.happened("evicted") if event["reason"] == "convicted"]
    assert len(evicted) == 1
    convicted = swarm.state.audit(bytes.fromhex(str(evicted[0]["evidence"])))
    assert convicted is not None
    assert convicted.state is AuditStatus.CONVICTED
    assert cheat not in {voter.account for voter in convicted.voters}
    assert convicted.auditor not in {voter.account for voter in convicted.voters}


def test_a_conviction_voids_what_was_not_settled_and_what_nobody_disputed() -> None:
    swarm, cheat = convicted_swarm()
    voided = swarm.ledger.happened("void")
    assert voided
    records = [swarm.state.claim(key) for key in swarm.state.tables[Table.CLAIMS]]
    assert all(r.is_void for r in records if r is not None and r.claim.generation == 0 and not r.is_settled)
    assert not any(r.worker == cheat for r in records if r is not None and r.claim.generation == 1)


def test_the_convicted_cannot_come_back() -> None:
    swarm, cheat = convicted_swarm()
    assert swarm.ledger.one(by_account(cheat), TakeSeat(swarm.task, bytes(32))) == Reason.BARRED


def test_a_claim_of_the_old_generation_is_refused() -> None:
    swarm, _ = convicted_swarm()
    other = start_swarm(swarm.ledger, [key for key in KEYS[:6] if not swarm.state.account(key.account).barred])
    claim = structs.replace(other.claim(1, 0, (0,)), generation=1)
    worker = by_account(other.seated(0)[0])
    assert swarm.ledger.one(worker, SubmitClaims((claim,))) == Reason.WRONG_GENERATION


def test_a_false_accuser_is_charged_one_bond_and_nobody_is_evicted() -> None:
    swarm = start_swarm()
    liar = KEYS[4].account
    swarm.lies[liar] = FRAUD
    swarm.work(60)
    acquitted = swarm.ledger.happened("acquitted")
    assert acquitted
    assert {entry["auditor"] for entry in acquitted} == {peer_id(liar)}
    assert swarm.state.account(liar).bonded == STAKE - 1000 * len(acquitted)
    assert "evicted" not in swarm.ledger.kinds()
    assert swarm.settled == 8


def test_a_small_deviation_is_a_fault_unpaid_but_never_slashed() -> None:
    swarm = start_swarm()
    worker = swarm.seated(0)[0]
    swarm.deviation[worker] = SMALL
    swarm.work(60, last_step=1)
    faults = swarm.ledger.happened("faulted")
    assert len(faults) == 2
    assert {ballot["ballot"] for ballot in swarm.ledger.happened("ballot")} == {"small-deviation"}
    assert "slashed" not in swarm.ledger.kinds()
    record = swarm.state.worker(swarm.task, worker)
    assert record is not None
    assert record.is_seated
    assert record.settled_cells == 0
    assert swarm.settled == 1
    other = swarm.state.worker(swarm.task, swarm.seated(0)[1])
    assert other is not None
    assert other.settled_cells == 2


def test_one_crash_with_many_audits_open_costs_no_seat() -> None:
    swarm = start_swarm(Ledger(genesis_of(withheld_limit=2)), audit_rate=10_000)
    worker = swarm.seated(0)[0]
    swarm.work(2)
    claims = {record.id for record in swarm.state.tables[Table.CLAIMS].values() if record.worker == worker}
    assert claims
    swarm.silent.add((worker, "open"))
    swarm.work(45, last_step=0)
    mine = [entry for entry in swarm.ledger.happened("withheld") if entry["worker"] == peer_id(worker)]
    assert len(mine) >= 2
    assert not swarm.ledger.happened("evicted")
    record = swarm.state.worker(swarm.task, worker)
    assert record is not None
    assert record.withholdings == 1


def test_a_worker_that_withholds_on_too_many_occasions_loses_its_seat_but_not_its_bond() -> None:
    swarm = start_swarm(Ledger(genesis_of(withheld_limit=2)))
    worker = swarm.seated(0)[0]
    swarm.silent.add((worker, "open"))
    before = swarm.state.account(worker).balance
    swarm.work(60)
    first = swarm.ledger.happened("withheld")[0]
    evicted = swarm.ledger.happened("evicted")
    assert [entry["reason"] for entry in evicted] == ["withheld"]
    assert evicted[0]["step"] != first["step"]
    assert len(swarm.ledger.happened("withheld")) > swarm.state.params.withheld_limit
    record = swarm.state.worker(swarm.task, worker)
    assert record is not None
    assert record.state is WorkerStatus.LEFT
    assert "slashed" not in swarm.ledger.kinds()
    assert record.bond == 0
    assert swarm.state.account(worker).balance >= before
    assert swarm.settled == 8


def busiest_auditor(patience: int = 0) -> bytes:
    """Return who is drawn most often for the first step of a swarm like that of `start_swarm`."""
    swarm = start_swarm(patience=patience)
    swarm.work(30, last_step=1)
    drawn = [event["auditor"] for event in swarm.ledger.happened("drawn")]
    busiest = max(drawn, key=drawn.count)
    return next(key.account for key in KEYS if peer_id(key.account) == busiest)


def test_an_auditor_with_a_queue_has_time_for_each_and_is_not_absent() -> None:
    swarm, busy = start_swarm(patience=2), busiest_auditor(2)
    swarm.silent.update((key.account, "commit") for key in KEYS)
    while not (queue := owed_by(swarm, busy)):
        swarm.work(1, last_step=1)
    assert len(queue) > 1
    window = swarm.state.params.commit_window + 2
    assert {audit.deadline - audit.drawn_at for audit in queue} == {window}
    for audit in queue:
        while swarm.state.height < (owed := swarm.state.audit(audit.id)).deadline - 1:
            swarm.ledger.skip(1)
        assert owed.auditor == busy
        assert swarm.ledger.one(by_account(busy), Commit((Commitment(audit.id, 0, bytes(32)),))) == ""
    assert busy not in {entry["peer"] for entry in swarm.ledger.happened("absent")}
    assert swarm.state.account(busy).absent_until == 0


def test_an_auditor_that_skips_an_audit_for_later_ones_has_missed_it() -> None:
    swarm, choosy = start_swarm(patience=2), busiest_auditor(2)
    swarm.silent.update((key.account, "commit") for key in KEYS)
    for step in (1, 2):
        while len({audit.drawn_at for audit in owed_by(swarm, choosy)}) < step:
            swarm.work(1, last_step=step)
    skipped, *_, later = sorted(owed_by(swarm, choosy), key=lambda audit: audit.drawn_at)
    while swarm.state.height < skipped.deadline:
        swarm.ledger.one(by_account(choosy), Commit((Commitment(later.id, 0, bytes(32)),)))
    swarm.ledger.skip(1)
    assert skipped.id.hex() in {entry["audit"] for entry in swarm.ledger.happened("absent")}
    assert swarm.state.account(choosy).absent_until > swarm.state.height


def owed_by(swarm: Swarm, account: bytes) -> list[Audit]:
    """Return the audits in which an account owes a commitment."""
    audits = swarm.state.active_audits()
    return [audit for audit in audits if audit.auditor == account and audit.state is AuditStatus.DRAWN]


def test_an_absent_auditor_is_replaced_and_left_out_for_a_while() -> None:
    swarm, silent = start_swarm(), busiest_auditor()
    swarm.silent.add((silent, "commit"))
    swarm.work(30, last_step=1)
    absences = swarm.ledger.happened("absent")
    assert absences
    assert swarm.state.account(silent).absent_until > swarm.state.height
    replaced = {entry["audit"] for entry in absences}
    assert {entry["audit"] for entry in swarm.ledger.happened("passed")} > replaced
    assert "slashed" not in swarm.ledger.kinds()


def test_an_audit_without_any_answer_ends_and_the_cell_is_paid() -> None:
    swarm = start_swarm()
    swarm.silent.update((key.account, "commit") for key in KEYS)
    swarm.work(60, last_step=1)
    assert swarm.settled == 1
    ended = [entry for entry in swarm.ledger.happened("absent") if "status" not in entry and "worker" in entry]
    assert len(ended) == 2 * (4 + 2)
    assert not swarm.ledger.happened("unaudited")
    worker = swarm.state.worker(swarm.task, swarm.seated(0)[0])
    assert worker is not None
    assert worker.settled_cells == 2


def test_who_missed_a_duty_is_asked_again_when_nobody_else_is_left() -> None:
    swarm = start_swarm()
    swarm.silent.update((key.account, "commit") for key in KEYS)
    everyone = {key.account for key in KEYS[:6]}
    while not all(swarm.state.account(account).absent_until > swarm.state.height for account in everyone):
        swarm.work(1, last_step=1)
    assert swarm.settled == 0
    swarm.silent.clear()
    swarm.work(40, last_step=1)
    assert swarm.settled == 1
    assert len(swarm.ledger.happened("passed")) == 2 * (4 + 2)
    assert not swarm.ledger.happened("unaudited")


def test_an_absent_third_peer_leaves_it_to_the_voters() -> None:
    swarm = ready_to_reveal(AuditStatus.OPINION)
    disputed = [audit for audit in swarm.audits() if audit.state is AuditStatus.OPINION]
    thirds = {audit.third.account for audit in disputed if audit.third}
    for account in thirds:
        swarm.silent.add((account, "commit"))
    swarm.work(26, last_step=1)
    swarm.silent.clear()
    swarm.work(12, last_step=1)
    assert "opinion" not in swarm.ledger.kinds()
    assert len(swarm.ledger.happened("slashed")) == 1


def test_without_a_quorum_nobody_is_convicted() -> None:
    swarm = start_swarm()
    cheat = swarm.seated(0)[0]
    swarm.deviation[cheat] = FRAUD
    quiet = [key.account for key in KEYS[:6] if key.account != cheat][:3]
    for _ in range(80):
        voting = [audit for audit in swarm.audits() if audit.state is AuditStatus.VOTING]
        swarm.silent = {(account, "commit") for account in quiet} if voting else set()
        swarm.work(1, last_step=1)
    assert swarm.ledger.happened("undecided")
    assert "slashed" not in swarm.ledger.kinds()
    record = swarm.state.worker(swarm.task, cheat)
    assert record is not None
    assert record.settled_cells == 0


def test_a_contradiction_found_by_all_convicts_although_the_sketch_is_right() -> None:
    swarm = start_swarm()
    swarm.contradicts.update(key.account for key in KEYS)
    swarm.work(40, last_step=1)
    assert swarm.ledger.happened("slashed")


def ready_to_reveal(kind: AuditStatus) -> Swarm:
    """Return a swarm in which some audit of a cheat is in a state."""
    swarm = start_swarm()
    swarm.deviation[swarm.seated(0)[0]] = FRAUD
    for _ in range(30):
        if any(audit.state is kind for audit in swarm.audits()):
            return swarm
        swarm.work(1, last_step=1)
    raise AssertionError(f"no audit became {kind}")


def test_a_copied_vote_cannot_be_revealed() -> None:
    swarm = ready_to_reveal(AuditStatus.VOTING)
    audit = next(audit for audit in swarm.audits() if audit.state is AuditStatus.VOTING)
    first, copier = (by_account(voter.account) for voter in audit.voters[:2])
    own = swarm.answer(first, next(d for d in swarm.state.duties(first.account) if d.audit == audit.id))
    assert isinstance(own, Commit)
    assert swarm.ledger.block((first, own), (copier, own)) == ("", "")
    for voter in audit.voters[2:]:
        key = by_account(voter.account)
        duty = next(d for d in swarm.state.duties(key.account) if d.audit == audit.id)
        assert swarm.ledger.one(key, swarm.answer(key, duty)) == ""
    duty = next(d for d in swarm.state.duties(first.account) if d.audit == audit.id)
    revealed = swarm.answer(first, duty)
    assert isinstance(revealed, RevealAll)
    assert swarm.ledger.block((copier, revealed), (first, revealed)) == (Reason.WRONG_COMMITMENT, "")


def test_voters_reveal_only_after_the_commit_phase_and_have_the_whole_window() -> None:
    swarm = ready_to_reveal(AuditStatus.VOTING)
    audit = next(audit for audit in swarm.audits() if audit.state is AuditStatus.VOTING)
    keys = [by_account(voter.account) for voter in audit.voters]
    duties = {key: next(d for d in swarm.state.duties(key.account) if d.audit == audit.id) for key in keys}
    commits = [(key, swarm.answer(key, duty)) for key, duty in duties.items()]
    assert swarm.ledger.block(*commits[:-1]) == ("",) * (len(keys) - 1)
    assert not any(d.audit == audit.id for d in swarm.state.duties(keys[0].account))
    while swarm.state.height < audit.deadline - 1:
        swarm.ledger.skip(1)
    assert swarm.ledger.block(commits[-1]) == ("",)
    changed = swarm.state.audit(audit.id)
    assert changed is not None
    assert changed.deadline == swarm.state.height + swarm.state.params.reveal_window
    swarm.ledger.skip(3)
    reveals = [
        (key, swarm.answer(key, next(d for d in swarm.state.duties(key.account) if d.audit == audit.id)))
        for key in keys
    ]
    assert set(swarm.ledger.block(*reveals)) == {""}
    ended = swarm.state.audit(audit.id)
    assert ended is not None
    assert ended.state is AuditStatus.CONVICTED


def test_a_reveal_that_was_not_committed_to_is_refused() -> None:
    swarm = ready_to_reveal(AuditStatus.OPENED)
    audit = next(audit for audit in swarm.audits() if audit.state is AuditStatus.OPENED)
    other = Reveal(audit.id, 0, bytes(32), sketch(audit.key), sketch(audit.key), False, False)
    assert swarm.ledger.one(by_account(audit.auditor), RevealAll((other,))) == Reason.WRONG_COMMITMENT


@pytest.mark.parametrize("what", ["salt", "trace", "proof", "state"])
def test_a_false_opening_is_refused(what: str) -> None:
    swarm = ready_to_reveal(AuditStatus.COMMITTED)
    audit = next(audit for audit in swarm.audits() if audit.state is AuditStatus.COMMITTED)
    opening = swarm.opening(audit)
    trace = opening.trace
    false = {
        "salt": structs.replace(opening, salt=bytes(32)),
        "trace": structs.replace(opening, trace=structs.replace(trace, y=bytes(32))),
        "proof": structs.replace(opening, proof=opening.proof[:-1]),
        "state": structs.replace(opening, trace=structs.replace(trace, state=bytes(32))),
    }[what]
    assert swarm.ledger.one(by_account(audit.worker), Open((false,))) == Reason.FALSE_OPENING


def test_nobody_answers_for_another() -> None:
    swarm = ready_to_reveal(AuditStatus.COMMITTED)
    audit = next(audit for audit in swarm.audits() if audit.state is AuditStatus.COMMITTED)
    stranger = KEYS[7]
    ledger = swarm.ledger
    assert ledger.one(stranger, Open((swarm.opening(audit),))) == Reason.NOT_OWED
    assert ledger.one(stranger, Commit((Commitment(audit.id, 2, bytes(32)),))) == Reason.NOT_OWED
    reveal = Reveal(audit.id, 0, bytes(32), sketch(audit.key), sketch(audit.key), False, False)
    assert ledger.one(stranger, RevealAll((reveal,))) == Reason.NOT_OWED
    assert ledger.one(stranger, Commit((Commitment(bytes(32), 0, bytes(32)),))) == Reason.UNKNOWN_AUDIT


def test_commitments_are_taken_all_or_none() -> None:
    swarm = ready_to_reveal(AuditStatus.DRAWN)
    audit = next(audit for audit in swarm.audits() if audit.state is AuditStatus.DRAWN)
    entries = (Commitment(audit.id, 0, bytes(32)), Commitment(bytes(32), 0, bytes(32)))
    assert swarm.ledger.one(by_account(audit.auditor), Commit(entries)) == Reason.UNKNOWN_AUDIT
    after = swarm.state.audit(audit.id)
    assert after is not None
    assert after.state is AuditStatus.DRAWN


def test_a_contradiction_may_be_added_after_the_commitment() -> None:
    account = KEYS[0].account
    plain = Reveal(bytes(32), 0, bytes(32), bytes(384), bytes(384), False, False)
    told = structs.replace(plain, contradiction=True, missing=True)
    assert reveal_commitment(account, plain) == reveal_commitment(account, told)
    assert reveal_commitment(account, plain) != reveal_commitment(KEYS[1].account, plain)


def test_ended_audits_and_claims_leave_the_state_after_the_history() -> None:
    swarm = start_swarm(Ledger(genesis_of(history_blocks=10)))
    swarm.work(40)
    assert swarm.settled == 8
    swarm.ledger.skip(12)
    assert len(swarm.state.tables[Table.AUDITS]) == 0
    assert len(swarm.state.tables[Table.CLAIMS]) == 0
    assert len(swarm.state.tables[Table.ENDED]) == 0


def test_convictions_keep_their_audit() -> None:
    swarm = start_swarm(Ledger(genesis_of(history_blocks=10)))
    swarm.deviation[swarm.seated(0)[0]] = FRAUD
    swarm.work(60)
    swarm.ledger.skip(12)
    left = list(swarm.state.tables[Table.AUDITS].values())
    assert [audit.state for audit in left] == [AuditStatus.CONVICTED]


def test_the_draws_of_one_block_are_bounded_and_none_is_lost() -> None:
    swarm = start_swarm(Ledger(genesis_of(max_drawn_cells=3)))
    swarm.ledger.block(*swarm.claims(1))
    swarm.ledger.skip(2)
    assert len(swarm.audits()) == 3  # two cells and the step of one claim
    swarm.ledger.skip(3)
    assert len(swarm.audits()) == 4 * 3


def test_a_newcomer_without_stake_earns_its_bond() -> None:
    newcomer = KEYS[8]
    swarm = start_swarm(Ledger(genesis_of(validators=4, others=1)), [newcomer], stages=1, replicas=1)
    swarm.work(40)
    worker = swarm.state.worker(swarm.task, newcomer.account)
    assert worker is not None
    assert (worker.bond, worker.withheld, worker.earned) == (0, 320, 320)
    assert swarm.state.account(newcomer.account).balance == 0
    assert swarm.ledger.one(newcomer, LeaveSeat(swarm.task)) == ""
    assert swarm.state.account(newcomer.account).balance == 320


def test_a_newcomer_that_cheats_loses_what_was_withheld() -> None:
    newcomer = KEYS[8]
    swarm = start_swarm(Ledger(genesis_of(validators=4, others=1)), [newcomer], stages=1, replicas=1)
    swarm.work(40, last_step=4)
    swarm.deviation[newcomer.account] = FRAUD
    swarm.work(30)
    assert [entry["amount"] for entry in swarm.ledger.happened("slashed")] == ["160"]
    assert swarm.state.account(newcomer.account).balance == 0


def test_pay_fills_the_bond_first_and_then_the_balance() -> None:
    newcomer = KEYS[8]
    swarm = start_swarm(
        Ledger(genesis_of(validators=4, others=1)), [newcomer], stages=1, replicas=1, worker_bond=200, depth=1
    )
    swarm.work(80)
    worker = swarm.state.worker(swarm.task, newcomer.account)
    assert worker is not None
    assert (worker.withheld, worker.earned) == (200, 320)
    assert swarm.state.account(newcomer.account).balance == 120
