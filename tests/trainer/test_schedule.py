import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer import schedule

WEIGHTS = st.dictionaries(st.text("abcdef", min_size=1, max_size=3), st.floats(0.01, 100), min_size=1, max_size=6)


@given(st.integers(0, 64), WEIGHTS)
def test_shares_are_whole_and_within_one_of_the_quota(count: int, weights: dict[str, float]) -> None:
    shares = schedule.apportion(count, weights)
    total = sum(weights.values())
    assert sum(shares.values()) == count
    assert all(abs(shares[p] - count * w / total) < 1 + 1e-6 for p, w in weights.items())


def test_shares_by_largest_remainder() -> None:
    assert schedule.apportion(8, {"a": 10.0, "b": 1.0}) == {"a": 7, "b": 1}
    assert schedule.apportion(3, {"b": 1.0, "a": 1.0}) == {"a": 2, "b": 1}


def test_no_peers_or_no_weight_is_an_error() -> None:
    with pytest.raises(ValueError, match="positive"):
        schedule.apportion(3, {})
    with pytest.raises(ValueError, match="positive"):
        schedule.apportion(3, {"a": 0.0})


@given(st.integers(1, 64), WEIGHTS)
def test_interleaving_keeps_the_shares(count: int, weights: dict[str, float]) -> None:
    shares = schedule.apportion(count, weights)
    order = schedule.interleave(shares)
    assert {p: order.count(p) for p in shares} == shares


def test_interleaving_spreads() -> None:
    assert schedule.interleave({"a": 4, "b": 2}) == ("a", "b", "a", "a", "b", "a")


def test_routes_name_one_peer_a_stage() -> None:
    assert schedule.plan_routes(4, [{"a": 1.0, "b": 1.0}, {"c": 3.0, "d": 1.0}]) == (
        ("a", "c"),
        ("b", "c"),
        ("a", "d"),
        ("b", "c"),
    )


def test_a_substitute_is_the_one_who_finishes_first() -> None:
    weights = {"a": 1.0, "b": 1.0, "c": 4.0}
    assert schedule.substitute({"a": 1, "b": 0, "c": 1}, weights, ()) == "c"
    assert schedule.substitute({"a": 1, "b": 0, "c": 9}, weights, ["b"]) == "a"
    assert schedule.substitute({}, weights, ["a", "b", "c"]) is None


def test_the_window_shrinks_toward_the_last_stage() -> None:
    assert [schedule.in_flight_limit(i, 3) for i in range(3)] == [4, 3, 1]
