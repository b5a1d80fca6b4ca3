"""What is malformed, false, late, said twice or said by the convicted: refused by name, at nobody else's cost."""

import math
import struct

import pytest
from msgspec import structs

from chain.codec import DecodeError, encode
from chain.hashing import digest
from chain.keys import peer_id
from chain.reasons import Reason
from chain.records import Audit, AuditStatus
from chain.transactions import (
    SKETCH_BYTES,
    Commit,
    Commitment,
    Open,
    Payload,
    Reveal,
    RevealAll,
    decode_transaction,
    reveal_commitment,
)
from tests.attacks.figures import Figures, cheating, follow
from tests.attacks.kit import Character, RealSwarm, swarm_of
from tests.chain.ledger_kit import by_account

NAN = struct.pack("<96f", *[math.nan] * 96)


def swarm_until(run: str, state: AuditStatus, **character: str) -> tuple[RealSwarm, Audit]:
    """Return a swarm with an audit in this state, of a worker that has this character if one is given."""
    swarm = swarm_of(run, 10_000)
    if character:
        swarm.characters[swarm.seated(1)[0]] = Character(attack=character["attack"])
    for _ in range(80):
        swarm.work(1)
        found = [audit for audit in swarm.state.audits_of(swarm.task) if audit.state is state]
        if found:
            return swarm, found[0]
    raise AssertionError(f"no audit became {state}")


def refused(swarm: RealSwarm, account: bytes, payload: Payload) -> str:
    before = [(w.bond, w.withheld, w.state) for w in swarm.state.workers(swarm.task)]
    reason = swarm.ledger.one(by_account(account), payload)
    assert [(w.bond, w.withheld, w.state) for w in swarm.state.workers(swarm.task)] == before
    return reason


def reveal_of(audit: Audit, round_: int = 0, sketch: bytes = NAN) -> Reveal:
    return Reveal(audit.id, round_, bytes(32), sketch, sketch, False, False)


@pytest.mark.parametrize("size", [0, 1, SKETCH_BYTES - 1, SKETCH_BYTES + 1, 4000])
def test_a_sketch_of_another_length_is_no_transaction(size: int) -> None:
    swarm, audit = swarm_until("length", AuditStatus.COMMITTED)
    opening = structs.replace(swarm.opening(audit), sketch=bytes(size))
    for account, payload in (
        (audit.worker, Open((opening,))),
        (audit.auditor, RevealAll((reveal_of(audit, sketch=bytes(size)),))),
    ):
        with pytest.raises(DecodeError):
            decode_transaction(encode(swarm.ledger.sign(by_account(account), payload)))


def test_nothing_is_owed_to_audits_that_do_not_exist() -> None:
    swarm, audit = swarm_until("unknown", AuditStatus.COMMITTED)
    unknown = digest("no audit")
    payloads: tuple[Payload, ...] = (
        Commit((Commitment(unknown, 0, bytes(32)),)),
        Open((structs.replace(swarm.opening(audit), audit=unknown),)),
        RevealAll((structs.replace(reveal_of(audit), audit=unknown),)),
    )
    for payload in payloads:
        assert refused(swarm, audit.auditor, payload) == Reason.UNKNOWN_AUDIT


def test_what_is_said_twice_or_after_the_end_is_not_owed() -> None:
    swarm, audit = swarm_until("twice", AuditStatus.PASSED)
    assert audit.opening is not None
    assert audit.reveal is not None
    for account, payload in (
        (audit.auditor, Commit((Commitment(audit.id, 0, bytes(32)),))),
        (audit.worker, Open((audit.opening,))),
        (audit.auditor, RevealAll((audit.reveal,))),
        (audit.auditor, RevealAll((structs.replace(audit.reveal, contradiction=True),))),
    ):
        assert refused(swarm, account, payload) == Reason.NOT_OWED


@pytest.mark.parametrize("round_", [1, 2])
def test_who_is_not_asked_has_no_opinion_and_no_vote(round_: int) -> None:
    swarm, audit = swarm_until("not asked", AuditStatus.COMMITTED)
    everybody = swarm.state.validators().powers
    for account in (audit.worker, audit.auditor, *sorted(everybody)[:2]):
        assert refused(swarm, account, Commit((Commitment(audit.id, round_, bytes(32)),))) == Reason.NOT_OWED
        assert refused(swarm, account, RevealAll((reveal_of(audit, round_),))) == Reason.NOT_OWED


def test_accused_and_accuser_do_not_vote() -> None:
    swarm, audit = swarm_until("parties", AuditStatus.VOTING, attack="sign flip")
    for account in (audit.worker, audit.auditor):
        assert refused(swarm, account, Commit((Commitment(audit.id, 2, bytes(32)),))) == Reason.NOT_OWED


def test_an_auditor_whose_sketch_is_not_a_number_is_charged() -> None:
    swarm, audit = swarm_until("NaN auditor", AuditStatus.DRAWN)
    swarm.silent |= {(audit.auditor, "commit"), (audit.auditor, "reveal")}
    false = reveal_of(audit)
    commitment = Commitment(audit.id, 0, reveal_commitment(audit.auditor, false))
    assert swarm.ledger.one(by_account(audit.auditor), Commit((commitment,))) == ""
    while (now := swarm.state.audit(audit.id)) is not None and now.state is not AuditStatus.OPENED:
        swarm.work(1)
    assert swarm.ledger.one(by_account(audit.auditor), RevealAll((false,))) == ""
    while not swarm.ledger.happened("charged"):
        swarm.work(1)
    assert [event["auditor"] for event in swarm.ledger.happened("charged")] == [peer_id(audit.auditor)]
    assert not swarm.ledger.happened("evicted")


def test_a_worker_whose_sketch_is_not_a_number_is_convicted() -> None:
    swarm, audit = swarm_until("NaN worker", AuditStatus.COMMITTED)
    false = structs.replace(swarm.opening(audit), sketch=NAN)
    assert swarm.ledger.one(by_account(audit.worker), Open((false,))) == ""
    while not swarm.ledger.happened("slashed"):
        swarm.work(1)
    assert {event["worker"] for event in swarm.ledger.happened("slashed")} == {peer_id(audit.worker)}


def test_the_convicted_judge_nobody() -> None:
    swarm = swarm_of("convicted", 5000)
    first, second = swarm.seated(1)[0], swarm.seated(0)[0]
    cheating("sign flip")(swarm, first)
    follow(swarm, first, Figures("first", 0.5))
    swarm.work(30)
    assert not swarm.state.duties(first)
    cheating("sign flip")(swarm, second)
    while not (votes := [audit for audit in swarm.audits() if audit.state is AuditStatus.VOTING]):
        swarm.work(1)
    assert first in swarm.state.validators().powers
    assert first not in {voter.account for voter in votes[0].voters}
    for payload in (Commit((Commitment(votes[0].id, 2, bytes(32)),)), RevealAll((reveal_of(votes[0], 2),))):
        assert refused(swarm, first, payload) == Reason.BARRED
    follow(swarm, second, Figures("second", 0.5))
    assert {event["worker"] for event in swarm.ledger.happened("slashed")} == {peer_id(first), peer_id(second)}
