"""Sketches compared: thresholds, infinities, ballots, quorum."""

import math
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from chain.params import Params
from chain.records import Voter
from chain.transactions import SKETCH_BYTES, Reveal
from chain.verdicts import (
    BLANK,
    Ballot,
    ballot,
    decided,
    deviations,
    is_fraud,
    is_match,
    limits_for,
    quorum,
    step_ballot,
    tally,
)

PARAMS = Params()
LIMITS = limits_for(PARAMS)
TRUE = struct.pack("<96f", *([1.0] * 96))


def scaled(y: float = 1.0, gx: float = 1.0, gw: float = 1.0) -> bytes:
    return struct.pack("<96f", *([y] * 32), *([gx] * 32), *([gw] * 32))


def reveal(sketch: bytes, contradiction: bool = False, missing: bool = False) -> Reveal:
    return Reveal(bytes(32), 2, bytes(32), sketch, sketch, contradiction, missing)


def test_the_deviation_is_the_relative_distance_per_tensor() -> None:
    assert deviations(TRUE, TRUE) == (0.0, 0.0, 0.0)
    assert deviations(scaled(1.5, 0.5, -1.0), TRUE) == pytest.approx((0.5, 0.5, 2.0))
    assert deviations(scaled(2.0), scaled(4.0)) == pytest.approx((0.5, 0.0, 0.0))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_deviates_infinitely(bad: float) -> None:
    values = [1.0] * 96
    values[40] = bad
    false = struct.pack("<96f", *values)
    assert deviations(false, TRUE) == (0.0, math.inf, 0.0)
    assert deviations(TRUE, false) == (0.0, math.inf, 0.0)
    assert is_fraud(deviations(false, TRUE), LIMITS)


def test_equal_bytes_agree_whatever_they_are() -> None:
    assert deviations(b"\xff" * SKETCH_BYTES, b"\xff" * SKETCH_BYTES) == (0.0, 0.0, 0.0)


def test_something_against_nothing_deviates() -> None:
    assert is_fraud(deviations(TRUE, bytes(SKETCH_BYTES)), LIMITS)
    assert deviations(bytes(SKETCH_BYTES), TRUE) == (1.0, 1.0, 1.0)


@given(st.binary(min_size=SKETCH_BYTES, max_size=SKETCH_BYTES), st.binary(min_size=SKETCH_BYTES, max_size=SKETCH_BYTES))
@settings(max_examples=50, deadline=None)
def test_any_bytes_compare_to_numbers_that_are_not_nan(first: bytes, second: bytes) -> None:
    for value in deviations(first, second):
        assert value >= 0


@pytest.mark.parametrize(
    ("tensor", "tau"),
    [("y", 2.5e-6), ("gx", 2.7e-5), ("gw", 3.5e-5)],
)
def test_thresholds_are_tau_and_a_hundred_tau(tensor: str, tau: float) -> None:
    def found(factor: float) -> tuple[float, float, float]:
        return tuple(factor * tau if name == tensor else 0.0 for name in ("y", "gx", "gw"))  # type: ignore[return-value]

    assert is_match(found(0.99), LIMITS)
    assert not is_match(found(1.01), LIMITS)
    assert not is_fraud(found(99.0), LIMITS)
    assert is_fraud(found(101.0), LIMITS)


@pytest.mark.parametrize(
    ("opened", "audited", "own", "contradiction", "said"),
    [
        (TRUE, TRUE, TRUE, False, Ballot.AGAINST_NEITHER),
        (scaled(2), TRUE, TRUE, False, Ballot.AGAINST_WORKER),
        (TRUE, scaled(2), TRUE, False, Ballot.AGAINST_AUDITOR),
        (scaled(3), scaled(2), TRUE, False, Ballot.AGAINST_BOTH),
        (TRUE, TRUE, TRUE, True, Ballot.AGAINST_WORKER),
        (scaled(1.0001), TRUE, TRUE, False, Ballot.SMALL_DEVIATION),
        (scaled(1.000001), TRUE, TRUE, False, Ballot.AGAINST_NEITHER),
    ],
)
def test_what_a_ballot_says(opened: bytes, audited: bytes, own: bytes, contradiction: bool, said: Ballot) -> None:
    assert ballot(reveal(own, contradiction), opened, reveal(audited), PARAMS) == said


def test_the_stake_of_revealed_ballots_is_counted() -> None:
    voters = [
        Voter(b"a" * 32, 5, said=tuple(Ballot).index(Ballot.AGAINST_WORKER)),
        Voter(b"b" * 32, 7, said=tuple(Ballot).index(Ballot.AGAINST_AUDITOR)),
        Voter(b"c" * 32, 11),
    ]
    assert tally(voters) == {
        Ballot.AGAINST_WORKER: 5,
        Ballot.AGAINST_AUDITOR: 7,
        Ballot.DATA_MISSING: 5,
        Ballot.SMALL_DEVIATION: 5,
        Ballot.AUDITOR_MISLED: 0,
        Ballot.AGAINST_NEITHER: 0,
    }


def test_missing_data_counts_where_the_results_say_nothing_worse() -> None:
    told = reveal(TRUE, missing=True)
    assert ballot(told, TRUE, reveal(TRUE), PARAMS) == Ballot.DATA_MISSING
    assert ballot(told, scaled(1.0001), reveal(TRUE), PARAMS) == Ballot.DATA_MISSING
    assert ballot(told, scaled(2), reveal(TRUE), PARAMS) == Ballot.AGAINST_WORKER
    assert ballot(told, TRUE, reveal(scaled(2)), PARAMS) == Ballot.AGAINST_AUDITOR


def test_who_had_nothing_to_compute_on_has_no_opinion_and_is_not_judged() -> None:
    blank = reveal(bytes(384), missing=True)
    assert ballot(blank, scaled(2), reveal(TRUE), PARAMS) == Ballot.DATA_MISSING
    assert ballot(reveal(TRUE), TRUE, blank, PARAMS) == Ballot.AGAINST_NEITHER
    assert ballot(reveal(TRUE), scaled(2), blank, PARAMS) == Ballot.AGAINST_WORKER
    silent = reveal(bytes(384))  # zeros without the word that something is missing are a false sketch
    assert ballot(reveal(TRUE), TRUE, silent, PARAMS) == Ballot.AGAINST_AUDITOR


@pytest.mark.parametrize(
    ("told", "opened", "audited", "said"),
    [
        (reveal(TRUE), TRUE, reveal(TRUE), Ballot.AGAINST_NEITHER),
        (reveal(TRUE), scaled(1.00001), reveal(TRUE), Ballot.AGAINST_WORKER),
        (reveal(TRUE, contradiction=True), TRUE, reveal(TRUE), Ballot.AGAINST_WORKER),
        (reveal(TRUE), TRUE, reveal(scaled(2)), Ballot.AGAINST_AUDITOR),
        (reveal(TRUE), TRUE, reveal(bytes(384), missing=True), Ballot.AGAINST_NEITHER),
        (reveal(bytes(384), missing=True), TRUE, reveal(TRUE), Ballot.DATA_MISSING),
        (reveal(TRUE, contradiction=True), scaled(2), reveal(scaled(3)), Ballot.AGAINST_BOTH),
    ],
)
def test_what_a_ballot_on_a_step_says(told: Reveal, opened: bytes, audited: Reveal, said: Ballot) -> None:
    assert step_ballot(told, opened, audited, PARAMS) == said


def test_who_finds_the_worse_backs_the_milder_too() -> None:
    said = (Ballot.AGAINST_WORKER, Ballot.AGAINST_BOTH, Ballot.DATA_MISSING, Ballot.SMALL_DEVIATION)
    voters = [Voter(bytes([i]) * 32, 10**i, said=tuple(Ballot).index(one)) for i, one in enumerate(said)]
    behind = tally(voters)
    assert [behind[one] for one in Ballot if one is not Ballot.AGAINST_BOTH] == [11, 10, 0, 111, 1111, 0]


def voter(ballot: Ballot | None, power: int = 1) -> Voter:
    return Voter(bytes(32), power, said=None if ballot is None else tuple(Ballot).index(ballot))


W, A, BOTH, NEITHER, MISSING, SMALL, MISLED = (
    Ballot.AGAINST_WORKER,
    Ballot.AGAINST_AUDITOR,
    Ballot.AGAINST_BOTH,
    Ballot.AGAINST_NEITHER,
    Ballot.DATA_MISSING,
    Ballot.SMALL_DEVIATION,
    Ballot.AUDITOR_MISLED,
)


@pytest.mark.parametrize(
    ("votes", "accuser", "power", "verdict"),
    [
        ([W] * 7 + [A] * 2, W, 1, W),
        ([W] * 6 + [A] * 3, W, 1, W),  # a third of the voters, less of the whole
        ([W] * 6 + [A] * 3, W, 0, None),  # an accuser that is no validator
        ([W] * 6 + [A] * 3, NEITHER, 1, None),
        ([W] * 5 + [A] * 4, W, 1, None),
        ([W] * 5 + [A] * 5, W, 90, None),  # never without most of the voters
        ([], W, 5, None),
        ([W], W, 1, W),
        ([A], W, 1, A),
        ([A] * 6 + [W] * 3, NEITHER, 1, None),  # never in the accuser's favour
        ([A] * 7 + [W] * 2, W, 1, A),
        ([BOTH] * 6 + [A] * 3, W, 1, A),  # nor where its own result is found false
        ([W] * 6 + [MISSING] * 3, W, 1, W),  # nobody makes a verdict milder with a third of the voters
        ([W] * 6 + [MISSING] * 3, W, 0, MISSING),
        ([MISSING] * 6 + [NEITHER] * 3, MISSING, 1, MISSING),
        ([MISSING] * 6 + [NEITHER] * 3, W, 1, MISSING),
        ([MISSING] * 6 + [NEITHER] * 3, SMALL, 1, SMALL),
        ([SMALL] * 6 + [NEITHER] * 3, SMALL, 1, SMALL),
        ([NEITHER] * 6 + [W] * 3, W, 1, None),
        ([NEITHER] * 6 + [W] * 3, NEITHER, 1, None),
        ([W] * 6 + [None] * 3, W, 1, W),
        ([MISLED] * 7 + [A] * 2, W, 1, MISLED),
        ([MISLED] * 4 + [NEITHER] * 3 + [A] * 2, W, 1, NEITHER),
        ([MISLED] * 6 + [A] * 3, W, 1, None),
        ([MISLED] * 2 + [A] * 7, W, 1, A),
        ([MISLED] * 2 + [W] * 7, W, 1, W),
    ],
)
def test_the_accuser_s_stake_counts_with_most_of_the_voters(
    votes: list[Ballot | None], accuser: Ballot, power: int, verdict: Ballot | None
) -> None:
    assert decided([voter(one) for one in votes], voter(accuser, power)) == verdict


@given(
    st.lists(st.tuples(st.sampled_from([None, *Ballot]), st.integers(1, 100)), max_size=9),
    st.sampled_from([W, NEITHER, MISSING, SMALL]),
    st.integers(0, 100),
)
def test_no_verdict_is_without_most_of_the_voters_and_two_thirds_with_the_accuser(
    votes: list[tuple[Ballot | None, int]], accuser: Ballot, power: int
) -> None:
    voters = [voter(one, weight) for one, weight in votes]
    verdict, total = decided(voters, voter(accuser, power)), sum(weight for _, weight in votes)
    if verdict is not None:
        behind = tally(voters)[verdict]
        assert 2 * behind > total
        assert 3 * (behind + power) > 2 * total


def test_who_was_given_other_inputs_than_were_opened_says_nothing_of_the_auditor() -> None:
    told = reveal(BLANK, contradiction=True)
    assert ballot(told, TRUE, reveal(TRUE), PARAMS) == Ballot.AGAINST_WORKER
    assert ballot(told, TRUE, reveal(scaled(2)), PARAMS) == Ballot.AGAINST_WORKER
    assert ballot(reveal(scaled(3), contradiction=True), TRUE, reveal(TRUE), PARAMS) == Ballot.AGAINST_BOTH


@pytest.mark.parametrize(
    ("opened", "audited", "said"),
    [
        (TRUE, scaled(2), Ballot.AUDITOR_MISLED),
        (TRUE, TRUE, Ballot.AUDITOR_MISLED),
        (scaled(3), scaled(2), Ballot.AGAINST_WORKER),
        (scaled(1.0001), scaled(2), Ballot.SMALL_DEVIATION),
    ],
)
def test_an_auditor_that_was_given_other_inputs_is_not_judged_and_the_worker_is(
    opened: bytes, audited: bytes, said: Ballot
) -> None:
    told = structs.replace(reveal(TRUE), misled=True)
    assert ballot(told, opened, reveal(audited, contradiction=True), PARAMS) == said


@pytest.mark.parametrize(("total", "least"), [(1, 1), (2, 2), (3, 3), (4, 3), (6, 5), (100, 67)])
def test_a_quorum_is_more_than_two_thirds(total: int, least: int) -> None:
    assert quorum(total) == least
    assert 3 * least > 2 * total
