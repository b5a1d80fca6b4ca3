"""Optimiser's steps in claims: from which states work may be claimed, and what audits of the steps decide."""

import pytest
from msgspec import structs

from chain.keys import PrivateKey, peer_id
from chain.ledger.transitions import SPLIT
from chain.reasons import Reason
from chain.records import Audit, AuditStatus
from chain.state import Duty, Table
from chain.transactions import (
    Claim,
    Commit,
    Commitment,
    Open,
    Opening,
    Payload,
    Reveal,
    RevealAll,
    SubmitClaims,
    reveal_commitment,
)
from tests.chain import ledger_oracle as oracle
from tests.chain.ledger_kit import BALANCE, KEYS, Ledger, Swarm, by_account, genesis_of, start_swarm
from tests.chain.ledger_players import FRAUD
from tests.chain.ledger_view import Block

OTHER = b"\x07" * 32


def refusal(swarm: Swarm, claim: Claim, account: bytes) -> str:
    return swarm.ledger.one(by_account(account), SubmitClaims((claim,)))


def own_cells(swarm: Swarm, account: bytes, step: int) -> Claim:
    """Return an honest claim of a worker's share of a step."""
    worker = swarm.state.worker(swarm.task, account)
    assert worker is not None
    place = swarm.seated(worker.stage).index(account)
    return swarm.claim(step, worker.stage, (place, place + 2))


def steps_audited(swarm: Swarm) -> list[Audit]:
    """Return the audits of optimiser's steps that are under way."""
    task = swarm.state.task(swarm.task)
    assert task is not None
    return [audit for audit in swarm.audits() if audit.cell == task.transition]


def checked(swarm: Swarm) -> None:
    """Have the oracle look at every block."""
    for context, transactions, before, executed in swarm.ledger.blocks:
        oracle.check(Block(before, context, transactions, executed))


# states


def test_work_from_a_state_that_nobody_claimed_is_refused() -> None:
    swarm = start_swarm()
    first, second = swarm.seated(0)
    assert refusal(swarm, own_cells(swarm, first, 1), first) == ""
    claim = own_cells(swarm, second, 2)
    assert refusal(swarm, structs.replace(claim, state_before=OTHER), second) == Reason.WRONG_STATE
    assert refusal(swarm, claim, second) == ""


def test_work_from_another_state_than_the_settled_one_is_refused() -> None:
    swarm = start_swarm()
    swarm.work(30, last_step=3)
    task = swarm.state.task(swarm.task)
    assert task is not None
    assert task.settled == 3
    [first, _] = swarm.seated(0)
    claim = own_cells(swarm, first, 4)
    assert task.roots[0] == claim.state_before
    assert refusal(swarm, structs.replace(claim, state_before=OTHER), first) == Reason.WRONG_STATE
    assert refusal(swarm, claim, first) == ""


def test_a_first_claim_may_start_anywhere() -> None:
    swarm = start_swarm()
    [first, _] = swarm.seated(1)
    assert refusal(swarm, structs.replace(own_cells(swarm, first, 1), state_before=OTHER), first) == ""


def test_after_a_rollback_work_starts_from_the_settled_state() -> None:
    swarm = start_swarm(steps=60)
    swarm.work(12)
    cheat = swarm.seated(0)[0]
    swarm.deviation[cheat] = FRAUD
    task = swarm.state.task(swarm.task)
    while task is not None and task.generation == 0:
        swarm.work(1)
        task = swarm.state.task(swarm.task)
    assert task is not None
    assert task.settled
    [left] = swarm.seated(0)
    claim = swarm.claim(task.settled + 1, 0, (0, 1, 2, 3))
    assert claim.generation == 1
    assert refusal(swarm, structs.replace(claim, state_before=OTHER), left) == Reason.WRONG_STATE
    assert refusal(swarm, claim, left) == ""


# two states after one step


def split(swarm: Swarm, step: int = 1) -> tuple[bytes, bytes]:
    """Let two workers of a stage claim different states after a step; return the honest one and the other."""
    honest, liar = swarm.seated(0)
    assert refusal(swarm, own_cells(swarm, honest, step), honest) == ""
    false = structs.replace(own_cells(swarm, liar, step), state_after=OTHER)
    assert refusal(swarm, false, liar) == ""
    return honest, liar


def test_two_states_after_a_step_are_both_audited() -> None:
    swarm = start_swarm(audit_rate=500, worker_bond=5000)
    workers = split(swarm)
    [progress] = swarm.state.tables[Table.STEPS].values()
    assert progress.after[0] == SPLIT
    swarm.ledger.skip(2)
    assert {audit.worker for audit in steps_audited(swarm)} == set(workers)
    checked(swarm)


def test_a_claim_whose_cells_were_drawn_already_is_audited_once_another_contradicts_it() -> None:
    swarm = start_swarm(audit_rate=500, worker_bond=5000)
    honest, liar = swarm.seated(0)
    assert refusal(swarm, own_cells(swarm, honest, 1), honest) == ""
    swarm.ledger.skip(4)
    drawn = swarm.ledger.happened("drawn")
    assert refusal(swarm, structs.replace(own_cells(swarm, liar, 1), state_after=OTHER), liar) == ""
    swarm.ledger.skip(4)
    assert {audit.worker for audit in steps_audited(swarm)} == {honest, liar}
    cells = [event for event in swarm.ledger.happened("drawn") if event["worker"] == peer_id(honest)]
    assert len([event for event in cells if event["cell"] != 4]) == len(
        [event for event in drawn if event["worker"] == peer_id(honest) and event["cell"] != 4]
    )
    checked(swarm)


def test_after_two_states_work_may_start_from_either() -> None:
    swarm = start_swarm()
    honest, liar = split(swarm)
    assert refusal(swarm, own_cells(swarm, honest, 2), honest) == ""
    assert refusal(swarm, structs.replace(own_cells(swarm, liar, 2), state_before=OTHER), liar) == ""


# verdicts


def test_who_opens_a_false_step_is_convicted_and_nobody_else() -> None:
    swarm = start_swarm()
    cheat = swarm.seated(0)[0]
    swarm.step_deviation[cheat] = 1e-4  # a small one: steps are exact
    swarm.work(60)
    assert {event["worker"] for event in swarm.ledger.happened("evicted")} == {peer_id(cheat)}
    assert not swarm.ledger.happened("faulted")
    assert not swarm.ledger.happened("charged")
    assert swarm.settled == 8
    checked(swarm)


class Withholding(Swarm):
    """A swarm in which some judge an optimiser's step without having been given its material."""

    without: frozenset[bytes] = frozenset()

    def answer(self, key: PrivateKey, duty: Duty) -> Payload:
        """Return what a peer answers: of a step that it has nothing of, that it has nothing."""
        audit, task = self.state.audit(duty.audit), self.state.task(self.task)
        assert audit is not None
        assert task is not None
        if duty.kind == "open" or audit.cell != task.transition or key.account not in self.without:
            return super().answer(key, duty)
        blank = Reveal(duty.audit, duty.round, key.account, bytes(384), bytes(384), False, True)
        if duty.kind == "commit":
            return Commit((Commitment(duty.audit, duty.round, reveal_commitment(key.account, blank)),))
        return RevealAll((blank,))


def withholding(without: frozenset[bytes]) -> Withholding:
    plain = start_swarm()
    swarm = Withholding(plain.ledger, plain.client, plain.task)
    swarm.without = without
    return swarm


def test_a_step_of_which_nobody_gets_the_material_is_withheld_and_no_fraud() -> None:
    swarm = withholding(frozenset(key.account for key in KEYS))
    swarm.work(30, last_step=1)
    assert {event["cell"] for event in swarm.ledger.happened("withheld")} == {4}
    assert not swarm.ledger.happened("slashed")
    assert not swarm.ledger.happened("charged")
    assert swarm.settled == 1
    checked(swarm)


def test_an_auditor_that_is_given_nothing_is_not_charged_where_the_voters_are() -> None:
    lone = KEYS[4].account
    swarm = withholding(frozenset({lone}))
    swarm.work(60)
    disputes = [event for event in swarm.ledger.happened("disputed") if event["auditor"] == peer_id(lone)]
    assert disputes
    assert not swarm.ledger.happened("charged")
    assert not swarm.ledger.happened("evicted")
    assert not swarm.ledger.happened("withheld")
    assert swarm.settled == 8
    checked(swarm)


def test_steps_of_teams_are_not_drawn() -> None:
    ledger = Ledger(genesis_of(8, 2))
    swarm = start_swarm(ledger, KEYS[:6], redundancy=3, replicas=3)
    swarm.work(40)
    assert swarm.settled == 8
    assert swarm.ledger.happened("passed")
    assert not [event for event in swarm.ledger.happened("drawn") if event["cell"] == 4]
    assert swarm.state.account(swarm.client.account).balance < BALANCE


@pytest.mark.parametrize("change", ["proof", "state", "salt"])
def test_an_opening_of_a_step_must_be_under_the_claim(change: str) -> None:
    swarm = start_swarm()
    while not [audit for audit in steps_audited(swarm) if audit.state is AuditStatus.COMMITTED]:
        swarm.work(1, last_step=1)
    audit = next(audit for audit in steps_audited(swarm) if audit.state is AuditStatus.COMMITTED)
    opening = swarm.opening(audit)
    false: dict[str, Opening] = {
        "proof": structs.replace(opening, proof=opening.proof[:-1]),
        "state": structs.replace(opening, trace=structs.replace(opening.trace, state=OTHER)),
        "salt": structs.replace(opening, salt=OTHER),
    }
    worker = by_account(audit.worker)
    assert swarm.ledger.one(worker, Open((false[change],))) == Reason.FALSE_OPENING
    assert swarm.ledger.one(worker, Open((opening,))) == ""


@pytest.mark.parametrize(("share", "rate"), [(0, 5000), (2500, 1000), (2500, 4000), (10_000, 4000), (0, 10_000)])
def test_steps_are_drawn_at_their_share_of_the_rate_no_less_than_the_floor_and_always_where_all_is(
    share: int, rate: int
) -> None:
    genesis = genesis_of(step_share=share, newcomer_rate=1)
    drawn = claims = 0
    swarm = start_swarm(Ledger(genesis), audit_rate=rate, steps=100)
    swarm.work(260)
    task = swarm.state.task(swarm.task)
    assert task is not None
    claims = 4 * task.settled
    drawn = sum(event["cell"] == task.transition for event in swarm.ledger.happened("drawn"))
    wanted = 1.0 if rate == 10_000 else max(0.05, rate / 10_000 * share / 10_000)
    assert task.settled > 60
    assert abs(drawn - wanted * claims) <= 4.5 * (claims * wanted * (1 - wanted)) ** 0.5
