"""What a judge tolerates where its own results are unsteady: in its own comparisons, and an auditor answers for it."""

from dataclasses import dataclass

import pytest
from msgspec import structs

from chain.keys import PrivateKey, peer_id
from chain.reasons import Reason
from chain.records import AuditStatus
from chain.state import Duty
from chain.transactions import MAX_TOLERANCE, Payload, Reveal, RevealAll, reveal_commitment
from tests.chain import ledger_oracle as oracle
from tests.chain.ledger_kit import KEYS, STAKE, TOLERATED, Ledger, Swarm, by_account, genesis_of, sketch, start_swarm
from tests.chain.ledger_view import Block

WILD = 1e-4
"""What honest machines of unlike kernels are apart on a wrecked model: 40 τ of y, which is less than is tolerated."""
FRIEND = KEYS[5].account


@dataclass
class Wreck(Swarm):
    """A swarm whose workers are off by rounding; some cheat in the tensors behind their sketches, and others see it."""

    cheat: bytes = b""
    friend: bytes = b""

    def answer(self, key: PrivateKey, duty: Duty) -> Payload:
        """Return what a peer answers: everybody but the friend finds the cheat's tensors false."""
        answer = super().answer(key, duty)
        audit, task = self.state.audit(duty.audit), self.state.task(self.task)
        assert audit is not None
        assert task is not None
        is_seen = audit.worker == self.cheat and audit.cell != task.transition and key.account != self.friend
        if isinstance(answer, RevealAll) and is_seen:
            return RevealAll(tuple(structs.replace(one, contradiction=True) for one in answer.entries))
        return answer


def wreck(run: int = 0, **params: object) -> Wreck:
    """Return a running swarm."""
    plain = start_swarm(Ledger(genesis_of(7, reveal_window=10 + run, **params)), escrow=5 * 8 * 2 * 4 * 10)
    return Wreck(plain.ledger, plain.client, plain.task)


def judge(swarm: Swarm) -> None:
    """Have the oracle look at every block."""
    for context, transactions, before, executed in swarm.ledger.blocks:
        oracle.check(Block(before, context, transactions, executed))


def test_honest_machines_that_know_their_spread_dispute_nobody() -> None:
    swarm = wreck()
    swarm.deviation = {swarm.seated(0)[0]: WILD}
    swarm.tolerates = {key.account for key in KEYS}
    swarm.work(60)
    assert swarm.settled == 8
    assert not {"disputed", "faulted", "convicted", "charged"} & set(swarm.ledger.kinds())
    judge(swarm)


def test_without_a_spread_the_same_is_a_fault() -> None:
    swarm = wreck()
    swarm.deviation = {swarm.seated(0)[0]: WILD}
    swarm.work(60)
    assert swarm.ledger.happened("faulted")
    assert not {"convicted", "charged"} & set(swarm.ledger.kinds())
    judge(swarm)


def test_voters_that_know_their_spread_clear_a_worker_whom_an_auditor_without_one_accuses() -> None:
    swarm = wreck()
    swarm.deviation = {swarm.seated(0)[0]: WILD}
    swarm.tolerates = {key.account for key in KEYS} - {FRIEND}
    swarm.work(60)
    assert {event["auditor"] for event in swarm.ledger.happened("disputed")} == {peer_id(FRIEND)}
    assert not {"faulted", "convicted", "charged"} & set(swarm.ledger.kinds())
    judge(swarm)


def test_what_passes_by_tolerance_only_is_always_audited_again() -> None:
    swarm = wreck(reaudit_rate=1)
    worker = swarm.seated(0)[0]
    swarm.deviation, swarm.tolerates = {worker: WILD}, {key.account for key in KEYS}
    swarm.work(60)
    drawn = swarm.ledger.happened("drawn")
    task = swarm.state.task(swarm.task)
    assert task is not None
    firsts = {e["audit"] for e in drawn if "first" not in e and e["worker"] == peer_id(worker) and e["cell"] < 4}
    assert firsts
    assert firsts <= {event["first"] for event in drawn if "first" in event}
    assert swarm.settled == 8
    judge(swarm)


def test_an_auditor_that_let_a_friend_pass_by_a_tolerance_is_charged() -> None:
    """Its sketch is the true one: without the tolerance the audit would not have passed, and it answers for that."""
    charged = 0
    for run in range(4):
        swarm = wreck(run, reaudit_rate=1)
        swarm.cheat, swarm.friend = swarm.seated(0)[0], FRIEND
        swarm.deviation, swarm.tolerates = {swarm.cheat: WILD}, {FRIEND}
        swarm.work(60, last_step=4)
        assert {e["worker"] for e in swarm.ledger.happened("slashed")} == {peer_id(swarm.cheat)}
        found = swarm.ledger.happened("charged")
        assert {event["auditor"] for event in found} <= {peer_id(FRIEND)}
        assert len(found) == len(swarm.ledger.happened("refuted"))
        assert bool(found) == (swarm.state.account(FRIEND).bonded < STAKE)
        charged += bool(found)
        judge(swarm)
    assert charged


def test_an_honest_auditor_is_not_charged_for_a_tolerance_that_the_voters_have_as_well() -> None:
    reopened = 0
    for run in range(4):
        swarm = wreck(run, reaudit_rate=1)
        swarm.cheat, swarm.friend = swarm.seated(0)[0], FRIEND
        swarm.deviation, swarm.tolerates = {swarm.cheat: WILD}, {key.account for key in KEYS}
        swarm.work(60, last_step=4)
        reopened += len(swarm.ledger.happened("reopened"))
        assert not swarm.ledger.happened("charged")
        judge(swarm)
    assert reopened


def test_a_tolerance_clears_nobody_of_a_result_that_was_not_computed() -> None:
    swarm = wreck()
    liar = FRIEND
    swarm.lies, swarm.tolerates, swarm.lies_in_steps = {liar: -2.0}, {liar}, False
    swarm.work(60)
    assert {event["auditor"] for event in swarm.ledger.happened("charged")} == {peer_id(liar)}
    assert not swarm.ledger.happened("convicted")
    judge(swarm)


def owed_reveal(swarm: Swarm, is_step: bool) -> tuple[PrivateKey, Reveal]:
    """Work until an auditor owes a reveal of a cell or of an optimiser's step; return both."""
    for _ in range(40):
        for audit in swarm.audits():
            if audit.state is AuditStatus.OPENED and (audit.cell == 4) == is_step:
                key = by_account(audit.auditor)
                (duty,) = [d for d in swarm.state.duties(key.account) if d.audit == audit.id]
                answer = swarm.answer(key, duty)
                assert isinstance(answer, RevealAll)
                return key, answer.entries[0]
        swarm.work(1)
    raise AssertionError("nobody had to reveal")


@pytest.mark.parametrize(("kernel", "is_step"), [(b"", True), (bytes(32), False)])
def test_what_is_exact_is_not_tolerated(kernel: bytes, is_step: bool) -> None:
    swarm = start_swarm(Ledger(genesis_of(7)), kernel=kernel)
    swarm.silent |= {(key.account, "reveal") for key in KEYS}
    key, told = owed_reveal(swarm, is_step)
    false = structs.replace(told, tolerance=(1, 2, 1))
    assert swarm.ledger.one(key, RevealAll((false,))) == Reason.EXACT_RESULTS
    assert swarm.ledger.one(key, RevealAll((told,))) == ""


def test_a_tolerance_is_found_after_the_commitment() -> None:
    plain = Reveal(bytes(32), 0, bytes(32), sketch(bytes(32)), sketch(bytes(32)), False, False)
    told = structs.replace(plain, tolerance=(1, TOLERATED, MAX_TOLERANCE))
    assert reveal_commitment(FRIEND, plain) == reveal_commitment(FRIEND, told)
