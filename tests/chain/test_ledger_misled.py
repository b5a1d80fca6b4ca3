"""Auditors that were given other inputs than were opened: what they show, who believes it, and what it excuses."""

import pytest
from msgspec import structs

from chain.keys import PrivateKey, peer_id
from chain.reasons import Reason
from chain.records import Audit, AuditStatus
from chain.transactions import Reveal, RevealAll, reveal_commitment
from tests.chain import ledger_oracle as oracle
from tests.chain.ledger_kit import KEYS, STAKE, Ledger, Swarm, by_account, genesis_of, start_swarm
from tests.chain.ledger_view import Block

FRAUD = -2.0
AUDITOR = KEYS[4].account


def misled_swarm(believers: int, **terms: object) -> Swarm:
    """Return a swarm whose fifth validator audits with other results and shows inputs; so many others believe it."""
    swarm = start_swarm(Ledger(genesis_of(7)), **terms)
    swarm.lies, swarm.shows, swarm.lies_in_steps = {AUDITOR: FRAUD}, {AUDITOR}, False
    swarm.believes = set([key.account for key in KEYS[:7] if key.account != AUDITOR][:believers])
    return swarm


def judge(swarm: Swarm) -> None:
    """Have the oracle look at every block."""
    for context, transactions, before, executed in swarm.ledger.blocks:
        oracle.check(Block(before, context, transactions, executed))


def test_an_auditor_whose_inputs_a_quorum_has_seen_signed_pays_nothing_and_is_drawn_on() -> None:
    swarm = misled_swarm(6)
    swarm.work(60)
    acquitted = swarm.ledger.happened("acquitted")
    assert {event["auditor"] for event in acquitted} == {peer_id(AUDITOR)}
    assert {event["ballot"] for event in swarm.ledger.happened("ballot")} == {"auditor-misled"}
    assert not {"charged", "absent", "evicted", "withheld"} & set(swarm.ledger.kinds())
    assert swarm.state.account(AUDITOR).bonded == STAKE
    assert swarm.settled == 8
    workers = [worker for worker in swarm.state.workers(swarm.task) if worker.is_seated]
    assert all(worker.settled_cells == 8 * 4 // 2 for worker in workers)
    judge(swarm)


@pytest.mark.parametrize(("believers", "end"), [(0, "charged"), (1, "charged"), (3, "undecided")])
def test_inputs_that_no_quorum_has_seen_signed_excuse_nobody(believers: int, end: str) -> None:
    swarm = misled_swarm(believers)
    swarm.work(60)
    assert swarm.ledger.happened(end)
    assert "evicted" not in swarm.ledger.kinds()
    judge(swarm)


def test_an_auditor_that_was_right_about_the_worker_convicts_it_whatever_it_was_given() -> None:
    swarm = misled_swarm(6)
    cheat = swarm.seated(0)[0]
    swarm.deviation[cheat] = -3.0
    swarm.work(60)
    assert {event["worker"] for event in swarm.ledger.happened("evicted")} == {peer_id(cheat)}
    assert "charged" not in swarm.ledger.kinds()
    judge(swarm)


def revealing(swarm: Swarm, state: AuditStatus, round_: int) -> tuple[PrivateKey, Audit, Reveal]:
    """Return who owes a reveal in a round of an audit of a cell, and that reveal."""
    for _ in range(40):
        for key in KEYS:
            for duty in swarm.state.duties(key.account):
                audit = swarm.state.audit(duty.audit)
                assert audit is not None
                is_meant = audit.cell < 4 and audit.state is state and (duty.kind, duty.round) == ("reveal", round_)
                if is_meant:
                    answer = swarm.answer(key, duty)
                    assert isinstance(answer, RevealAll)
                    return key, audit, answer.entries[0]
        swarm.work(1)
    raise AssertionError("nobody had to reveal")


def test_only_who_reports_other_inputs_than_were_opened_may_show_them() -> None:
    """An audit that passed never rests on shown inputs: a second one could not touch its auditor."""
    swarm = start_swarm()
    swarm.silent |= {(key.account, "reveal") for key in KEYS}
    key, _, told = revealing(swarm, AuditStatus.OPENED, 0)
    for false in (structs.replace(told, shown=b"x"), structs.replace(told, contradiction=True, misled=True)):
        assert swarm.ledger.one(key, RevealAll((false,))) == Reason.MISPLACED
    assert swarm.ledger.one(key, RevealAll((structs.replace(told, contradiction=True, shown=b"x"),))) == ""


def test_a_voter_has_no_word_on_inputs_that_were_not_shown_and_shows_none() -> None:
    swarm = start_swarm(Ledger(genesis_of(7)))
    swarm.lies, swarm.lies_in_steps = {AUDITOR: FRAUD}, False
    swarm.silent |= {(key.account, "reveal") for key in KEYS[5:7]}
    while not any(audit.is_revealing and audit.cell < 4 for audit in swarm.audits()):
        swarm.work(1)
    key, _, told = revealing(swarm, AuditStatus.VOTING, 2)
    for false in (structs.replace(told, misled=True), structs.replace(told, contradiction=True, shown=b"x")):
        assert swarm.ledger.one(key, RevealAll((false,))) == Reason.MISPLACED
    assert swarm.ledger.one(key, RevealAll((told,))) == ""


def test_of_an_optimiser_s_step_there_are_no_signed_inputs_to_show() -> None:
    swarm = start_swarm()
    swarm.silent |= {(key.account, "reveal") for key in KEYS}
    for _ in range(40):
        swarm.work(1)
        found = [a for a in swarm.audits() if a.cell == 4 and a.state is AuditStatus.OPENED]
        if found:
            break
    key = by_account(found[0].auditor)
    (duty,) = [duty for duty in swarm.state.duties(key.account) if duty.audit == found[0].id]
    answer = swarm.answer(key, duty)
    assert isinstance(answer, RevealAll)
    false = structs.replace(answer.entries[0], contradiction=True, shown=b"x")
    assert swarm.ledger.one(key, RevealAll((false,))) == Reason.MISPLACED


def test_what_is_shown_may_be_added_after_the_commitment() -> None:
    plain = Reveal(bytes(32), 0, bytes(32), bytes(384), bytes(384), False, False)
    told = structs.replace(plain, contradiction=True, shown=b"inputs", misled=True)
    assert reveal_commitment(AUDITOR, plain) == reveal_commitment(AUDITOR, told)
