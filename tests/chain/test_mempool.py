"""The mempool: order, replacement, bounds, the lane of duties."""

from typing import Any

import pytest
from msgspec import structs

from chain.codec import encode
from chain.ledger import InvalidBlock, check_envelope
from chain.mempool import ACCOUNT_SHARE, KEPT_BLOCKS, MAX_QUEUE, OVERHEAD, Mempool
from chain.reasons import Reason
from chain.transactions import Bond, Commit, Commitment, Payload, RenewLease, Transaction, Transfer, VoteParams, sign
from tests.chain.ledger_kit import BALANCE, KEYS, Ledger, Sent, genesis_of

ALICE, BOB, CAROL = KEYS[6], KEYS[7], KEYS[8]
VALIDATOR = KEYS[0]
ROOMY = 1 << 20
LEASE = RenewLease(bytes(32))


def pay(amount: int = 1) -> Payload:
    return Transfer(BOB.account, amount)


def filled(ledger: Ledger, *sent: tuple[Sent, int, int]) -> tuple[Mempool, list[Transaction]]:
    pool, transactions = Mempool(), []
    for (key, payload), ahead, fee in sent:
        transaction = ledger.sign(key, payload, ahead, fee)
        assert pool.add(ledger.state, transaction) is None
        transactions.append(transaction)
    return pool, transactions


def test_nonces_run_in_order_and_a_gap_waits() -> None:
    ledger = Ledger()
    pool, (third, second) = filled(ledger, ((ALICE, pay(3)), 2, 0), ((ALICE, pay(2)), 1, 0))
    assert pool.select(ledger.state, ROOMY, 100) == ()
    first = ledger.sign(ALICE, pay(1))
    pool.add(ledger.state, first)
    assert pool.select(ledger.state, ROOMY, 100) == (first, second, third)
    assert pool.select(ledger.state, ROOMY, 2) == (first, second)
    assert pool.select(ledger.state, len(encode(first)), 100) == (first,)


def test_duties_come_first_then_the_best_fee_per_byte() -> None:
    ledger = Ledger()
    vote = VoteParams(ledger.state.params)
    pool, (low, high, duty) = filled(ledger, ((ALICE, pay()), 0, 5), ((BOB, pay()), 0, 50), ((VALIDATOR, vote), 0, 0))
    assert pool.select(ledger.state, ROOMY, 100) == (duty, high, low)


def test_only_a_better_fee_replaces() -> None:
    ledger = Ledger()
    pool, (old,) = filled(ledger, ((ALICE, pay()), 0, 5))
    assert pool.add(ledger.state, ledger.sign(ALICE, pay(9), fee=5)) == Reason.LOW_FEE
    better = ledger.sign(ALICE, pay(9), fee=6)
    assert pool.add(ledger.state, better) is None
    assert list(pool) == [better]
    assert old.tx_id not in pool
    assert pool.add(ledger.state, better) is None
    assert len(pool) == 1


@pytest.mark.parametrize(
    ("ahead", "fee", "reason"),
    [(-1, 0, Reason.WRONG_NONCE), (MAX_QUEUE, 0, Reason.WRONG_NONCE), (0, BALANCE, Reason.NO_FUNDS)],
)
def test_what_can_never_be_included_is_refused(ahead: int, fee: int, reason: Reason) -> None:
    ledger = Ledger()
    ledger.one(ALICE, pay())
    assert Mempool().add(ledger.state, ledger.sign(ALICE, pay(), ahead, fee)) == reason


def test_the_free_lane_is_for_those_who_may_owe_something() -> None:
    ledger = Ledger(genesis_of(min_fee_per_byte=1))
    pool = Mempool()
    assert pool.add(ledger.state, ledger.sign(ALICE, LEASE)) == Reason.NOT_OWED
    assert pool.add(ledger.state, ledger.sign(ALICE, pay())) == Reason.LOW_FEE
    assert pool.add(ledger.state, ledger.sign(VALIDATOR, LEASE)) is None
    assert pool.add(ledger.state, ledger.sign(ALICE, LEASE, fee=1000)) is None


def small(entries: int) -> Mempool:
    size = len(encode(Ledger().sign(ALICE, pay(), fee=99))) + OVERHEAD
    return Mempool(max_bytes=entries * size * 4 // 3 + 8)


def test_the_cheapest_is_evicted_for_something_better(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chain.mempool.ACCOUNT_SHARE", 1)
    ledger, pool = Ledger(), small(3)
    cheap, fair, good = (ledger.sign(key, pay(), fee=fee) for key, fee in ((ALICE, 10), (BOB, 20), (CAROL, 30)))
    for transaction in (good, cheap, fair):
        assert pool.add(ledger.state, transaction) is None
    assert pool.add(ledger.state, ledger.sign(KEYS[1], pay(), fee=10)) == Reason.MEMPOOL_FULL
    better = ledger.sign(KEYS[1], pay(), fee=40)
    assert pool.add(ledger.state, better) is None
    assert cheap.tx_id not in pool
    assert set(pool) == {fair, good, better}


def test_a_full_lane_of_transfers_leaves_room_for_duties(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chain.mempool.ACCOUNT_SHARE", 1)
    ledger, pool = Ledger(), small(3)
    for key in (ALICE, BOB, CAROL):
        pool.add(ledger.state, ledger.sign(key, pay(), fee=90))
    assert pool.add(ledger.state, ledger.sign(VALIDATOR, LEASE)) is None
    assert len(pool) == 4


def test_no_account_fills_a_lane_alone() -> None:
    ledger = Ledger()
    size = len(encode(ledger.sign(ALICE, pay()))) + OVERHEAD
    pool = Mempool(max_bytes=2 * size * ACCOUNT_SHARE * 4 // 3 + 64)
    assert pool.add(ledger.state, ledger.sign(ALICE, pay())) is None
    assert pool.add(ledger.state, ledger.sign(ALICE, pay(), ahead=1)) is None
    assert pool.add(ledger.state, ledger.sign(ALICE, pay(), ahead=2)) == Reason.MEMPOOL_FULL
    assert pool.add(ledger.state, ledger.sign(BOB, pay())) is None


def test_bytes_are_counted_through_every_change() -> None:
    ledger, pool = Ledger(), Mempool()
    for round_ in range(5):
        sent = [ledger.sign(key, pay(), ahead, fee=round_ + 1) for key in (ALICE, BOB) for ahead in range(4)]
        for transaction in sent:
            pool.add(ledger.state, transaction)
        assert len(pool) == 8
        assert pool._held == {True: 0, False: sum(len(encode(t)) + OVERHEAD for t in pool)}
    pool.remove(list(pool))
    assert len(pool) == 0
    assert pool._held == {True: 0, False: 0}
    assert pool._queues == {}


def test_included_and_outdated_transactions_go() -> None:
    ledger = Ledger()
    pool, (first, second) = filled(ledger, ((ALICE, pay()), 0, 0), ((ALICE, pay()), 1, 0))
    stale = ledger.sign(BOB, pay())
    pool.add(ledger.state, stale)
    ledger.execute((first,))
    pool.remove((first,))
    ledger.one(BOB, pay(5))
    pool.prune(ledger.state)
    assert list(pool) == [second]
    ledger.skip(120)
    pool.prune(ledger.state)
    assert len(pool) == 0


def test_what_waits_behind_a_gap_goes_in_the_end() -> None:
    ledger = Ledger()
    gapped = ledger.sign(ALICE, pay(), ahead=1)
    body = structs.replace(gapped.body, valid_until=2**40)
    pool = Mempool()
    assert pool.add(ledger.state, sign(ALICE, body)) is None
    ledger.skip(KEPT_BLOCKS - 1)
    pool.prune(ledger.state, ())
    assert len(pool) == 1
    ledger.skip(1)
    pool.prune(ledger.state, ())
    assert len(pool) == 0


def test_an_old_nonce_goes_with_the_block_that_used_it() -> None:
    ledger = Ledger()
    pool, (left, other) = filled(ledger, ((ALICE, pay(1)), 0, 0), ((BOB, pay(1)), 0, 0))
    ledger.one(ALICE, pay(2))
    pool.prune(ledger.state, {ALICE.account})
    assert left.tx_id not in pool
    assert list(pool) == [other]


@pytest.mark.parametrize("senders", [1, 10])
def test_a_block_is_chosen_without_looking_at_everything(senders: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, pool = Ledger(), Mempool()
    for key in KEYS[:senders]:
        for ahead in range(200 // senders):
            assert pool.add(ledger.state, ledger.sign(key, pay(), ahead)) is None
    looked = 0

    def counted(*arguments: Any) -> Reason | None:
        nonlocal looked
        looked += 1
        return check_envelope(*arguments)

    monkeypatch.setattr("chain.mempool.check_envelope", counted)
    assert len(pool.select(ledger.state, ROOMY, 10)) == 10
    assert looked <= 11


def test_what_is_selected_makes_a_valid_block_even_when_money_runs_out() -> None:
    ledger = Ledger()
    pool, sent = filled(
        ledger,
        ((ALICE, Bond(BALANCE - 10)), 0, 5),
        ((ALICE, pay()), 1, 5),
        ((ALICE, pay()), 2, 5),
    )
    chosen = pool.select(ledger.state, ROOMY, 100)
    assert chosen == tuple(sent[:2])
    with pytest.raises(InvalidBlock):
        Ledger().execute(tuple(sent))
    assert {receipt.reason for receipt in ledger.execute(chosen).receipts} == {"", Reason.NO_FUNDS}


def test_a_duty_of_somebody_who_may_owe_none_is_not_selected() -> None:
    ledger = Ledger(genesis_of(min_fee_per_byte=1))
    ledger.execute((ledger.sign(ALICE, Bond(2000), fee=1000),))
    pool = Mempool()
    duty = ledger.sign(ALICE, Commit((Commitment(bytes(32), 0, bytes(32)),)))
    assert pool.add(ledger.state, duty) is None
    assert pool.select(ledger.state, ROOMY, 100) == (duty,)
    assert pool.select(Ledger(genesis_of(min_fee_per_byte=1)).state, ROOMY, 100) == ()
