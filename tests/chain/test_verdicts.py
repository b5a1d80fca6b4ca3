"""Sketches compared: thresholds, infinities, ballots, quorum."""

import math
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chain.params import Params
from chain.records import Voter
from chain.transactions import SKETCH_BYTES, Reveal
from chain.verdicts import Ballot, ballot, deviations, is_fraud, is_match, quorum, tally

PARAMS = Params()
TRUE = struct.pack("<96f", *([1.0] * 96))


def scaled(y: float = 1.0, gx: float = 1.0, gw: float = 1.0) -> bytes:
    return struct.pack("<96f", *([y] * 32), *([gx] * 32), *([gw] * 32))


def reveal(sketch: bytes, contradiction: bool = False) -> Reveal:
    return Reveal(bytes(32), 2, bytes(32), sketch, sketch, contradiction)


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
    assert is_fraud(deviations(false, TRUE), PARAMS)


def test_equal_bytes_agree_whatever_they_are() -> None:
    assert deviations(b"\xff" * SKETCH_BYTES, b"\xff" * SKETCH_BYTES) == (0.0, 0.0, 0.0)


def test_something_against_nothing_deviates() -> None:
    assert is_fraud(deviations(TRUE, bytes(SKETCH_BYTES)), PARAMS)
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

    assert is_match(found(0.99), PARAMS)
    assert not is_match(found(1.01), PARAMS)
    assert not is_fraud(found(99.0), PARAMS)
    assert is_fraud(found(101.0), PARAMS)


@pytest.mark.parametrize(
    ("opened", "audited", "own", "contradiction", "said"),
    [
        (TRUE, TRUE, TRUE, False, Ballot.AGAINST_NEITHER),
        (scaled(2), TRUE, TRUE, False, Ballot.AGAINST_WORKER),
        (TRUE, scaled(2), TRUE, False, Ballot.AGAINST_AUDITOR),
        (scaled(3), scaled(2), TRUE, False, Ballot.AGAINST_BOTH),
        (TRUE, TRUE, TRUE, True, Ballot.AGAINST_WORKER),
        (scaled(1.0001), TRUE, TRUE, False, Ballot.AGAINST_NEITHER),
    ],
)
def test_what_a_ballot_says(opened: bytes, audited: bytes, own: bytes, contradiction: bool, said: Ballot) -> None:
    assert ballot(reveal(own, contradiction), opened, audited, PARAMS) == said


def test_the_stake_of_revealed_ballots_is_counted() -> None:
    voters = [
        Voter(b"a" * 32, 5, said=tuple(Ballot).index(Ballot.AGAINST_WORKER)),
        Voter(b"b" * 32, 7, said=tuple(Ballot).index(Ballot.AGAINST_AUDITOR)),
        Voter(b"c" * 32, 11),
    ]
    assert tally(voters) == {Ballot.AGAINST_WORKER: 5, Ballot.AGAINST_AUDITOR: 7}


@pytest.mark.parametrize(("total", "least"), [(1, 1), (2, 2), (3, 3), (4, 3), (6, 5), (100, 67)])
def test_a_quorum_is_more_than_two_thirds(total: int, least: int) -> None:
    assert quorum(total) == least
    assert 3 * least > 2 * total
