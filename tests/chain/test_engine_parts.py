"""The engine's pure parts: pace, own transactions, gossip batches."""

from typing import cast

import pytest
from msgspec import structs

from chain.blocks import ValidatorSet
from chain.codec import encode
from chain.engine_blocks import LARGE_BLOCK, is_heavy
from chain.engine_gate import ACCEPTED, SILENCE_SECONDS, UNEXPLAINED_SECONDS, Action, Gate, halted_reason
from chain.engine_outbox import MAX_RENEWALS, REGOSSIP_SECONDS, VALIDITY_BLOCKS, Outbox, Position
from chain.engine_pace import Pace
from chain.engine_seam import SubmitRefused, TransactionExpired
from chain.engine_transactions import BATCH, BATCH_BYTES, Transactions, pack
from chain.evidence import Watch
from chain.keys import PrivateKey, verify
from chain.ledger import Executed
from chain.state import Marker, Rows, State, Table, genesis_state
from chain.transactions import SubmitClaims, Transaction, Transfer, sign
from tests.chain.hub import genesis_of, keys, take

KEY = PrivateKey(bytes([7]) * 32)
CHAIN = b"c" * 32
PAY = Transfer(bytes(32), 1)


def nonces(outbox: Outbox) -> list[int]:
    return [own.transaction.body.nonce for own in outbox._pending]


def test_pace_waits_for_the_heartbeat_or_the_interval() -> None:
    pace = Pace(interval=1.0, heartbeat=5.0, standstill=3.0)
    pace.begin(0.0, pending=False)
    assert pace.due == 0.0
    pace.proposed(0.2)
    pace.begin(0.5, pending=False)
    assert pace.due == 5.2
    assert pace.hurry(0.7)
    assert pace.due == 1.2
    assert not pace.hurry(0.8)
    pace.proposed(1.2)
    pace.begin(1.4, pending=True)
    assert pace.due == 2.2


def test_a_block_with_few_transactions_and_much_due_leaves_the_event_loop() -> None:
    state = genesis_state(genesis_of(keys(4), []))
    few, many = (cast("list[Transaction]", [None] * count) for count in (1, LARGE_BLOCK))
    assert not is_heavy(state, few)
    assert is_heavy(state, many)
    for table, height, heavy in ((Table.WAKE, 1, True), (Table.WAKE, 2, False), (Table.QUEUE, 5, True)):
        key = height.to_bytes(32, "big") + bytes(33)
        due = State(state.tables | {table: Rows({key: Marker()})}, state.tree)
        assert is_heavy(due, few) == heavy


def test_a_wait_is_explained_by_silence_and_a_long_one_in_any_case() -> None:
    """Validators that wait repeat themselves, so who repeats them for one that is gone cannot be told apart."""
    members = [key.account for key in keys(4)]
    validators = ValidatorSet.of((account, 1) for account in members)
    gate = Gate(CHAIN, verify, Watch(verify))
    gate.heard = dict.fromkeys(members, 100.0)
    assert halted_reason(gate, validators, None, 100.0, 20.0) is None
    said = halted_reason(gate, validators, None, 100.0, UNEXPLAINED_SECONDS)
    assert said is not None
    assert "no block has become final for 90 seconds although" in said
    said = halted_reason(gate, validators, members[0], 100.0 + SILENCE_SECONDS, 20.0)
    assert said is not None
    assert "75 % of the stake are silent" in said


def test_the_first_view_lasts_from_when_the_block_is_due() -> None:
    pace = Pace(interval=1.0, heartbeat=5.0, standstill=3.0)
    pace.begin(0.0, pending=False)
    pace.proposed(0.0)
    pace.begin(0.1, pending=False)
    pace.enter(1, 2.0, 0.1)
    assert pace.expired(6.9) is None
    assert pace.expired(7.0) == 1
    assert pace.expired(8.0) is None
    pace.enter(2, 3.0, 7.0)
    assert pace.view_deadline == 10.0


def test_standstill_comes_again_and_again_but_not_while_waiting_for_the_heartbeat() -> None:
    pace = Pace(interval=1.0, heartbeat=5.0, standstill=3.0)
    pace.begin(0.0, pending=False)
    pace.proposed(0.0)
    pace.begin(0.0, pending=False)
    assert [pace.is_still(now) for now in (7.9, 8.0, 10.0, 11.0)] == [False, True, False, True]


def test_own_transactions_take_consecutive_nonces_and_are_gossiped_again() -> None:
    outbox = Outbox(KEY, CHAIN)
    for _ in range(3):
        outbox.add(PAY, Position(0, 5, 0))
    assert nonces(outbox) == [5, 6, 7]
    assert len(outbox.to_gossip(0.0)) == 3
    assert outbox.to_gossip(1.0) == []
    assert outbox.next_gossip() == REGOSSIP_SECONDS
    assert len(outbox.to_gossip(REGOSSIP_SECONDS)) == 3
    assert all(own.transaction.is_signed() for own in outbox._pending)


def test_an_included_transaction_is_settled_under_any_of_its_names() -> None:
    outbox = Outbox(KEY, CHAIN)
    own = outbox.add(PAY, Position(0, 0, 0))
    outbox.renew(Position(VALIDITY_BLOCKS, 0, 0))
    assert len(own.names) == 2
    assert outbox.settle([own.names[0], b"other"]) == [own]
    assert nonces(outbox) == []


def test_an_expired_transaction_keeps_its_nonce_and_an_overtaken_one_gets_the_next() -> None:
    outbox = Outbox(KEY, CHAIN)
    for height in (0, 0, 50):
        outbox.add(PAY, Position(height, 0, 0))
    renewed, lost = outbox.renew(Position(VALIDITY_BLOCKS, 1, 0))
    assert (nonces(outbox), len(renewed), lost) == ([3, 1, 2], 2, [])
    assert outbox.renew(Position(VALIDITY_BLOCKS, 1, 0)) == ([], [])


def test_two_overtaken_transactions_get_different_nonces() -> None:
    outbox = Outbox(KEY, CHAIN)
    for _ in range(3):
        outbox.add(PAY, Position(0, 0, 0))
    outbox.renew(Position(1, 2, 0))
    assert nonces(outbox) == [3, 4, 2]


def test_a_transaction_is_given_up_after_some_renewals() -> None:
    outbox = Outbox(KEY, CHAIN)
    own = outbox.add(PAY, Position(0, 0, 0))
    for round_ in range(1, MAX_RENEWALS + 1):
        assert outbox.renew(Position(round_ * VALIDITY_BLOCKS, 0, 0)) == ([own], [])
    assert outbox.renew(Position(99 * VALIDITY_BLOCKS, 0, 0)) == ([], [own])


def test_fees_cover_the_size_and_duties_pay_none() -> None:
    outbox = Outbox(KEY, CHAIN)
    own = outbox.add(PAY, Position(0, 0, 3))
    assert own.transaction.body.fee >= 3 * len(encode(own.transaction))
    duty = outbox.add(SubmitClaims(()), Position(0, 0, 3))
    assert duty.transaction.body.fee == 0


def test_gossip_batches_are_bounded() -> None:
    transaction = Outbox(KEY, CHAIN).add(PAY, Position(0, 0, 0)).transaction
    batches = list(pack([transaction] * (2 * BATCH + 1)))
    assert len(batches) == 3
    assert all(len(batch) <= BATCH_BYTES + 1024 for batch in batches)
    assert list(pack([])) == []


async def test_gossip_takes_the_new_ignores_the_known_and_rejects_the_false() -> None:
    members = keys(2)
    genesis = genesis_of(members, [])
    state = genesis_state(genesis)
    sender = Transactions(members[0], genesis.chain_id)
    receiver = Transactions(None, genesis.chain_id)
    sender.submit(Transfer(members[1].account, 5), state)
    (batch,) = sender.to_gossip(0.0)
    assert await take(receiver, batch, state) == ACCEPTED
    assert (await take(receiver, batch, state)).reason == "known"
    body = sender.select(state)[0].body
    forged = sign(members[1], body)
    false = {
        "malformed": b"\x91\xc4\x00",
        "bad-signature": encode((encode(forged),)),
        "wrong-chain": encode((encode(sign(members[0], structs.replace(body, chain_id=bytes(32)))),)),
    }
    for reason, data in false.items():
        answer = await take(receiver, data, state)
        assert (answer.action, answer.reason) == (Action.REJECT, reason)
    late = encode((encode(sign(members[0], structs.replace(body, nonce=10_000))),))
    assert (await take(receiver, late, state)).action == Action.IGNORE
    assert len(receiver.select(state)) == 1


def test_receipts_of_own_transactions() -> None:
    members = keys(1)
    genesis = genesis_of(members, [])
    state = genesis_state(genesis)
    own = Transactions(members[0], genesis.chain_id)
    name = own.submit(Transfer(bytes(32), 5), state)
    assert own.answer(name) is None
    with pytest.raises(LookupError):
        own.answer(bytes(32))
    with pytest.raises(SubmitRefused):
        Transactions(None, genesis.chain_id).submit(PAY, state)
    block = type("Block", (), {"transactions": own.select(state)})()
    far = structs.replace(state.chain, height=VALIDITY_BLOCKS)
    for round_ in range(1, MAX_RENEWALS + 2):
        far = structs.replace(far, height=round_ * VALIDITY_BLOCKS)
        tables = state.tables | {Table.CHAIN: {b"": far}}
        own.adopt(block, Executed(type(state)(tables, state.tree), (), ()))
    with pytest.raises(TransactionExpired):
        own.answer(name)
