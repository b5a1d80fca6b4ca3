"""What is asked of whom while catching up: every height in the end, and never too much at once."""

from random import Random

import pytest

from chain.engine_ranges import (
    HEDGE_SECONDS,
    MAX_BUFFERED_BYTES,
    MAX_OPEN,
    SYNC_RANGE,
    Batch,
    Lease,
    Ranges,
)
from tests.chain.test_sync import chain_of

LONG = chain_of(400)


def test_what_waits_is_bounded() -> None:
    ranges, big = Ranges(1), Batch("p", tuple(LONG[SYNC_RANGE : 2 * SYNC_RANGE]), MAX_BUFFERED_BYTES)
    head = ranges.lease(1, 10**6, 0.0)
    second = ranges.lease(1, 10**6, 0.0)
    assert head == Lease(1, SYNC_RANGE)
    assert second == Lease(SYNC_RANGE + 1, 2 * SYNC_RANGE)
    ranges.put(second, big)
    assert ranges.lease(1, 10**6, 0.0) is None
    assert ranges.lease(1, 10**6, HEDGE_SECONDS) == head
    ranges.give_back(head)
    assert ranges.lease(1, 10**6, 0.0) == head
    count = 0
    ranges = Ranges(1)
    while ranges.lease(1, 10**6, 0.0) is not None:
        count += 1
    assert count == MAX_OPEN


@pytest.mark.parametrize("seed", range(20))
def test_every_height_is_asked_until_it_is_committed(seed: int) -> None:
    """Whatever is lost, cut short, refused or finalized elsewhere, the ranges end at the target."""
    dice, ranges, target, tip = Random(seed), Ranges(1), 400, 0
    leases: list[Lease] = []
    for _ in range(3000):
        if tip >= target:
            break
        lease = ranges.lease(1, target, 0.0)
        if lease is not None:
            leases.append(lease)
        chance = dice.random()
        if chance < 0.1 and leases:
            ranges.give_back(leases.pop())
        elif chance < 0.2:
            ranges.drop("p")
        elif chance < 0.3:
            tip = min(target, tip + 3)
            ranges.advance(tip)
        elif leases:
            done = leases.pop(dice.randrange(len(leases)))
            served = tuple(LONG[done.first - 1 : done.first - 1 + dice.randint(1, done.count)])
            ranges.put(done, Batch("p", served, 1))
        batch = ranges.take()
        if batch is not None:
            assert batch.finals[0].block.height == tip + 1
            tip = batch.finals[-1].block.height
            ranges.advance(tip)
    assert tip == target
