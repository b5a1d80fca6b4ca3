"""The hash onion, the seed and the draws."""

from collections import Counter

import pytest

from chain.blocks import ValidatorSet
from chain.hashing import digest
from chain.keys import PrivateKey
from chain.randomness import Onion, chance, leader, onion_of, peel, uniform, weighted_draw

SEED = digest("test seed")


def names(weights: list[int]) -> list[tuple[bytes, int]]:
    return [(bytes([i]) * 32, weight) for i, weight in enumerate(weights)]


def test_reveals_open_the_tip_one_after_another() -> None:
    onion = Onion(b"secret", 1000)
    tip = onion.tip
    for used in range(1000):
        assert onion.reveal(used) == onion.below(tip)
        assert peel(onion.reveal(used)) == tip
        tip = onion.reveal(used)
    with pytest.raises(LookupError):
        onion.below(tip)
    with pytest.raises(IndexError):
        onion.reveal(1000)
    with pytest.raises(LookupError):
        onion.below(bytes(32))


def test_onions_of_other_keys_differ() -> None:
    first, second = (onion_of(PrivateKey(bytes([i]) * 32)) for i in (1, 2))
    assert first.tip != second.tip
    assert onion_of(PrivateKey(bytes([1]) * 32)).tip == first.tip


def test_draw_is_by_weight_without_replacement_and_ignores_order() -> None:
    candidates = names([1, 0, 5, 3])
    everything = weighted_draw(candidates, SEED, 9)
    assert sorted(everything) == sorted(name for name, weight in candidates if weight)
    assert weighted_draw(candidates[::-1], SEED, 9) == everything
    assert weighted_draw(candidates, SEED, 2) == everything[:2]
    assert weighted_draw([], SEED, 2) == ()
    first = Counter(weighted_draw(candidates, digest("s", bytes([i // 256, i % 256])), 1)[0] for i in range(3000))
    assert abs(first[candidates[2][0]] / 3000 - 5 / 9) < 0.04
    assert abs(first[candidates[0][0]] / 3000 - 1 / 9) < 0.03


def test_nobody_leads_twice_before_everyone_has_led() -> None:
    validators = ValidatorSet.of(names([1, 50, 3, 4, 9]))
    for lap in range(3):
        led = [leader(validators, SEED, 7, 1 + lap * 5 + view) for view in range(5)]
        assert sorted(led) == [account for account, _ in validators.members]
    assert leader(validators, SEED, 7, 2**31) in validators
    orders = {tuple(leader(validators, SEED, height, view) for view in range(1, 6)) for height in range(40)}
    assert len(orders) > 5


def test_first_leaders_follow_the_stake() -> None:
    validators = ValidatorSet.of(names([1, 9]))
    led = Counter(leader(validators, SEED, height, 1) for height in range(2000))
    assert abs(led[bytes([1]) * 32] / 2000 - 0.9) < 0.03


def test_chance_has_its_probability() -> None:
    assert not any(chance(SEED, bytes([i]), 0) for i in range(100))
    assert all(chance(SEED, bytes([i]), 10_000) for i in range(100))
    hits = sum(chance(SEED, i.to_bytes(2, "big"), 1000) for i in range(5000))
    assert abs(hits / 5000 - 0.1) < 0.015


def test_uniform_stays_below_its_bound() -> None:
    assert {uniform(digest("u", bytes([i])), 3) for i in range(60)} == {0, 1, 2}
