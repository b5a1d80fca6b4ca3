"""A claimed weight gradient is given to those who have committed to their own, and to the judges of a dispute."""

import pytest

from chain.duties import parties
from chain.records import Audit, AuditStatus
from chain.state import State
from tdml_p2p.swarm.discretion import may_have_gradient
from tests.chain.ledger_kit import KEYS, Ledger, Swarm, genesis_of, start_swarm

NOBODY = bytes(32)


def swarm_until(wanted: AuditStatus, *lying: bytes, repeated: int = 0) -> tuple[Swarm, Audit]:
    """Return a swarm with an audit that has reached this state; the lying workers claim false results."""
    genesis = genesis_of(reaudit_rate=repeated)
    swarm = start_swarm(Ledger(genesis), KEYS[:2], stages=2, replicas=1, audit_rate=10_000)
    swarm.deviation = dict.fromkeys(lying, 0.5)
    for _ in range(60):
        swarm.work(1)
        found = [audit for audit in swarm.state.audits_of(swarm.task) if audit.state is wanted]
        if found:
            return swarm, found[0]
    raise AssertionError(f"no audit became {wanted}")


def who_may(state: State, audit: Audit) -> set[bytes]:
    claim = state.claim(audit.claim)
    assert claim is not None
    asking = {*state.validators().powers, audit.worker, NOBODY}
    own = parties(audit) if audit.is_active else set()
    asking -= step_auditors(state, audit) - own
    return {a for a in asking if may_have_gradient(state, claim.claim, audit.worker, audit.cell, a)}


def step_auditors(state: State, audit: Audit) -> set[bytes]:
    """Return who audits the optimiser's step of the same claim."""
    task = state.task(audit.task)
    assert task is not None
    return {a.auditor for a in state.active_audits() if a.claim == audit.claim and a.cell == task.transition}


def test_who_audits_the_step_has_it_before_a_commitment_but_not_of_a_cell_that_it_owes() -> None:
    swarm, _ = swarm_until(AuditStatus.DRAWN)
    seen = set()
    for audit in swarm.state.active_audits():
        claim, task = swarm.state.claim(audit.claim), swarm.state.task(swarm.task)
        assert claim is not None
        assert task is not None
        if audit.cell == task.transition:
            continue
        for account in step_auditors(swarm.state, audit):
            may = may_have_gradient(swarm.state, claim.claim, audit.worker, audit.cell, account)
            assert may == (account != audit.auditor)
            seen.add(may)
    assert seen == {True, False}


@pytest.mark.parametrize("wanted", [AuditStatus.DRAWN, AuditStatus.PASSED])
def test_nobody_has_it_before_a_commitment_or_once_the_audit_has_passed(wanted: AuditStatus) -> None:
    swarm, audit = swarm_until(wanted)
    assert who_may(swarm.state, audit) == set()


@pytest.mark.parametrize("wanted", [AuditStatus.COMMITTED, AuditStatus.OPENED])
def test_the_auditor_alone_has_it_once_it_has_committed(wanted: AuditStatus) -> None:
    swarm, audit = swarm_until(wanted)
    assert who_may(swarm.state, audit) == {audit.auditor}


def test_the_judges_of_a_dispute_have_it_and_after_a_verdict_everybody() -> None:
    swarm, audit = swarm_until(AuditStatus.VOTING, KEYS[0].account, KEYS[1].account)
    assert who_may(swarm.state, audit) == {voter.account for voter in audit.voters} | {
        audit.auditor,
        *({audit.third.account} if audit.third else ()),
    }
    swarm, audit = swarm_until(AuditStatus.CONVICTED, KEYS[0].account, KEYS[1].account)
    assert NOBODY in who_may(swarm.state, audit)


def test_the_second_auditor_has_it_once_it_has_committed_and_the_first_no_more() -> None:
    swarm, first = swarm_until(AuditStatus.PASSED, repeated=10_000)
    seconds = [audit for audit in swarm.state.audits_of(swarm.task) if audit.first == first.id]
    assert [audit.state for audit in seconds] == [AuditStatus.DRAWN]
    assert who_may(swarm.state, first) == set()
    swarm.work(1)
    assert who_may(swarm.state, first) == {seconds[0].auditor}
    assert first.auditor != seconds[0].auditor


def test_what_is_not_drawn_nobody_has() -> None:
    swarm = start_swarm(Ledger(), KEYS[:2], stages=2, replicas=1)
    claim = swarm.claim(1, 0, (0,))
    assert not may_have_gradient(swarm.state, claim, KEYS[0].account, 0, KEYS[1].account)
