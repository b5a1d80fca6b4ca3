"""Key rotation: everything goes on under a fresh key, the old one is closed for good and stays liable."""

from itertools import pairwise

import pytest
from msgspec.structs import replace

from chain.blocks import Vote, VoteKind, vote_bytes
from chain.codec import encode
from chain.hashing import digest
from chain.keys import PrivateKey
from chain.ledger import InvalidBlock, check_envelope
from chain.ledger.book import Book
from chain.reasons import Reason
from chain.records import Account
from chain.state import Draft, Table
from chain.transactions import (
    Bond,
    CloseTask,
    Evidence,
    LeaveSeat,
    RegisterValidator,
    RotateKey,
    Transfer,
    Unbond,
    VoteParams,
    rotation_bytes,
)
from tests.chain.ledger_kit import BALANCE, KEYS, ONIONS, STAKE, Ledger, genesis_of, key_of, post_task, start_swarm

EPOCH = 4
ALICE, FRESH, NEXT = KEYS[7], KEYS[10], KEYS[11]


def network(validators: int = 4) -> Ledger:
    return Ledger(genesis_of(validators, 10 - validators, epoch_blocks=EPOCH, unbonding_blocks=100))


def rotation(ledger: Ledger, old: PrivateKey, new: PrivateKey) -> RotateKey:
    proof = new.sign(rotation_bytes(ledger.genesis.chain_id, old.account))
    return RotateKey(new.account, ONIONS[new.account].tip if new.account in ONIONS else bytes(32), proof)


def offence(ledger: Ledger, key: PrivateKey, height: int) -> Evidence:
    said = [(VoteKind.NOTARIZE, ledger.genesis.chain_id, height, 1, digest("block", bytes([i]))) for i in (0, 1)]
    first, second = (encode(Vote(*one, key.account, key.sign(vote_bytes(*one)))) for one in said)
    return Evidence(first, second)


def test_all_that_an_account_has_moves() -> None:
    ledger = network()
    assert ledger.block((ALICE, Bond(5000)), (ALICE, Unbond(2000))) == ("", "")
    assert ledger.one(ALICE, rotation(ledger, ALICE, FRESH)) == ""
    assert ledger.state.account(FRESH.account) == Account(balance=BALANCE - 5000, bonded=3000)
    assert ledger.state.account(ALICE.account) == Account(nonce=3)
    rows = ledger.state.tables[Table.UNBONDINGS]
    assert [(key[:32], row.amount) for key, row in rows.items()] == [(FRESH.account, 2000)]
    assert ledger.happened("rotated")
    assert ledger.one(FRESH, Transfer(KEYS[8].account, 1)) == ""


def test_the_old_account_is_closed_for_good() -> None:
    ledger = network()
    assert ledger.one(ALICE, rotation(ledger, ALICE, FRESH)) == ""
    late = ledger.sign(ALICE, Transfer(KEYS[8].account, 1))
    assert check_envelope(ledger.state, late, ledger.state.height + 1) == Reason.CLOSED
    with pytest.raises(InvalidBlock, match=Reason.CLOSED):
        ledger.execute((late,))
    assert ledger.one(KEYS[8], Transfer(ALICE.account, 5)) == Reason.CLOSED
    assert ledger.one(KEYS[8], rotation(ledger, KEYS[8], ALICE)) == Reason.KEY_IN_USE


def test_what_follows_a_rotation_in_its_block_is_refused_there() -> None:
    ledger = network()
    sent = ((ALICE, rotation(ledger, ALICE, FRESH)), (ALICE, Transfer(KEYS[8].account, 1)))
    assert ledger.block(*sent) == ("", Reason.CLOSED)


def test_what_a_hook_pays_to_a_closed_account_its_heir_gets() -> None:
    ledger = network()
    assert ledger.one(ALICE, rotation(ledger, ALICE, FRESH)) == ""
    assert ledger.one(FRESH, rotation(ledger, FRESH, NEXT)) == ""
    book = Book(Draft(ledger.state), ledger.state.height, bytes(32), ledger.state.validators())
    book.credit(ALICE.account, 7)
    assert book.account(NEXT.account).balance == BALANCE + 7


def test_a_long_line_of_successors_ends_at_the_last() -> None:
    ledger = network()
    line = [ALICE, *(key_of(100 + index) for index in range(20))]
    for old, new in pairwise(line):
        assert ledger.one(old, rotation(ledger, old, new)) == ""
    assert {ledger.state.heir(key.account) for key in line} == {line[-1].account}
    assert [ledger.state.is_closed(key.account) for key in line] == [True] * 20 + [False]
    assert ledger.state.account(line[-1].account).balance == BALANCE


def test_a_successor_must_be_fresh_and_consent() -> None:
    ledger = network()
    other = RotateKey(FRESH.account, bytes(32), rotation(ledger, KEYS[8], FRESH).proof)
    assert ledger.one(ALICE, other) == Reason.BAD_PROOF
    assert ledger.one(ALICE, RotateKey(FRESH.account, bytes(32), bytes(64))) == Reason.BAD_PROOF
    assert ledger.one(ALICE, rotation(ledger, ALICE, KEYS[0])) == Reason.KEY_IN_USE
    assert ledger.one(ALICE, rotation(ledger, ALICE, ALICE)) == Reason.KEY_IN_USE
    foreign = FRESH.sign(rotation_bytes(bytes(32), ALICE.account))
    assert ledger.one(ALICE, RotateKey(FRESH.account, bytes(32), foreign)) == Reason.BAD_PROOF
    assert ledger.one(KEYS[8], Transfer(FRESH.account, 1)) == ""
    assert ledger.one(FRESH, Transfer(KEYS[8].account, 1)) == ""
    assert ledger.one(ALICE, rotation(ledger, ALICE, FRESH)) == Reason.KEY_IN_USE


def test_a_successor_that_somebody_has_paid_is_still_fresh() -> None:
    ledger = network()
    assert ledger.one(KEYS[8], Transfer(FRESH.account, 7)) == ""
    before = ledger.state.account(ALICE.account).balance
    assert ledger.one(ALICE, rotation(ledger, ALICE, FRESH)) == ""
    assert ledger.state.account(FRESH.account).balance == before + 7


def test_a_validator_steps_out_and_comes_back_under_its_new_key() -> None:
    ledger, old = network(), KEYS[0]
    assert ledger.one(old, rotation(ledger, old, FRESH)) == ""
    assert old.account not in ledger.state.validators()
    assert FRESH.account not in ledger.state.validators()
    assert ledger.state.validator(old.account) is None
    while ledger.state.height < 2 * EPOCH:
        ledger.skip(1)
    power = ledger.state.validators().power(FRESH.account)
    assert power == 3 * STAKE // 4
    ledger.skip(EPOCH)
    assert ledger.state.validators().power(FRESH.account) == STAKE
    ledger.skip(6)
    assert ledger.state.validator(FRESH.account).onion_tip != ONIONS[FRESH.account].tip  # type: ignore[union-attr]


def test_the_last_validator_keeps_its_key() -> None:
    ledger = network(1)
    assert ledger.one(KEYS[0], rotation(ledger, KEYS[0], FRESH)) == Reason.LAST_VALIDATOR


def test_a_jail_is_not_left_by_rotation() -> None:
    ledger = Ledger(genesis_of(4, 6, jail_window=6, jail_missed=3, jail_blocks=50))
    ledger.skip(1)
    others = [key.account for key in KEYS[1:4]]
    while "jailed" not in ledger.kinds():
        ledger.block(signers=others)
    before = ledger.state.validator(KEYS[0].account)
    assert ledger.one(KEYS[0], rotation(ledger, KEYS[0], FRESH)) == ""
    after = ledger.state.validator(FRESH.account)
    assert before is not None
    assert after is not None
    assert (after.is_jailed, after.jailed_until) == (True, before.jailed_until)


def test_a_rotated_key_stays_liable_for_what_it_signed_while_it_counted() -> None:
    ledger, old = network(), KEYS[0]
    ledger.skip(2)
    assert ledger.one(old, rotation(ledger, old, FRESH)) == ""
    assert ledger.one(FRESH, rotation(ledger, FRESH, NEXT)) == ""
    late = offence(ledger, old, 4)
    assert ledger.one(ALICE, late) == Reason.BAD_EVIDENCE
    assert ledger.one(ALICE, offence(ledger, old, 3)) == ""
    assert ledger.state.account(NEXT.account).bonded == 0
    assert ledger.state.validator(NEXT.account).is_tombstoned  # type: ignore[union-attr]
    assert ledger.happened("equivocation")[0]["slashed"] == str(STAKE)
    assert ledger.one(ALICE, offence(ledger, old, 2)) == Reason.EVIDENCE_KNOWN
    assert ledger.one(NEXT, rotation(ledger, NEXT, key_of(50))) == Reason.TOMBSTONED
    assert ledger.one(NEXT, RegisterValidator(bytes(32))) == Reason.TOMBSTONED


def test_clients_workers_and_auditors_finish_first() -> None:
    swarm = start_swarm(workers=KEYS[:4])
    ledger, client, worker = swarm.ledger, swarm.client, KEYS[0]
    fresh = iter(range(200, 300))

    def answer(key: PrivateKey) -> str:
        return ledger.one(key, rotation(ledger, key, key_of(next(fresh))))

    assert answer(client) == Reason.OBLIGED
    assert answer(worker) == Reason.OBLIGED
    while not swarm.audits():
        swarm.work(1)
    auditor = next(key for key in KEYS[:6] if key.account == swarm.audits()[0].auditor)
    assert answer(auditor) == Reason.OBLIGED
    assert ledger.one(worker, LeaveSeat(swarm.task)) == ""
    assert answer(worker) == Reason.OBLIGED
    swarm.work(40, last_step=0)
    assert ledger.state.worker(swarm.task, worker.account).bond == 0  # type: ignore[union-attr]
    assert answer(worker) == ""
    assert ledger.one(client, CloseTask(swarm.task)) == ""
    swarm.work(3)
    assert answer(client) == ""


def test_who_posts_or_joins_in_the_same_block_is_obliged() -> None:
    ledger = network()
    assert ledger.block((ALICE, post_task()), (ALICE, rotation(ledger, ALICE, FRESH))) == ("", Reason.OBLIGED)


def test_a_vote_on_parameters_does_not_outlive_the_place_in_the_set() -> None:
    ledger = network()
    assert ledger.one(KEYS[0], VoteParams(replace(ledger.state.params, min_stake=2000))) == ""
    assert ledger.one(KEYS[0], rotation(ledger, KEYS[0], FRESH)) == ""
    assert ledger.state.validator(FRESH.account).wish is None  # type: ignore[union-attr]
