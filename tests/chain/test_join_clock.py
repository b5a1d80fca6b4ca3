"""Joining by snapshot with a clock that is behind, and servers that offer slowly."""

from dataclasses import replace
from pathlib import Path

import pytest
import trio
import trio.testing

from chain.engine_gate import ACCEPTED, Disposition
from chain.sync import SnapshotRequest, decode_request
from tests.chain.hub import CONFIG, Hub, clock_ms, running, until_height
from tests.chain.test_join import CHAIN, GENESIS, INTERVAL, LATE, Dripping, grown


async def test_a_joiner_whose_clock_is_behind_says_by_how_much_and_gives_up_at_once(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    hub = Hub()
    async with grown(hub, tmp_path, INTERVAL + 3) as engines:
        hub.config = replace(CONFIG, snapshot=True, clock_ms=lambda: clock_ms() - 3_600_000)
        async with running(hub, tmp_path / "late", GENESIS, LATE, validate=False) as late:
            with trio.fail_after(20):
                await until_height(late, engines[0].state.height)
            assert late.reader.store.base == 1
            said = late.status()["joining"]
            assert said.endswith("The chain is fetched block by block instead.")
            ahead = int(said.partition(" is ")[2].partition(" ")[0])
            assert 3_500 < ahead <= 3_600
    assert hub.penalized == []


class SlowToOffer(Dripping):
    """A peer that says late that it has no snapshot."""

    def deliver(self, topic: str, sender: str, data: bytes) -> Disposition:
        return ACCEPTED

    async def serve(self, sender: str, data: bytes) -> bytes:
        if isinstance(decode_request(data, CHAIN), SnapshotRequest):
            await trio.sleep_forever()
        return await self.engine.serve(sender, data)


async def test_offers_count_towards_the_bound_of_a_join(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    hub = Hub()
    monkeypatch.setattr("chain.engine_join.LONGEST_SECONDS", 4.0)
    async with grown(hub, tmp_path, INTERVAL + 1):
        hub.engines = {name: SlowToOffer(engine) for name, engine in hub.engines.items()}  # type: ignore[misc]
        async with running(hub, tmp_path / "late", GENESIS, LATE) as late:
            with trio.fail_after(9):
                await until_height(late, 1)
