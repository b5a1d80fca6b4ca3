"""Tasks whose results are exact in one kernel class: who may have a seat, and how unlike machines judge."""

import pytest

from chain.keys import peer_id
from chain.reasons import Reason
from chain.records import AuditStatus
from chain.transactions import Commit, Commitment, PostTask, Reveal, RevealAll, TakeSeat, reveal_commitment
from tests.chain import ledger_oracle as oracle
from tests.chain.ledger_kit import KEYS, Ledger, Swarm, by_account, genesis_of, post_task, sketch, start_swarm
from tests.chain.ledger_view import Block

CLASS = bytes(32)
NOISE = 2e-3
"""What unlike kernels are apart in bf16: far beyond τ, below the wide one."""


def exact_swarm(**changes: object) -> Swarm:
    """Return a task in the kernel class of all workers, audited in full; workers are validators 0 to 3."""
    return start_swarm(Ledger(genesis_of(validators=7)), **{"kernel": CLASS, **changes})


def outsiders() -> set[bytes]:
    """Return the validators that hold no seat."""
    return {key.account for key in KEYS[4:7]}


def ends(swarm: Swarm) -> set[str]:
    """Return how the audits of cells ended."""
    return {kind for kind in ("passed", "disputed", "convicted", "charged", "void") if swarm.ledger.happened(kind)}


def checked(swarm: Swarm) -> None:
    """Have the oracle look at every block."""
    for context, transactions, before, executed in swarm.ledger.blocks:
        oracle.check(Block(before, context, transactions, executed))


@pytest.mark.parametrize("size", [1, 31])
def test_a_kernel_class_is_a_digest_or_nothing(size: int) -> None:
    ledger = Ledger()
    assert ledger.one(KEYS[6], post_task(kernel=bytes(size))) == Reason.BAD_KERNEL
    assert PostTask.__struct_fields__[-1] == "kernel"


def test_a_seat_is_for_machines_of_the_class() -> None:
    ledger = Ledger()
    assert ledger.one(KEYS[6], post_task(kernel=CLASS)) == ""
    (task,) = (found.id for found in ledger.state.open_tasks())
    assert ledger.one(KEYS[0], TakeSeat(task, b"\x01" * 32)) == Reason.OTHER_KERNEL
    assert ledger.one(KEYS[0], TakeSeat(task, CLASS)) == ""


def test_honest_machines_of_other_classes_audit_and_nobody_is_disputed() -> None:
    swarm = exact_swarm()
    swarm.unlike = outsiders()
    swarm.lies = dict.fromkeys(swarm.unlike, NOISE)
    # steps are exact everywhere: only cells are off by the noise of other kernels
    swarm.lies_in_steps = False
    swarm.work(60)
    assert swarm.settled == 8
    assert ends(swarm) == {"passed"}
    checked(swarm)


def test_who_does_not_say_that_it_is_unlike_disputes_what_is_honest_and_convicts_nobody() -> None:
    swarm = exact_swarm()
    liar = KEYS[4].account
    swarm.lies, swarm.lies_in_steps = {liar: NOISE}, False
    swarm.work(60)
    assert swarm.ledger.happened("disputed")
    assert not swarm.ledger.happened("convicted")
    assert {event["auditor"] for event in swarm.ledger.happened("disputed")} == {peer_id(liar)}
    checked(swarm)


@pytest.mark.parametrize("unlike", [3, 7])
def test_what_is_wide_of_the_mark_is_convicted_by_unlike_machines_too(unlike: int) -> None:
    swarm = exact_swarm()
    cheat = swarm.seated(0)[0]
    swarm.deviation = {cheat: -1.0}
    swarm.unlike = {key.account for key in KEYS[7 - unlike : 7]}
    swarm.work(30)
    assert {event["worker"] for event in swarm.ledger.happened("convicted")} == {peer_id(cheat)}
    assert not swarm.ledger.happened("charged")
    checked(swarm)


def test_a_small_cheat_is_convicted_inside_the_class_and_passes_outside() -> None:
    for unlike, expected in ((set[bytes](), True), ({key.account for key in KEYS[:7]}, False)):
        swarm = exact_swarm()
        cheat = swarm.seated(0)[0]
        swarm.deviation, swarm.unlike = {cheat: 4e-3}, unlike
        swarm.work(30)
        assert bool(swarm.ledger.happened("convicted")) == expected


@pytest.mark.parametrize(("kernel", "is_step"), [(b"", False), (CLASS, True)])
def test_nobody_is_unlike_where_all_results_are_comparable(kernel: bytes, is_step: bool) -> None:
    swarm = exact_swarm(kernel=kernel)
    owed = None
    while owed is None:
        swarm.silent = {(key.account, "commit") for key in KEYS}
        swarm.work(1)
        for audit in swarm.audits():
            if audit.state is AuditStatus.DRAWN and (audit.cell == 4) == is_step:
                owed = audit
    key = by_account(owed.auditor)
    told = Reveal(owed.id, 0, bytes(32), sketch(owed.key), sketch(owed.key), False, False, True)
    assert swarm.ledger.one(key, Commit((Commitment(owed.id, 0, reveal_commitment(key.account, told)),))) == ""
    swarm.silent |= {(key.account, "reveal")}
    swarm.work(1)
    assert swarm.ledger.one(key, RevealAll((told,))) == Reason.OTHER_KERNEL


def test_what_is_said_of_kernels_is_bound_by_the_commitment() -> None:
    plain = Reveal(bytes(32), 0, bytes(32), sketch(bytes(32)), sketch(bytes(32)), False, False)
    unlike = Reveal(bytes(32), 0, bytes(32), sketch(bytes(32)), sketch(bytes(32)), False, False, True)
    assert reveal_commitment(KEYS[0].account, plain) != reveal_commitment(KEYS[0].account, unlike)
