"""Parameters by stake vote: two thirds of the active power, at an epoch, within bounds that no vote breaks."""

from typing import Any

import pytest
from msgspec.structs import replace

from chain.blocks import MAX_BLOCK_BYTES, MAX_CERTIFICATE_BYTES, MAX_TRANSACTIONS
from chain.bounds import LEAST_BLOCK_BYTES, MOST, problem, vote_problem
from chain.consensus import Timers
from chain.engine_blocks import Tip
from chain.engine_core import Core, CoreConfig, Restored
from chain.keys import peer_id, verify
from chain.ledger import InvalidBlock, check_envelope
from chain.params import Params
from chain.reasons import Reason
from chain.transactions import MAX_TRANSACTION_BYTES, Bond, Transfer, Unbond, VoteParams
from chain.views import standing_votes
from tests.chain.ledger_kit import BALANCE, KEYS, STAKE, Ledger, genesis_of, start_swarm

EPOCH = 4
ALICE = KEYS[7]


def network(validators: int = 4, **params: Any) -> Ledger:
    return Ledger(genesis_of(validators, 9 - validators, epoch_blocks=EPOCH, **params))


def wish(ledger: Ledger, **changes: Any) -> VoteParams:
    return VoteParams(replace(ledger.state.params, **changes))


def next_epoch(ledger: Ledger) -> None:
    ledger.skip(EPOCH - ledger.state.height % EPOCH)


def test_more_than_two_thirds_of_the_power_change_a_parameter_as_an_epoch_begins() -> None:
    ledger = network()
    vote = wish(ledger, lease_blocks=77)
    assert ledger.block((KEYS[0], vote), (KEYS[1], vote)) == ("", "")
    next_epoch(ledger)
    assert ledger.state.params.lease_blocks == 120
    assert ledger.one(KEYS[2], vote) == ""
    assert ledger.state.params.lease_blocks == 120
    next_epoch(ledger)
    assert ledger.state.params == vote.params
    assert ledger.happened("params-changed") == [{"changes": {"lease_blocks": 77}}]


def test_two_thirds_are_not_more_than_two_thirds() -> None:
    ledger = network(3)
    vote = wish(ledger, lease_blocks=77)
    assert ledger.block((KEYS[0], vote), (KEYS[1], vote)) == ("", "")
    next_epoch(ledger)
    assert ledger.state.params.lease_blocks == 120


def test_votes_count_by_power_and_only_for_the_very_same_parameters() -> None:
    ledger = network()
    assert ledger.one(KEYS[0], Bond(9 * STAKE)) == ""
    while ledger.state.validators().power(KEYS[0].account) < 10 * STAKE:
        ledger.skip(1)
    assert ledger.block((KEYS[1], wish(ledger, redraws=1)), (KEYS[0], wish(ledger, redraws=1, lease_blocks=9)))
    next_epoch(ledger)
    assert (ledger.state.params.redraws, ledger.state.params.lease_blocks) == (1, 9)


def test_one_standing_vote_a_validator_which_can_be_changed_and_taken_back() -> None:
    ledger = network()
    first, second = wish(ledger, redraws=1), wish(ledger, redraws=3)
    assert ledger.block(*((key, first) for key in KEYS[:2])) == ("", "")
    assert ledger.block((KEYS[0], second), (KEYS[2], first)) == ("", "")
    next_epoch(ledger)
    assert ledger.state.params.redraws == 2
    assert ledger.one(KEYS[1], wish(ledger)) == ""
    assert ledger.state.validator(KEYS[1].account).wish is None  # type: ignore[union-attr]
    assert ledger.block((KEYS[1], second), (KEYS[2], second)) == ("", "")
    next_epoch(ledger)
    assert ledger.state.params.redraws == 3


def test_a_change_ends_all_votes() -> None:
    ledger = network()
    vote, other = wish(ledger, redraws=1), wish(ledger, redraws=3)
    assert set(ledger.block(*((key, vote) for key in KEYS[:3]), (KEYS[3], other))) == {""}
    next_epoch(ledger)
    assert ledger.state.params.redraws == 1
    assert all(ledger.state.validator(key.account).wish is None for key in KEYS[:4])  # type: ignore[union-attr]


def test_who_is_not_in_the_set_has_no_vote() -> None:
    ledger = network()
    assert ledger.one(ALICE, wish(ledger, redraws=1)) == Reason.NOT_A_VALIDATOR
    vote = wish(ledger, redraws=1)
    assert set(ledger.block(*((key, vote) for key in KEYS[:2]))) == {""}
    for key in KEYS[:2]:
        assert ledger.one(key, Unbond(STAKE)) == ""
    while len(ledger.state.validators()) > 2:
        ledger.skip(1)
    assert ledger.one(KEYS[2], vote) == ""
    next_epoch(ledger)
    next_epoch(ledger)
    assert ledger.state.params.redraws == 2
    assert ledger.one(KEYS[0], vote) == Reason.NOT_A_VALIDATOR
    assert ledger.state.validator(KEYS[0].account).wish is None  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "changes",
    [
        {"jail_missed": 101},
        {"jail_window": 79},
        {"heartbeat_ms": 999},
        {"max_block_bytes": LEAST_BLOCK_BYTES - 1},
        {"tau": (0, 27_000, 35_000)},
        {"unbonding_blocks": 199_999},
        {"block_interval_ms": 999},
        {"unbonding_blocks": 199_999, "block_interval_ms": 2000},
        {"tau": (24, 27_000, 35_000)},
        {"fraud_factor": 1, "tau": (2499, 27_000, 35_000)},
        *({name: most + 1} for name, most in MOST.items()),
    ],
)
def test_no_vote_breaks_a_bound(changes: dict[str, Any]) -> None:
    ledger = network()
    assert ledger.one(KEYS[0], wish(ledger, **changes)) == Reason.BAD_PARAMS
    assert ledger.state.validator(KEYS[0].account).wish is None  # type: ignore[union-attr]


@pytest.mark.parametrize("is_too_much", [False, True])
def test_no_vote_takes_the_stake_of_a_quorum_away(is_too_much: bool) -> None:
    ledger = network()
    stakes = [ledger.state.account(key.account).bonded for key in KEYS[:4]]
    vote = wish(ledger, min_stake=min(stakes) + is_too_much)
    assert ledger.block(*((key, vote) for key in KEYS[:4])) == ("", "", "", "")
    next_epoch(ledger)
    assert (ledger.state.params == vote.params) is not is_too_much
    next_epoch(ledger)
    assert len(ledger.state.validators()) == 4


def test_bounds_leave_room_for_what_runs_and_fit_what_blocks_may_hold() -> None:
    assert problem(Params()) is None
    assert vote_problem(Params(), replace(Params(), unbonding_blocks=400_000, block_interval_ms=500)) is None
    assert MOST["max_block_bytes"] + MAX_CERTIFICATE_BYTES + 1024 <= MAX_BLOCK_BYTES
    assert MOST["max_block_transactions"] <= MAX_TRANSACTIONS
    assert LEAST_BLOCK_BYTES >= MAX_TRANSACTION_BYTES


def test_no_fee_can_price_votes_out() -> None:
    ledger = network()
    vote = wish(ledger, min_fee_per_byte=MOST["min_fee_per_byte"])
    assert set(ledger.block(*((key, vote) for key in KEYS[:4]))) == {""}
    next_epoch(ledger)
    assert check_envelope(ledger.state, ledger.sign(ALICE, Transfer(KEYS[0].account, 1)), 9) == Reason.LOW_FEE
    vote = wish(ledger, min_fee_per_byte=0)
    assert set(ledger.block(*((key, vote) for key in KEYS[:4]))) == {""}
    next_epoch(ledger)
    assert ledger.state.params.min_fee_per_byte == 0


def test_what_was_promised_by_height_stays() -> None:
    ledger = network(unbonding_blocks=20)
    assert ledger.block((ALICE, Bond(1000)), (ALICE, Unbond(1000))) == ("", "")
    (before,) = ledger.state.tables[4].values()  # type: ignore[index]
    vote = wish(ledger, unbonding_blocks=1000, epoch_blocks=7)
    assert set(ledger.block(*((key, vote) for key in KEYS[:4]))) == {""}
    next_epoch(ledger)
    assert ledger.state.params.unbonding_blocks == 1000
    (after,) = ledger.state.tables[4].values()  # type: ignore[index]
    assert after == before
    seeds = {ledger.state.leader_seed}
    ledger.skip(7 - ledger.state.height % 7)
    assert ledger.state.height % 7 == 0
    assert {ledger.state.leader_seed} != seeds


def test_a_task_under_way_survives_every_window_being_changed() -> None:
    swarm = start_swarm(Ledger(genesis_of(epoch_blocks=EPOCH)), audit_rate=10_000)
    ledger = swarm.ledger
    windows = ("draw_delay", "claim_window", "commit_window", "open_window", "reveal_window", "vote_window")
    for size in (2, 60, 3, 20):
        swarm.work(3)
        vote = wish(ledger, **dict.fromkeys((*windows, "history_blocks", "absence_blocks", "max_drawn_cells"), size))
        assert set(ledger.block(*((key, vote) for key in KEYS[:6]))) == {""}
        swarm.work(EPOCH)
        assert ledger.state.params.claim_window == size
    swarm.work(150)
    assert swarm.settled == 8
    assert not ledger.happened("slashed")
    assert sum(ledger.state.account(key.account).balance for key in KEYS) >= 9 * BALANCE - 10**6


def test_a_block_that_is_larger_than_the_new_limit_is_judged_by_the_limit_it_was_built_under() -> None:
    ledger = network(max_block_transactions=4)
    vote = wish(ledger, max_block_transactions=3)
    assert set(ledger.block(*((key, vote) for key in KEYS[:4]))) == {""}
    ledger.skip(2)
    assert set(ledger.block(*((key, Transfer(ALICE.account, 1)) for key in KEYS[:4]))) == {""}
    assert ledger.state.params.max_block_transactions == 3
    with pytest.raises(InvalidBlock, match=Reason.TOO_MANY):
        ledger.block(*((key, Transfer(ALICE.account, 1)) for key in KEYS[:4]))


def test_standing_votes_are_shown_with_the_power_behind_them() -> None:
    ledger = network()
    vote = wish(ledger, redraws=1, tau=(2500, 27_000, 40_000))
    assert set(ledger.block(*((key, vote) for key in KEYS[:2]))) == {""}
    assert standing_votes(ledger.state) == [
        {
            "changes": {"redraws": 1, "tau": [2500, 27_000, 40_000]},
            "power": str(2 * STAKE),
            "needed": str(8 * STAKE // 3 + 1),
            "validators": [peer_id(account) for account in sorted(key.account for key in KEYS[:2])],
        }
    ]
    next_epoch(ledger)
    assert len(standing_votes(ledger.state)) == 1


def test_the_engine_keeps_the_pace_that_a_vote_has_set() -> None:
    ledger = network()
    core = Core(CoreConfig(None, Timers(), 3.0, verify), Tip(ledger.genesis.chain_id, ledger.state))
    vote = wish(ledger, block_interval_ms=1500, heartbeat_ms=9000)
    assert set(ledger.block(*((key, vote) for key in KEYS[:4]))) == {""}
    next_epoch(ledger)
    core.tip = Tip(ledger.genesis.chain_id, ledger.state)
    core.begin(0.0, Restored(), pending=False)
    assert (core.pace.interval, core.pace.heartbeat) == (1.5, 9.0)
