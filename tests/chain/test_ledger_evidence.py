"""Evidence: once a validator, within its window, and of all the stake that stood behind the votes."""

import pytest

from chain.blocks import Vote, VoteKind, vote_bytes
from chain.codec import encode
from chain.hashing import ZERO, digest
from chain.keys import PrivateKey
from chain.reasons import Reason
from chain.transactions import Bond, Evidence, RegisterValidator, Unbond, Withdraw
from tests.chain.ledger_kit import BALANCE, KEYS, ONIONS, STAKE, Ledger, genesis_of

EPOCH, WINDOW = 4, 10
CULPRIT, ALICE = KEYS[0], KEYS[7]


def network(validators: int = 4) -> Ledger:
    return Ledger(genesis_of(validators, 10 - validators, epoch_blocks=EPOCH, unbonding_blocks=WINDOW))


def offence(ledger: Ledger, height: int, key: PrivateKey = CULPRIT, view: int = 1, salt: bytes = b"") -> Evidence:
    said = [
        (VoteKind.NOTARIZE, ledger.genesis.chain_id, height, view, digest("block", bytes([i]), salt)) for i in (0, 1)
    ]
    first, second = (encode(Vote(*one, key.account, key.sign(vote_bytes(*one)))) for one in said)
    return Evidence(first, second)


def test_the_window_is_the_unbonding_period_to_the_block() -> None:
    for late, reason in ((0, ""), (1, Reason.EVIDENCE_OLD)):
        ledger = network()
        ledger.skip(1 + WINDOW + late)
        assert ledger.one(ALICE, offence(ledger, 3)) == reason


def test_votes_of_the_height_under_decision_count_and_later_ones_do_not() -> None:
    ledger = network()
    ledger.skip(2)
    assert ledger.one(ALICE, offence(ledger, 5)) == Reason.EVIDENCE_EARLY
    assert ledger.one(ALICE, offence(ledger, 4)) == ""


@pytest.mark.parametrize("again", ["same", "other height", "other view", "other blocks", "other order"])
def test_a_validator_is_punished_once(again: str) -> None:
    ledger = network()
    ledger.skip(3)
    evidence = offence(ledger, 2)
    assert ledger.one(ALICE, evidence) == ""
    burned = ledger.state.chain.burned
    assert ledger.one(CULPRIT, Bond(500)) == ""
    repeated = {
        "same": evidence,
        "other height": offence(ledger, 3),
        "other view": offence(ledger, 2, view=2),
        "other blocks": offence(ledger, 2, salt=b"x"),
        "other order": Evidence(evidence.second, evidence.first),
    }[again]
    assert ledger.one(ALICE, repeated) == Reason.EVIDENCE_KNOWN
    assert ledger.state.chain.burned == burned
    assert ledger.state.account(CULPRIT.account).bonded == 500


def test_stake_on_its_way_out_is_slashed_also_that_of_who_left_the_set() -> None:
    ledger = network()
    assert ledger.one(CULPRIT, Unbond(STAKE)) == ""
    while CULPRIT.account in ledger.state.validators():
        last = ledger.state.height + 1
        ledger.skip(1)
    ledger.skip(last + WINDOW - ledger.state.height - 2)
    assert ledger.block((ALICE, offence(ledger, last)), (CULPRIT, Withdraw())) == ("", Reason.NOTHING_RELEASED)
    assert ledger.happened("equivocation")[0]["slashed"] == str(STAKE)
    ledger.skip(2 * WINDOW)
    assert ledger.one(CULPRIT, Withdraw()) == Reason.NOTHING_RELEASED
    assert ledger.state.account(CULPRIT.account).balance == BALANCE


def test_stake_is_withdrawn_no_earlier_than_evidence_of_its_last_vote_is_too_old() -> None:
    ledger = network()
    assert ledger.one(CULPRIT, Unbond(STAKE)) == ""
    last = 0
    while ledger.one(CULPRIT, Withdraw()) != "":
        if CULPRIT.account in ledger.state.validators():
            last = ledger.state.height + 1
    assert last > 0
    assert ledger.one(ALICE, offence(ledger, last)) == Reason.EVIDENCE_OLD


def test_an_offender_is_out_of_the_set_at_once_and_its_stake_is_gone() -> None:
    ledger = network()
    ledger.skip(EPOCH)
    assert ledger.one(ALICE, offence(ledger, 2)) == ""
    assert CULPRIT.account not in ledger.state.validators()
    assert ledger.state.validators().total == 3 * STAKE
    assert ledger.state.account(ALICE.account).balance == BALANCE + STAKE // 4


def test_evidence_by_the_offender_itself_earns_nothing() -> None:
    ledger = network()
    assert ledger.one(CULPRIT, offence(ledger, 1)) == ""
    assert ledger.state.account(CULPRIT.account).balance == BALANCE
    assert ledger.state.chain.burned == STAKE


def test_a_candidate_that_was_never_in_the_set_is_slashed_too() -> None:
    ledger = network()
    assert ledger.block((ALICE, Bond(5000)), (ALICE, RegisterValidator(ONIONS[ALICE.account].tip))) == ("", "")
    assert ledger.one(KEYS[8], offence(ledger, 1, ALICE)) == ""
    assert ledger.state.account(ALICE.account).bonded == 0
    ledger.skip(3 * EPOCH)
    assert ALICE.account not in ledger.state.validators()


def test_votes_of_who_never_registered_are_no_evidence() -> None:
    ledger = network()
    assert ledger.one(KEYS[8], offence(ledger, 1, ALICE)) == Reason.BAD_EVIDENCE


def test_honest_votes_of_one_view_are_no_evidence() -> None:
    ledger = network()
    block = digest("block")
    said = [
        (kind, ledger.genesis.chain_id, 1, view, ZERO if kind == VoteKind.NULLIFY else block)
        for kind, view in (
            (VoteKind.NOTARIZE, 1),
            (VoteKind.FINALIZE, 1),
            (VoteKind.NULLIFY, 2),
            (VoteKind.NOTARIZE, 2),
        )
    ]
    votes = [encode(Vote(*one, CULPRIT.account, CULPRIT.sign(vote_bytes(*one)))) for one in said]
    for first in votes:
        for second in votes:
            assert ledger.one(ALICE, Evidence(first, second)) == Reason.BAD_EVIDENCE


def test_the_last_validator_is_not_lost_to_evidence() -> None:
    ledger = network(1)
    assert ledger.one(ALICE, offence(ledger, 1)) == Reason.LAST_VALIDATOR
    assert len(ledger.state.validators()) == 1
