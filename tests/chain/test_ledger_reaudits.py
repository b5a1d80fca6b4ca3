"""Second audits of passed audits: drawn, paid and waited for; who let a false cell pass pays, and nobody else."""

from dataclasses import dataclass

from chain.keys import PrivateKey, peer_id
from chain.records import Audit
from chain.state import Duty
from chain.transactions import Opening, Payload
from tests.chain import ledger_oracle as oracle
from tests.chain.ledger_kit import KEYS, STAKE, Ledger, Swarm, genesis_of, start_swarm
from tests.chain.ledger_view import Block

FRAUD = -2.0


@dataclass
class Ring(Swarm):
    """A swarm in which a friend says of a cheat's cells what the cheat says; some open second audits falsely."""

    friend: bytes = b""
    cheat: bytes = b""
    framer: bytes = b""

    def answer(self, key: PrivateKey, duty: Duty) -> Payload:
        """Return what a peer answers: the friend has the cheat's result for the cheat's cells only."""
        audit = self.state.audit(duty.audit)
        assert audit is not None
        if key.account == self.friend:
            task = self.state.task(self.task)
            is_false = audit.worker == self.cheat and task is not None and audit.cell != task.transition
            self.lies[key.account] = FRAUD if is_false else 0.0
        return super().answer(key, duty)

    def opening(self, audit: Audit, deviation: float = 0.0) -> Opening:
        """Return the opening of an audited cell."""
        is_false = audit.worker == self.framer and audit.first is not None
        return super().opening(audit, FRAUD if is_false else deviation)


def judge(swarm: Swarm) -> None:
    """Have the oracle look at every block."""
    for context, transactions, before, executed in swarm.ledger.blocks:
        oracle.check(Block(before, context, transactions, executed))


def ring(rate: int = 10_000, run: int = 0, **params: object) -> Ring:
    """Return a running swarm whose passed audits are repeated at a rate."""
    genesis = genesis_of(reaudit_rate=rate, reveal_window=10 + run, **params)
    plain = start_swarm(Ledger(genesis), escrow=5 * 8 * 2 * 4 * 10)
    return Ring(plain.ledger, plain.client, plain.task)


def first_audits(swarm: Swarm) -> dict[str, str]:
    """Return the auditor of every first audit."""
    return {event["audit"]: event["auditor"] for event in swarm.ledger.happened("drawn") if "first" not in event}


def test_every_passed_audit_is_repeated_by_somebody_else_and_the_step_waits() -> None:
    swarm = ring()
    swarm.work(8, last_step=1)
    assert swarm.ledger.happened("passed")
    assert swarm.settled == 0
    swarm.work(30)
    firsts = first_audits(swarm)
    seconds = [event for event in swarm.ledger.happened("drawn") if "first" in event]
    assert len(seconds) == len(firsts) == 8 * 2 * (4 + 2)
    assert len(swarm.ledger.happened("passed")) == 2 * len(firsts)
    assert all(firsts[event["first"]] != event["auditor"] for event in seconds)
    assert swarm.settled == 8
    assert not swarm.audits()
    task = swarm.state.task(swarm.task)
    assert task is not None
    assert task.escrow == 8 * 2 * 4 * 10
    judge(swarm)


def test_a_share_of_the_passed_audits_is_repeated() -> None:
    swarm = ring(2500)
    swarm.work(60)
    seconds = [event for event in swarm.ledger.happened("drawn") if "first" in event]
    assert 11 <= len(seconds) <= 37  # of 96, within three deviations


def test_an_auditor_that_lets_a_friend_pass_pays_for_it() -> None:
    caught = 0
    for run in range(4):
        swarm = ring(run=run)
        swarm.cheat, swarm.friend = swarm.seated(0)[0], KEYS[5].account
        swarm.deviation[swarm.cheat] = FRAUD
        swarm.work(60, last_step=4)
        let_pass = {e["audit"] for e in swarm.ledger.happened("passed") if e["worker"] == peer_id(swarm.cheat)}
        charged = swarm.ledger.happened("charged")
        assert {event["auditor"] for event in charged} <= {peer_id(swarm.friend)}
        assert {event["audit"] for event in charged} <= let_pass
        assert len(charged) == len(swarm.ledger.happened("reopened")) == len(swarm.ledger.happened("refuted"))
        assert {e["worker"] for e in swarm.ledger.happened("slashed")} == {peer_id(swarm.cheat)}
        assert bool(charged) == (swarm.state.account(swarm.friend).bonded < STAKE)
        caught += bool(charged)
        judge(swarm)
    assert caught


def test_a_worker_that_opens_the_second_audit_falsely_hurts_only_itself() -> None:
    swarm = ring()
    swarm.framer = swarm.seated(0)[0]
    swarm.work(60, last_step=4)
    assert swarm.ledger.happened("reopened")
    assert {e["worker"] for e in swarm.ledger.happened("slashed")} == {peer_id(swarm.framer)}
    assert not swarm.ledger.happened("charged")
    assert not swarm.ledger.happened("refuted")
    assert all(swarm.state.account(a).bonded == STAKE for a in swarm.state.validators().powers)
    assert not swarm.audits()
    judge(swarm)


def test_a_reopened_audit_outlives_the_history() -> None:
    swarm = ring(history_blocks=12, vote_window=20)
    swarm.framer = swarm.seated(0)[0]
    while not (reopened := swarm.ledger.happened("reopened")):
        swarm.work(1, last_step=1)
    swarm.silent = {(account, "commit") for account in swarm.state.validators().powers}
    swarm.work(15, last_step=1)
    assert swarm.state.audit(bytes.fromhex(reopened[0]["audit"])) is not None
    swarm.work(40, last_step=1)
    assert swarm.state.audit(bytes.fromhex(reopened[0]["audit"])) is None
    judge(swarm)
