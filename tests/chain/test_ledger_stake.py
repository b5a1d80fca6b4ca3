"""Stake becomes power from epoch to epoch: bounded both ways, at once for slashes, never to nobody."""

import random
from itertools import pairwise
from typing import Any

import pytest
from msgspec import structs

from chain.blocks import MAX_VALIDATORS
from chain.hashing import ZERO, digest
from chain.ledger.book import Book
from chain.ledger.validators import begin_epoch
from chain.reasons import Reason
from chain.records import Account, Validator
from chain.state import Draft, State, Table, genesis_state
from chain.transactions import Bond, RegisterValidator, Unbond, Withdraw
from tests.chain.ledger_kit import BALANCE, KEYS, ONIONS, STAKE, Ledger, genesis_of

EPOCH = 4
NEWCOMER = KEYS[8]


def network(validators: int = 4, **params: Any) -> Ledger:
    return Ledger(genesis_of(validators, 9 - validators, epoch_blocks=EPOCH, **params))


def next_epoch(ledger: Ledger, count: int = 1) -> None:
    for _ in range(count):
        ledger.skip(EPOCH - ledger.state.height % EPOCH)


def power(ledger: Ledger, index: int) -> int:
    return ledger.state.validators().power(KEYS[index].account)


def crowd(stakes: dict[bytes, tuple[int, int]], **params: Any) -> Book:
    """Return a book with these validators besides the genesis' one: stake and power by account."""
    state = genesis_state(genesis_of(1, 0, **params))
    draft = Draft(state)
    for account, (stake, weight) in stakes.items():
        draft.put(Table.ACCOUNTS, account, Account(bonded=stake))
        draft.put(Table.VALIDATORS, account, Validator(bytes(32), 0, weight))
    return Book(draft, 100, ZERO, state.validators())


def test_stake_that_joins_or_leaves_counts_from_the_next_epoch() -> None:
    ledger = network()
    assert ledger.block((KEYS[0], Bond(1000)), (KEYS[1], Unbond(1000))) == ("", "")
    while ledger.state.height % EPOCH:
        assert (power(ledger, 0), power(ledger, 1)) == (STAKE, STAKE)
        ledger.skip(1)
    assert (power(ledger, 0), power(ledger, 1)) == (STAKE + 1000, STAKE - 1000)


def test_a_newcomer_joins_within_two_epochs() -> None:
    ledger = network()
    assert ledger.block((NEWCOMER, Bond(STAKE)), (NEWCOMER, RegisterValidator(ONIONS[NEWCOMER.account].tip)))
    next_epoch(ledger, 2)
    assert power(ledger, 8) == STAKE


def test_one_validator_becomes_many() -> None:
    ledger = network(1)
    for key in KEYS[1:4]:
        assert ledger.block((key, Bond(4 * STAKE)), (key, RegisterValidator(ONIONS[key.account].tip))) == ("", "")
    sizes = []
    for _ in range(18):
        sizes.append(ledger.state.validators().total)
        next_epoch(ledger)
    assert all(after <= before + max(before // 4, 1000) for before, after in pairwise(sizes))
    assert ledger.state.validators().total == 13 * STAKE
    assert [power(ledger, index) for index in range(4)] == [STAKE, 4 * STAKE, 4 * STAKE, 4 * STAKE]


def test_a_whale_moves_a_quarter_an_epoch_and_leaves_as_slowly() -> None:
    ledger = network()
    assert ledger.one(KEYS[0], Bond(BALANCE)) == ""
    next_epoch(ledger)
    assert power(ledger, 0) == 2 * STAKE
    next_epoch(ledger)
    assert power(ledger, 0) == 2 * STAKE + 5 * STAKE // 4
    next_epoch(ledger, 8)
    assert ledger.one(KEYS[0], Unbond(BALANCE + STAKE)) == ""
    before = ledger.state.validators().total
    next_epoch(ledger)
    assert ledger.state.validators().total == before - before // 4


def test_stake_that_still_votes_is_not_released() -> None:
    ledger = network(unbonding_blocks=2)
    for key in KEYS[:3]:
        assert ledger.one(key, Unbond(STAKE)) == ""
    seen = []
    while ledger.state.validators().powers.keys() != {KEYS[3].account}:
        ledger.skip(1)
        for index, key in enumerate(KEYS[:3]):
            if ledger.one(key, Withdraw()) == "":
                assert power(ledger, index) == 0
                seen.append(index)
        assert ledger.state.height < 20 * EPOCH
    next_epoch(ledger)
    left = [ledger.one(KEYS[index], Withdraw()) for index in range(3) if index not in seen]
    assert set(left) <= {""}
    assert all(ledger.state.account(key.account).balance == BALANCE + STAKE for key in KEYS[:3])


def test_who_leaves_the_set_is_released_an_unbonding_period_after_its_last_vote() -> None:
    ledger = network(unbonding_blocks=10)
    ledger.skip(1)
    assert ledger.one(KEYS[0], Unbond(1000)) == ""
    assert ledger.one(NEWCOMER, Bond(1000)) == ""
    assert ledger.one(NEWCOMER, Unbond(1000)) == ""
    rows = ledger.state.tables[Table.UNBONDINGS]
    at = {key[:32]: row.release_at for key, row in rows.items()}
    assert at == {KEYS[0].account: EPOCH + 10, NEWCOMER.account: 4 + 10}


def test_slashed_stake_votes_no_more_in_the_next_block() -> None:
    ledger = network()
    draft = Draft(ledger.state)
    book = Book(draft, 1, ZERO, ledger.state.validators())
    assert book.seize(KEYS[0].account, 300) == 300
    assert draft.freeze(ledger.state).validators().power(KEYS[0].account) == STAKE - 300
    assert book.seize(KEYS[0].account, 10 * STAKE) == STAKE - 300
    assert KEYS[0].account not in draft.freeze(ledger.state).validators()


def test_the_last_validator_stays_whatever_is_taken_from_it() -> None:
    ledger = network(1)
    draft = Draft(ledger.state)
    book = Book(draft, 1, ZERO, ledger.state.validators())
    assert book.seize(KEYS[0].account, STAKE) == STAKE
    assert list(draft.freeze(ledger.state).validators().powers) == [KEYS[0].account]


def test_the_last_who_could_go_on_cannot_leave() -> None:
    ledger = network(3)
    leave = Unbond(STAKE)
    assert ledger.block(*((key, leave) for key in KEYS[:3])) == ("", "", Reason.LAST_VALIDATOR)
    next_epoch(ledger, 30)
    assert list(ledger.state.validators().powers) == [KEYS[2].account]


def sets(book: Book) -> tuple[dict[bytes, int], dict[bytes, int]]:
    """Return the powers before and after an epoch begins."""
    before = {account: row.power for account, row in book.draft.items(Table.VALIDATORS) if row.power}
    begin_epoch(book)
    return before, {account: row.power for account, row in book.draft.items(Table.VALIDATORS) if row.power}


def test_the_set_is_the_strongest_256_and_others_enter_as_the_weakest_leave() -> None:
    accounts = [digest("many", index.to_bytes(4, "big")) for index in range(300)]
    book = crowd(
        {account: (2000 + index, 2000 + index if index < 255 else 0) for index, account in enumerate(accounts)}
    )
    weak = set(accounts[:44])
    before, after = sets(book)
    assert len(before) == MAX_VALIDATORS
    assert set(after) <= set(before)
    assert all(account not in after for account in weak)
    for _ in range(3):
        before, after = sets(book)
        assert len(after) <= MAX_VALIDATORS
    assert set(after) == {*accounts[45:], KEYS[0].account}


@pytest.mark.parametrize("seed", range(60))
def test_an_epoch_moves_at_most_its_share_and_any_quorum_holds_a_third_of_the_set_before(seed: int) -> None:
    rng = random.Random(seed)
    share = rng.choice((1, 500, 2500, 3333))
    stakes = {
        digest("one", index.to_bytes(4, "big")): (rng.choice((0, 1000, rng.randrange(10**9))), rng.randrange(10**9))
        for index in range(rng.randrange(1, 40))
    }
    book = crowd(stakes, churn_share=share)
    before, after = sets(book)
    moved = sum(abs(after.get(account, 0) - before.get(account, 0)) for account in before | after)
    assert after
    assert moved <= max(sum(before.values()) * share // 10_000, 1000)
    new = sum(max(0, after[account] - before.get(account, 0)) for account in after)
    assert 3 * (2 * sum(after.values()) // 3 + 1 - new) > sum(before.values())
    for _ in range(400):
        if (previous := after) == sets(book)[1]:
            break
        after = {account: row.power for account, row in book.draft.items(Table.VALIDATORS) if row.power}
    if share >= 500:
        stake = {account: book.account(account).bonded for account in previous}
        assert previous == {account: amount for account, amount in stake.items() if amount >= 1000}


def test_the_set_is_made_again_only_when_it_changes() -> None:
    ledger = network()
    before: State = ledger.state
    ledger.skip(1)
    assert ledger.state.validators() is before.validators()
    assert ledger.one(KEYS[0], Bond(1)) == ""
    next_epoch(ledger)
    assert ledger.state.validators() is not before.validators()
    assert structs.replace(ledger.state.validators(), members=()) != before.validators()


def test_a_newcomer_of_equal_stake_doubles_a_lonely_set_in_five_epochs() -> None:
    ledger = network(1)
    assert ledger.block((KEYS[1], Bond(STAKE)), (KEYS[1], RegisterValidator(ONIONS[KEYS[1].account].tip)))
    next_epoch(ledger)
    seen = []
    while power(ledger, 1) < STAKE:
        next_epoch(ledger)
        seen.append(power(ledger, 1))
    assert seen == [250_000, 562_500, 953_125, STAKE]
