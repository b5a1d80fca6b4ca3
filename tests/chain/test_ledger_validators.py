"""How the set changes: bounded from epoch to epoch, at once for cause, never to nothing; the next onion."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from chain.ledger import execute
from chain.ledger.validators import _moved
from chain.randomness import next_seed, onion_of
from chain.reasons import InvalidBlock, Reason
from chain.state import State
from chain.transactions import Bond, RegisterValidator, Transfer, Unbond
from tests.chain.ledger_kit import KEYS, ONIONS, STAKE, Ledger, genesis_of
from tests.chain.test_ledger_accounts import equivocation

NEWCOMER = KEYS[7]
EPOCH = 4


def ledger_of(validators: int = 4, **params: int) -> Ledger:
    return Ledger(genesis_of(validators=validators, others=8 - validators, epoch_blocks=EPOCH, **params))


def join(ledger: Ledger, stake: int = STAKE) -> None:
    registered = (NEWCOMER, RegisterValidator(ONIONS[NEWCOMER.account].tip))
    assert ledger.block(registered, (NEWCOMER, Bond(stake))) == ("", "")


def powers(ledger: Ledger, epochs: int) -> list[int]:
    """Return the newcomer's power, epoch by epoch; within an epoch it does not change."""
    found = []
    for _ in range(epochs):
        while (ledger.state.height + 1) % EPOCH:
            before = ledger.state.validators()
            ledger.skip(1)
            assert ledger.state.validators() == before
        ledger.skip(1)
        found.append(ledger.state.validators().power(NEWCOMER.account))
    return found


def test_a_newcomer_waits_an_epoch_and_then_gains_power_within_the_churn_limit() -> None:
    ledger = ledger_of()
    ledger.skip(EPOCH + 1)
    join(ledger, 2 * STAKE)
    assert powers(ledger, 4) == [0, STAKE, 2 * STAKE, 2 * STAKE]


def test_one_validator_may_become_two() -> None:
    ledger = ledger_of(validators=1)
    join(ledger)
    found = powers(ledger, 12)
    assert found[0] == 0
    assert found[-1] == STAKE
    assert all(later - earlier <= (STAKE + earlier) // 4 for earlier, later in pairwise(found))


def test_who_leaves_counts_until_the_limit_lets_it_go() -> None:
    ledger = ledger_of(validators=2, churn_share=1000)
    leaving = KEYS[0]
    assert ledger.one(leaving, Unbond(STAKE)) == ""
    left = []
    for _ in range(12):
        ledger.skip(EPOCH)
        left.append(ledger.state.validators().power(leaving.account))
    assert left[0] == STAKE - 2 * STAKE // 10
    assert left == sorted(left, reverse=True)
    assert left[-1] == 0
    assert len(ledger.state.validators()) == 1


def test_stake_below_the_least_gives_no_power() -> None:
    ledger = ledger_of(min_stake=5000)
    join(ledger, 4999)
    assert powers(ledger, 4) == [0] * 4
    assert ledger.one(NEWCOMER, Bond(1)) == ""
    assert powers(ledger, 2)[-1] == 5000


@given(
    st.dictionaries(
        st.binary(min_size=1, max_size=1), st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)), min_size=1
    ),
    st.integers(1, 10**6),
)
def test_power_moves_toward_stake_and_never_beyond_the_limit(wishes: dict[bytes, tuple[int, int]], limit: int) -> None:
    before = {account: power for account, (power, _) in wishes.items()}
    moved = before | _moved(before, {account: target for account, (_, target) in wishes.items() if target}, limit)
    assert moved.keys() == wishes.keys()
    assert sum(abs(moved[account] - power) for account, (power, _) in wishes.items()) <= limit
    for account, (power, target) in wishes.items():
        assert min(power, target) <= moved[account] <= max(power, target)
    if any(power for power, _ in wishes.values()):
        assert any(moved.values())
        if moved == before:
            done = all(power == target for power, target in wishes.values())
            assert done or not any(target for _, target in wishes.values())


def test_a_new_onion_is_in_force_after_a_whole_epoch() -> None:
    ledger = ledger_of(validators=1)
    key = KEYS[0]
    following = onion_of(key, 1)
    ledger.skip(1)
    assert ledger.one(key, RegisterValidator(following.tip)) == ""
    while ledger.state.validator(key.account).onion == 0:  # type: ignore[union-attr]
        ledger.skip(1)
    assert ledger.state.height == 2 * EPOCH
    latest = ledger.blocks[-1][0]

    def after_reveal(reveal: bytes) -> State:
        timestamp, seed = latest.timestamp + 1000, next_seed(ledger.state.seed, reveal)
        context = structs.replace(latest, height=latest.height + 1, timestamp=timestamp, reveal=reveal, seed=seed)
        return execute(ledger.state, context, ()).state

    with pytest.raises(InvalidBlock, match=Reason.WRONG_REVEAL):
        after_reveal(ONIONS[key.account].below(latest.reveal))
    reveal = following.below(following.tip)
    after = after_reveal(reveal)
    assert after.validator(key.account).onion_tip == reveal  # type: ignore[union-attr]


def test_the_last_validator_is_never_tombstoned() -> None:
    ledger = ledger_of(validators=1)
    assert ledger.one(NEWCOMER, equivocation(KEYS[0], ledger)) == Reason.LAST_VALIDATOR
    assert ledger.one(KEYS[0], Transfer(NEWCOMER.account, 1)) == ""
