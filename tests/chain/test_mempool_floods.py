"""Floods of the mempool: by duties that nobody owes, by one greedy account, by a hundred thousand transactions."""

import cProfile
from collections.abc import Iterator

import pytest
from msgspec import structs

from chain.hashing import digest
from chain.mempool import DUTIES_A_BLOCK, MAX_QUEUE, MAX_REFUSED, OVERHEAD, Mempool
from chain.reasons import Reason
from chain.records import Account
from chain.state import Draft, State, Table
from chain.transactions import Bond, Commit, Commitment, Payload, Transaction, Transfer, Unsigned, VoteParams
from tests.chain.ledger_kit import KEYS, Ledger, genesis_of

ROOMY = 1 << 20
JUNK = Commit((Commitment(bytes(32), 0, bytes(32)),))


def blank(state: State, sender: bytes, payload: Payload, nonce: int = 0, fee: int = 0) -> Transaction:
    """Return a transaction that the mempool takes for signed."""
    body = Unsigned(1, state.chain.chain_id, sender, nonce, 0, 10_000, fee, b"", payload)
    return Transaction(body, bytes(64))


def crowded(accounts: int) -> State:
    """Return a network with as many accounts that each have a little stake."""
    state = Ledger(genesis_of(min_fee_per_byte=1)).state
    draft = Draft(state)
    for index in range(accounts):
        draft.put(Table.ACCOUNTS, name(index), Account(balance=10**6, bonded=1))
    return draft.freeze(state)


def name(index: int) -> bytes:
    return digest("crowd", index.to_bytes(4, "big"))


def flooded(state: State, accounts: int, each: int) -> Mempool:
    """Return a pool whose lane of duties is full of what nobody owes."""
    weight = len(blank(state, name(0), JUNK).encoded) + OVERHEAD
    pool = Mempool(max_bytes=4 * (accounts * each * weight + weight // 2))
    for index in range(accounts):
        for nonce in range(each):
            assert pool.add(state, blank(state, name(index), JUNK, nonce)) is None
    return pool


def test_a_lane_full_of_duties_that_nobody_owes_starves_nobody() -> None:
    state = crowded(32)
    pool = flooded(state, 32, 8)
    assert pool.add(state, blank(state, name(0), JUNK, 8)) == Reason.MEMPOOL_FULL
    owed = [blank(state, key.account, VoteParams(state.params)) for key in KEYS[:6]]
    before = set(pool)
    assert pool.refusal(state, owed[0]) is None
    assert set(pool) == before
    for duty in owed:
        assert pool.add(state, duty) is None
    assert set(owed) <= set(pool.select(state, ROOMY, 2 * MAX_REFUSED))


def test_what_nobody_owes_takes_no_place_from_who_owes() -> None:
    state = crowded(32)
    pool = flooded(state, 32, 8)
    before = set(pool)
    assert pool.add(state, blank(state, KEYS[0].account, JUNK)) == Reason.MEMPOOL_FULL
    assert set(pool) == before


def test_the_greediest_makes_room_and_never_for_somebody_greedier() -> None:
    state = crowded(32)
    pool = flooded(state, 32, 2)
    validator = KEYS[0].account
    taken = 0
    while pool.add(state, blank(state, validator, VoteParams(state.params), taken)) is None:
        taken += 1
    assert taken <= 2


def test_duties_that_nobody_owes_use_up_their_nonces_but_take_little_room() -> None:
    state = crowded(2 * MAX_REFUSED)
    pool = flooded(state, 2 * MAX_REFUSED, 1)
    pay = blank(state, KEYS[7].account, Transfer(bytes(32), 1), fee=1000)
    assert pool.add(state, pay) is None
    chosen = pool.select(state, ROOMY, 2048)
    assert len(chosen) == MAX_REFUSED + 1
    assert pay in chosen


def test_one_account_has_a_bounded_number_of_duties_in_a_block() -> None:
    state = crowded(1)
    pool, validator = Mempool(), KEYS[0].account
    for nonce in range(2 * DUTIES_A_BLOCK):
        assert pool.add(state, blank(state, validator, VoteParams(state.params), nonce)) is None
    other = blank(state, name(0), Transfer(bytes(32), 1), fee=1000)
    assert pool.add(state, other) is None
    chosen = pool.select(state, ROOMY, 1000)
    assert len(chosen) == DUTIES_A_BLOCK + 1
    assert other in chosen


def test_a_replacement_across_lanes_moves_the_weight() -> None:
    state = crowded(1)
    pool, validator = Mempool(), KEYS[0].account
    vote = blank(state, validator, VoteParams(state.params))
    assert pool.add(state, vote) is None
    assert pool.add(state, blank(state, validator, Bond(1), fee=0)) == Reason.LOW_FEE
    bond = blank(state, validator, Bond(1), fee=1000)
    assert pool.add(state, bond) is None
    assert list(pool) == [bond]
    assert pool._held == {True: 0, False: len(bond.encoded) + OVERHEAD}


def test_a_gap_waits_until_it_is_filled_and_is_no_way_around_the_bounds() -> None:
    state = crowded(2)
    pool = Mempool()
    pay = Transfer(bytes(32), 1)
    for nonce in range(1, MAX_QUEUE):
        assert pool.add(state, blank(state, name(0), pay, nonce, 1000)) is None
    assert pool.add(state, blank(state, name(0), pay, MAX_QUEUE, 1000)) == Reason.WRONG_NONCE
    assert pool.select(state, ROOMY, 1000) == ()
    first = blank(state, name(0), pay, 0, 1000)
    assert pool.add(state, first) is None
    assert len(pool.select(state, ROOMY, 1000)) == MAX_QUEUE


def junk(state: State, accounts: int, rounds: range) -> Iterator[Transaction]:
    for nonce in rounds:
        for index in range(accounts):
            yield blank(state, name(index), Transfer(bytes(32), 1), nonce, 300 + (index * 7919 + nonce) % 1000)


@pytest.mark.slow
def test_a_hundred_thousand_transactions_are_bounded_in_memory_and_in_work() -> None:
    state = crowded(1000)
    limit = 8 << 20
    pool = Mempool(limit)
    calls = []
    for start in range(0, 100, 20):
        batch = list(junk(state, 1000, range(start, start + 20)))
        profile = cProfile.Profile()
        profile.enable()
        for transaction in batch:
            pool.add(state, transaction)
        profile.disable()
        calls.append(sum(entry.callcount for entry in profile.getstats()))
        assert pool._held[False] <= limit - limit // 4
        assert sum(transaction_weight(t) for t in pool) == pool._held[False]
        assert len(pool._cheapest[False]) <= 4 * len(pool) + 20_000
        pool.prune(state, ())
    assert max(calls) < 3 * min(calls)
    assert len(pool) < 10_000
    chosen = pool.select(state, 900_000, 2048)
    assert all(transaction.body.fee >= 300 for transaction in chosen)


def transaction_weight(transaction: Transaction) -> int:
    return len(transaction.encoded) + OVERHEAD


def test_the_best_paid_of_a_flood_stay() -> None:
    state = crowded(64)
    pool = Mempool(1 << 17)
    for transaction in junk(state, 64, range(8)):
        pool.add(state, transaction)
    kept = sorted(transaction.body.fee for transaction in pool)
    assert kept[0] > 300 + 500
    poor = structs.replace(blank(state, KEYS[0].account, Transfer(bytes(32), 1), fee=300))
    assert pool.add(state, poor) == Reason.MEMPOOL_FULL
