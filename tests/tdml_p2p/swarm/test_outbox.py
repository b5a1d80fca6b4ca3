"""The outbox sends what is owed in few transactions, and goes on when the ledger refuses one."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from chain.engine import SubmitRefused
from chain.reasons import Reason
from chain.transactions import Claim, Commit, Commitment, Open, Opening, Payload, Reveal, RevealAll, SubmitClaims, Trace
from tdml_p2p.swarm.outbox import Entry, Outbox

HASH = bytes(32)


def commitment(number: int) -> Commitment:
    return Commitment(number.to_bytes(32, "big"), 0, HASH)


def claim(number: int) -> Claim:
    return Claim(HASH, 0, number, 0, (0,), HASH, HASH, HASH)


def opening(number: int) -> Opening:
    trace = Trace(x=HASH, y=HASH, gy=HASH, gx=HASH, gw=HASH, boundaries=HASH, state=HASH)
    return Opening(number.to_bytes(32, "big"), HASH, trace, (), bytes(384))


def reveal(number: int) -> Reveal:
    return Reveal(number.to_bytes(32, "big"), 0, HASH, bytes(384), bytes(384), False, False)


class Ledger:
    """Takes payloads, with the time at which they came; refuses as often as `refusals` says, in order."""

    def __init__(self, *refusals: str) -> None:
        self.payloads: list[Payload] = []
        self.times: list[float] = []
        self.refusals = list(refusals)

    async def submit(self, payload: Payload) -> bytes:
        await trio.lowlevel.checkpoint()
        if self.refusals and (reason := self.refusals.pop(0)):
            raise SubmitRefused(reason)
        self.payloads.append(payload)
        self.times.append(trio.current_time())
        return HASH

    def entries(self) -> list[Entry]:
        return [entry for payload in self.payloads for entry in entries_of(payload)]


def entries_of(payload: Payload) -> tuple[Entry, ...]:
    if isinstance(payload, SubmitClaims):
        return payload.claims
    assert isinstance(payload, Commit | Open | RevealAll)
    return payload.entries


@asynccontextmanager
async def running(ledger: Ledger) -> AsyncIterator[Outbox]:
    outbox = Outbox(ledger.submit)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(outbox.run)
        yield outbox
        nursery.cancel_scope.cancel()


async def test_entries_of_a_tenth_of_a_second_go_out_kind_by_kind(autojump_clock: trio.testing.MockClock) -> None:
    ledger = Ledger()
    entries: list[Entry] = [commitment(1), claim(1), reveal(1), opening(1), commitment(2), claim(2)]
    async with running(ledger) as outbox:
        start = trio.current_time()
        for entry in entries:
            outbox.put(entry)
            await trio.sleep(0.01)
        await trio.sleep(1)
    assert [type(payload) for payload in ledger.payloads] == [SubmitClaims, Commit, Open, RevealAll]
    assert [len(entries_of(payload)) for payload in ledger.payloads] == [2, 2, 1, 1]
    assert ledger.times == pytest.approx([start + 0.1] * 4)


MAKERS: list[tuple[Callable[[int], Entry], int]] = [(claim, 16), (commitment, 32), (opening, 16), (reveal, 16)]


@pytest.mark.parametrize(("make", "most"), MAKERS)
async def test_a_transaction_carries_no_more_than_it_may(
    make: "Callable[[int], Entry]", most: int, autojump_clock: trio.testing.MockClock
) -> None:
    ledger = Ledger()
    entries = [make(number) for number in range(2 * most + 1)]
    async with running(ledger) as outbox:
        for entry in entries:
            outbox.put(entry)
        await trio.sleep(1)
    assert [len(entries_of(payload)) for payload in ledger.payloads] == [most, most, 1]
    assert ledger.entries() == entries


@pytest.mark.parametrize("make", [make for make, _ in MAKERS])
async def test_what_is_refused_takes_nothing_else_along(
    make: "Callable[[int], Entry]", autojump_clock: trio.testing.MockClock
) -> None:
    ledger, bad = Ledger(), make(2)

    async def submit(payload: Payload) -> bytes:
        if bad in entries_of(payload):
            raise SubmitRefused(Reason.WRONG_STATE)
        return await ledger.submit(payload)

    outbox = Outbox(submit)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(outbox.run)
        for number in range(4):
            outbox.put(make(number))
        await trio.sleep(10)
        nursery.cancel_scope.cancel()
    assert ledger.entries() == [make(0), make(1), make(3)]


async def test_nothing_is_sent_while_nothing_is_owed(autojump_clock: trio.testing.MockClock) -> None:
    ledger = Ledger()
    async with running(ledger) as outbox:
        outbox.put(claim(1))
        await trio.sleep(100)
        assert len(ledger.payloads) == 1
        outbox.put(claim(2))
        await trio.sleep(100)
    assert ledger.entries() == [claim(1), claim(2)]


async def test_entries_put_while_a_batch_is_being_sent_are_not_lost(autojump_clock: trio.testing.MockClock) -> None:
    ledger = Ledger()

    async def submit_slowly(payload: Payload) -> bytes:
        await trio.sleep(5)
        return await ledger.submit(payload)

    outbox = Outbox(submit_slowly)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(outbox.run)
        outbox.put(claim(1))
        await trio.sleep(2)
        outbox.put(claim(2))
        await trio.sleep(20)
        nursery.cancel_scope.cancel()
    assert ledger.entries() == [claim(1), claim(2)]


@pytest.mark.parametrize("reason", [Reason.MEMPOOL_FULL, Reason.WRONG_NONCE])
async def test_what_the_ledger_has_no_room_for_now_is_sent_later(
    reason: Reason, autojump_clock: trio.testing.MockClock
) -> None:
    ledger = Ledger(reason, "", reason)
    async with running(ledger) as outbox:
        outbox.put(claim(1))
        outbox.put(commitment(1))
        await trio.sleep(30)
    assert sorted(map(str, ledger.entries())) == sorted(map(str, [claim(1), commitment(1)]))


@pytest.mark.parametrize("reason", [Reason.NOT_OWED, Reason.NO_FUNDS])
async def test_what_is_not_owed_any_more_is_dropped_and_the_rest_goes_on(
    reason: Reason, autojump_clock: trio.testing.MockClock
) -> None:
    ledger = Ledger(reason)
    async with running(ledger) as outbox:
        outbox.put(claim(1))
        outbox.put(commitment(1))
        await trio.sleep(30)
        outbox.put(claim(2))
        await trio.sleep(30)
    assert ledger.entries() == [commitment(1), claim(2)]
