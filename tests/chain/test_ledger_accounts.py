"""Balances, stake, validators, envelopes and the one offence of consensus."""

import pytest
from msgspec import structs

from chain.blocks import Vote, VoteKind, vote_bytes
from chain.codec import encode
from chain.hashing import ZERO, digest
from chain.keys import PrivateKey
from chain.ledger import InvalidBlock, check_envelope, execute
from chain.reasons import Reason
from chain.records import Account
from chain.state import genesis_state
from chain.transactions import (
    Bond,
    Evidence,
    Faucet,
    Payload,
    RegisterValidator,
    RenewLease,
    Transaction,
    Transfer,
    Unbond,
    Unjail,
    Unsigned,
    Withdraw,
    sign,
)
from tests.chain.ledger_kit import BALANCE, KEYS, ONIONS, STAKE, Ledger, context_on, genesis_of, key_of

ALICE, BOB, NOBODY = KEYS[6], KEYS[7], KEYS[10]


def next_epochs(ledger: Ledger, count: int = 1) -> None:
    """Execute blocks until `count` epochs have begun."""
    for _ in range(count):
        ledger.skip(1)
        while ledger.state.height % ledger.state.params.epoch_blocks:
            ledger.skip(1)


def test_a_transfer_moves_balance() -> None:
    ledger = Ledger()
    assert ledger.one(ALICE, Transfer(BOB.account, 100)) == ""
    assert ledger.state.account(ALICE.account) == Account(balance=BALANCE - 100, nonce=1)
    assert ledger.state.account(BOB.account).balance == BALANCE + 100


def test_a_transfer_to_oneself_changes_nothing_but_the_nonce() -> None:
    ledger = Ledger()
    assert ledger.one(ALICE, Transfer(ALICE.account, BALANCE)) == ""
    assert ledger.state.account(ALICE.account) == Account(balance=BALANCE, nonce=1)


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (Transfer(BOB.account, 0), Reason.ZERO_AMOUNT),
        (Transfer(BOB.account, BALANCE + 1), Reason.NO_FUNDS),
        (Bond(0), Reason.ZERO_AMOUNT),
        (Bond(BALANCE + 1), Reason.NO_FUNDS),
        (Unbond(0), Reason.ZERO_AMOUNT),
        (Unbond(1), Reason.NO_STAKE),
        (Withdraw(), Reason.NOTHING_RELEASED),
        (Unjail(), Reason.NOT_A_VALIDATOR),
        (Faucet(), Reason.NO_FAUCET),
        (RenewLease(bytes(32)), Reason.NO_SEAT),
        (Evidence(b"", b"\x00"), Reason.BAD_EVIDENCE),
    ],
)
def test_a_refused_payload_costs_fee_and_nonce_and_nothing_else(payload: Payload, reason: Reason) -> None:
    ledger = Ledger()
    executed = ledger.execute((ledger.sign(ALICE, payload, fee=7),))
    assert [receipt.reason for receipt in executed.receipts] == [reason]
    assert ledger.state.account(ALICE.account) == Account(balance=BALANCE - 7, nonce=1)
    assert ledger.state.chain.burned == 7
    assert executed.events == ()


def test_stake_returns_only_after_the_unbonding_period() -> None:
    ledger = Ledger(genesis_of(unbonding_blocks=5))
    assert ledger.one(ALICE, Bond(1000)) == ""
    assert ledger.one(ALICE, Unbond(400)) == ""
    assert ledger.state.account(ALICE.account) == Account(balance=BALANCE - 1000, nonce=2, bonded=600)
    for _ in range(4):
        assert ledger.one(ALICE, Withdraw()) == Reason.NOTHING_RELEASED
    assert ledger.one(ALICE, Withdraw()) == ""
    assert ledger.state.account(ALICE.account).balance == BALANCE - 600
    assert ledger.one(ALICE, Withdraw()) == Reason.NOTHING_RELEASED


def test_two_unbondings_of_one_block_are_released_together() -> None:
    ledger = Ledger(genesis_of(unbonding_blocks=2))
    assert ledger.one(ALICE, Bond(1000)) == ""
    assert ledger.block((ALICE, Unbond(1)), (ALICE, Unbond(2))) == ("", "")
    ledger.skip(1)
    assert ledger.one(ALICE, Withdraw()) == ""
    assert ledger.state.account(ALICE.account).balance == BALANCE - 997


def test_a_new_validator_joins_with_stake_and_leaves_with_it() -> None:
    ledger = Ledger()
    assert ledger.one(ALICE, RegisterValidator(ONIONS[ALICE.account].tip)) == ""
    assert ALICE.account not in ledger.state.validators()
    assert ledger.one(ALICE, Bond(5000)) == ""
    next_epochs(ledger, 2)
    assert ledger.state.validators().power(ALICE.account) == 5000
    assert ledger.one(ALICE, Unbond(4500)) == ""
    next_epochs(ledger)
    assert ALICE.account not in ledger.state.validators()


def test_the_last_validators_cannot_leave_together() -> None:
    ledger = Ledger(genesis_of(validators=2))
    assert ledger.block((KEYS[0], Unbond(STAKE)), (KEYS[1], Unbond(STAKE))) == ("", Reason.LAST_VALIDATOR)
    next_epochs(ledger, 40)
    assert list(ledger.state.validators().powers) == [KEYS[1].account]
    assert ledger.one(KEYS[1], Unbond(STAKE - 500)) == Reason.LAST_VALIDATOR


def test_the_faucet_gives_once_an_account_until_it_is_empty() -> None:
    ledger = Ledger(genesis_of(faucet=250, faucet_grant=100))
    assert ledger.one(NOBODY, Faucet()) == ""
    assert ledger.state.account(NOBODY.account) == Account(balance=100, nonce=1, granted=True)
    assert ledger.one(NOBODY, Faucet()) == Reason.ALREADY_GRANTED
    assert ledger.one(ALICE, Faucet()) == ""
    assert ledger.one(BOB, Faucet()) == Reason.NO_FAUCET


def vote(key: PrivateKey, ledger: Ledger, kind: VoteKind, block_hash: bytes, height: int = 1) -> bytes:
    chain_id = ledger.genesis.chain_id
    signature = key.sign(vote_bytes(kind, chain_id, height, 1, block_hash))
    return encode(Vote(kind, chain_id, height, 1, block_hash, key.account, signature))


def equivocation(key: PrivateKey, ledger: Ledger) -> Evidence:
    return Evidence(
        vote(key, ledger, VoteKind.NOTARIZE, digest("a")),
        vote(key, ledger, VoteKind.NOTARIZE, digest("b")),
    )


def test_an_equivocator_is_slashed_and_out_for_good() -> None:
    ledger, culprit = Ledger(), KEYS[0]
    assert ledger.one(ALICE, equivocation(culprit, ledger)) == ""
    assert ledger.state.account(culprit.account).bonded == 0
    assert ledger.state.account(ALICE.account).balance == BALANCE + STAKE // 4
    assert ledger.state.chain.burned == STAKE - STAKE // 4
    assert culprit.account not in ledger.state.validators()
    assert ledger.one(culprit, Bond(5000)) == ""
    assert culprit.account not in ledger.state.validators()
    assert ledger.one(culprit, Unjail()) == Reason.TOMBSTONED
    assert ledger.one(culprit, RegisterValidator(bytes(32))) == Reason.TOMBSTONED
    assert ledger.one(BOB, equivocation(culprit, ledger)) == Reason.EVIDENCE_KNOWN
    assert ledger.happened("equivocation")[0]["slashed"] == str(STAKE)


def test_unbonding_does_not_save_an_equivocator() -> None:
    ledger, culprit = Ledger(genesis_of(unbonding_blocks=30)), KEYS[0]
    assert ledger.one(culprit, Unbond(STAKE)) == ""
    assert ledger.one(ALICE, equivocation(culprit, ledger)) == ""
    assert ledger.happened("equivocation")[0]["slashed"] == str(STAKE)
    ledger.skip(ledger.state.params.unbonding_blocks + 1)
    assert ledger.one(culprit, Withdraw()) == Reason.NOTHING_RELEASED


def test_who_reports_itself_gets_no_reward() -> None:
    ledger, culprit = Ledger(), KEYS[0]
    assert ledger.one(culprit, equivocation(culprit, ledger)) == ""
    assert ledger.state.account(culprit.account).balance == BALANCE
    assert ledger.state.chain.burned == STAKE


@pytest.mark.parametrize("case", ["same", "other height", "stranger", "unsigned", "other chain", "not a vote"])
def test_no_evidence_without_two_authentic_conflicting_votes(case: str) -> None:
    ledger, culprit = Ledger(), KEYS[0]
    first = vote(culprit, ledger, VoteKind.NOTARIZE, digest("a"))
    stranger = vote(NOBODY, ledger, VoteKind.NOTARIZE, digest("a"))
    elsewhere = Ledger(structs.replace(genesis_of(), name=b"other"))
    second = {
        "same": first,
        "other height": vote(culprit, ledger, VoteKind.NOTARIZE, digest("b"), height=2),
        "stranger": vote(NOBODY, ledger, VoteKind.NOTARIZE, digest("b")),
        "unsigned": vote(culprit, ledger, VoteKind.NOTARIZE, digest("b"))[:-1] + b"\x00",
        "other chain": vote(culprit, elsewhere, VoteKind.NOTARIZE, digest("b")),
        "not a vote": b"\x93",
    }[case]
    evidence = Evidence(stranger if case == "stranger" else first, second)
    assert ledger.one(ALICE, evidence) == Reason.BAD_EVIDENCE


def test_a_nullification_and_a_finalization_of_one_view_conflict() -> None:
    ledger, culprit = Ledger(), KEYS[0]
    evidence = Evidence(
        vote(culprit, ledger, VoteKind.NULLIFY, ZERO), vote(culprit, ledger, VoteKind.FINALIZE, digest("a"))
    )
    assert ledger.one(ALICE, evidence) == ""


def test_a_vanished_validator_is_jailed_and_returns() -> None:
    ledger = Ledger(genesis_of(jail_window=10, jail_missed=5, jail_blocks=8))
    gone = KEYS[0]

    def block() -> None:
        ledger.block(signers=[a for a in ledger.state.validators().powers if a != gone.account])

    ledger.skip(1)
    for _ in range(4):
        block()
    assert "jailed" not in ledger.kinds()
    block()
    assert ledger.kinds() == ["jailed"]
    assert gone.account not in ledger.state.validators()
    assert ledger.one(gone, Unjail()) == Reason.STILL_JAILED
    ledger.skip(7)
    assert ledger.one(gone, Unjail()) == ""
    next_epochs(ledger)
    assert gone.account in ledger.state.validators()
    assert ledger.one(gone, Unjail()) == Reason.NOT_JAILED


def test_misses_outside_the_window_are_forgotten() -> None:
    ledger = Ledger(genesis_of(jail_window=10, jail_missed=5))
    ledger.skip(1)
    for _ in range(8):
        ledger.block(signers=[key.account for key in KEYS[1:6]])
        ledger.skip(2)
    assert "jailed" not in ledger.kinds()


def test_somebody_always_validates() -> None:
    ledger = Ledger(genesis_of(validators=2, jail_window=5, jail_missed=2))
    ledger.skip(1)
    for _ in range(4):
        ledger.block(signers=())
    assert len(ledger.state.validators()) == 1


def envelope(ledger: Ledger, **changes: object) -> Transaction:
    plain = Unsigned(1, ledger.genesis.chain_id, ALICE.account, 0, 0, 100, 0, b"", Transfer(BOB.account, 1))
    return sign(ALICE, structs.replace(plain, **changes))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"chain_id": bytes(32)}, Reason.WRONG_CHAIN),
        ({"nonce": 1}, Reason.WRONG_NONCE),
        ({"valid_from": 2}, Reason.OUTSIDE_WINDOW),
        ({"valid_until": 0}, Reason.OUTSIDE_WINDOW),
        ({"fee": BALANCE + 1}, Reason.NO_FUNDS),
    ],
)
def test_an_invalid_envelope_makes_a_block_invalid(changes: dict[str, object], reason: Reason) -> None:
    ledger = Ledger()
    transaction = envelope(ledger, **changes)
    assert check_envelope(ledger.state, transaction, 1) == reason
    with pytest.raises(InvalidBlock, match=reason):
        ledger.execute((transaction,))
    assert ledger.state.height == 0


def test_the_least_fee_goes_by_size_and_duties_of_those_who_may_owe_them_are_free() -> None:
    ledger = Ledger(genesis_of(min_fee_per_byte=2))
    transaction = envelope(ledger)
    least = 2 * len(encode(envelope(ledger, fee=2**16)))
    assert check_envelope(ledger.state, transaction, 1) == Reason.LOW_FEE
    assert check_envelope(ledger.state, envelope(ledger, fee=least), 1) is None
    lease = RenewLease(bytes(32))
    assert check_envelope(ledger.state, envelope(ledger, payload=lease), 1) == Reason.NOT_OWED
    assert check_envelope(ledger.state, ledger.sign(KEYS[0], lease), 1) is None


def test_a_fee_must_be_covered_by_what_the_block_left() -> None:
    ledger = Ledger()
    first = ledger.sign(ALICE, Transfer(BOB.account, BALANCE))
    with pytest.raises(InvalidBlock, match=Reason.NO_FUNDS):
        ledger.execute((first, ledger.sign(ALICE, Transfer(BOB.account, 1), ahead=1, fee=1)))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"chain_id": bytes(32)}, Reason.WRONG_CHAIN),
        ({"height": 2}, Reason.WRONG_HEIGHT),
        ({"timestamp": 0}, Reason.WRONG_TIME),
        ({"proposer": ALICE.account}, Reason.WRONG_PROPOSER),
        ({"reveal": bytes(32)}, Reason.WRONG_REVEAL),
        ({"seed": bytes(32)}, Reason.WRONG_SEED),
    ],
)
def test_a_false_context_makes_a_block_invalid(changes: dict[str, object], reason: Reason) -> None:
    state = genesis_state(genesis_of())
    with pytest.raises(InvalidBlock, match=reason):
        execute(state, structs.replace(context_on(state), **changes), ())


def test_too_many_transactions_make_a_block_invalid() -> None:
    ledger = Ledger(genesis_of(max_block_transactions=1))
    with pytest.raises(InvalidBlock, match=Reason.TOO_MANY):
        ledger.block((ALICE, Transfer(BOB.account, 1)), (BOB, Transfer(ALICE.account, 1)))


def test_a_reveal_is_used_up() -> None:
    ledger = Ledger(genesis_of(validators=1))
    context = context_on(ledger.state)
    ledger.skip(1)
    again = structs.replace(context, height=2, timestamp=context.timestamp + 1)
    with pytest.raises(InvalidBlock, match=Reason.WRONG_REVEAL):
        execute(ledger.state, again, ())


def test_execution_leaves_the_state_before_untouched() -> None:
    ledger = Ledger()
    before, root = ledger.state, ledger.state.root
    ledger.one(ALICE, Transfer(BOB.account, 5))
    assert before.root == root
    assert before.account(ALICE.account) == Account(balance=BALANCE)


def test_leaders_of_an_epoch_are_drawn_from_a_seed_one_epoch_old() -> None:
    ledger = Ledger(genesis_of(epoch_blocks=3))
    seeds, leaders = [ledger.state.seed], [ledger.state.leader_seed]
    for _ in range(12):
        ledger.skip(1)
        seeds.append(ledger.state.seed)
        leaders.append(ledger.state.leader_seed)
    assert leaders[:6] == [seeds[0]] * 6
    assert leaders[6:9] == [seeds[3]] * 3
    assert leaders[9:12] == [seeds[6]] * 3


def test_unknown_accounts_are_empty() -> None:
    assert Ledger().state.account(key_of(99).account) == Account()
