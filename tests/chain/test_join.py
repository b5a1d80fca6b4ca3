"""Joining by snapshot: verified from the genesis or from a trusted block, from hostile servers too."""

import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar, cast

import pytest
import trio
import trio.testing
from msgspec import structs

from chain import engine_serve, snapshots
from chain.blocks import VerifiedSignatures
from chain.codec import DecodeError, encode
from chain.engine import ChainEngine
from chain.engine_blocks import Tip
from chain.engine_files import Files
from chain.engine_gate import ACCEPTED, Disposition
from chain.engine_join import Join, JoinConfig
from chain.engine_peers import Peers
from chain.engine_serve import SNAPSHOT_EPOCHS, Server
from chain.engine_threads import Threads
from chain.genesis import Genesis
from chain.light import LightBlock, Trust, decode_light_block
from chain.snapshots import Chunk, decode_chunk
from chain.state import State, genesis_state
from chain.sync import (
    NOTHING,
    ChunkRequest,
    LightRequest,
    RangeRequest,
    SnapshotInfo,
    SnapshotRequest,
    StatusRequest,
    SyncRequest,
    decode_range,
    decode_request,
)
from chain.transactions import Transfer
from tests.chain.hub import CONFIG, Hub, Link, genesis_of, keys, running, until_height

MEMBERS = keys(5)
LATE = MEMBERS[4]
EPOCH = 2
INTERVAL = SNAPSHOT_EPOCHS * EPOCH
GENESIS = genesis_of(MEMBERS[:4], [*keys(60)[4:]], epoch_blocks=EPOCH, unbonding_blocks=5000)
CHAIN = GENESIS.chain_id
T = TypeVar("T")
Twist = Callable[[SyncRequest, bytes], bytes]


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "CHUNK_BYTES", 1024)


@dataclass
class Hostile:
    """A peer on the hub that changes what an honest one would serve."""

    engine: ChainEngine
    twist: Twist

    def deliver(self, topic: str, sender: str, data: bytes) -> Disposition:
        return ACCEPTED

    async def serve(self, sender: str, data: bytes) -> bytes:
        answer = self.twist(decode_request(data, CHAIN), await self.engine.serve(sender, data))
        if answer == b"silence":
            await trio.sleep_forever()
        return answer


@dataclass
class Dripping(Hostile):
    """A peer that answers everybody who joins, truly and as late as it may."""

    twist: Twist = field(default=lambda _, answer: answer)

    async def serve(self, sender: str, data: bytes) -> bytes:
        if isinstance(decode_request(data, CHAIN), SnapshotRequest | LightRequest | ChunkRequest):
            await trio.sleep(9.0)
        return await super().serve(sender, data)


@asynccontextmanager
async def grown(hub: Hub, folder: Path, height: int, genesis: Genesis = GENESIS) -> AsyncIterator[list[ChainEngine]]:
    """Run four validators with a chain of some height."""
    async with AsyncExitStack() as stack:
        engines = [
            await stack.enter_async_context(running(hub, folder / str(i), genesis, key))
            for i, key in enumerate(MEMBERS[:4])
        ]
        await until_height(engines[0], height)
        hub.config = replace(CONFIG, snapshot=True)
        yield engines


async def follows(late: ChainEngine, engines: list[ChainEngine], base: int) -> None:
    """Check that the joiner has a chain from `base` on and takes part."""
    with trio.fail_after(90):
        await until_height(late, engines[0].state.height)
    assert late.reader.store.base == base
    assert late.reader.store.block(base - 1) is None
    assert late.status()["joining"] is None
    height = late.state.height
    assert (await late.receipt(await late.submit(Transfer(MEMBERS[0].account, 5)))).ok
    with trio.fail_after(90):
        await until_height(late, height + 3)
        await until_height(engines[0], late.state.height)
    found, known = late.reader.store.block(height), engines[0].reader.store.block(height)
    assert found is not None
    assert known is not None
    assert found[0].hash == known[0].hash


async def test_an_empty_store_takes_the_newest_snapshot_and_goes_on(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    hub = Hub()
    async with grown(hub, tmp_path, 2 * INTERVAL + 3) as engines:
        start = trio.current_time()
        async with running(hub, tmp_path / "late", GENESIS, LATE) as late:
            await follows(late, engines, 2 * INTERVAL)
            assert trio.current_time() - start < 60
        async with running(hub, tmp_path / "late", GENESIS, LATE) as late:
            assert late.state.height > 2 * INTERVAL
            height = late.state.height
            with trio.fail_after(60):
                await until_height(late, height + 2)
    assert hub.penalized == []
    assert hub.refused == []


async def test_the_joiner_serves_what_it_took(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    hub = Hub()
    async with grown(hub, tmp_path, INTERVAL + 3) as engines, running(hub, tmp_path / "a", GENESIS, LATE) as first:
        await follows(first, engines, INTERVAL)
        hub.group = {name: 1 for name, engine in hub.engines.items() if engine in engines}
        async with running(hub, tmp_path / "b", GENESIS, MEMBERS[0], name="second") as second:
            with trio.fail_after(60):
                await until_height(second, first.state.height)
            assert second.reader.store.base == INTERVAL
        async with running(hub, tmp_path / "c", GENESIS, MEMBERS[0], name="third") as third:
            hub.config = CONFIG
            await trio.sleep(60)
            assert third.state.height in (0, *range(INTERVAL, 10 * INTERVAL))


@pytest.mark.parametrize("below", [False, True])
async def test_a_trusted_block_above_or_below_the_snapshot(
    *, below: bool, tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    hub = Hub()
    async with grown(hub, tmp_path, 2 * INTERVAL + 5) as engines:
        height = INTERVAL if below else 2 * INTERVAL + 3
        found = engines[0].reader.store.block(height)
        assert found is not None
        hub.config = replace(hub.config, trust=Trust(height, found[0].hash))
        async with running(hub, tmp_path / "late", GENESIS, LATE) as late:
            await follows(late, engines, 2 * INTERVAL)
        hub.config = replace(hub.config, trust=Trust(height, bytes(32)))
        async with running(hub, tmp_path / "wary", GENESIS, LATE) as wary:
            await trio.sleep(60)
            assert wary.state.height == 0
    assert {reason.split(" ")[0] for _, reason in hub.penalized} == {"wrong-block:"}


async def test_what_is_too_old_to_trust_is_fetched_block_by_block_and_said(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    hub = Hub()
    genesis = genesis_of(MEMBERS[:4], MEMBERS[4:], epoch_blocks=EPOCH, unbonding_blocks=100)
    async with (
        grown(hub, tmp_path, INTERVAL + 3, genesis) as engines,
        running(hub, tmp_path / "late", genesis, LATE) as late,
    ):
        with trio.fail_after(60):
            await until_height(late, engines[0].state.height)
        assert "--trust HEIGHT:HASH" in str(late.status()["joining"])
        assert late.reader.store.base == 1


async def test_without_snapshots_the_chain_is_fetched_from_its_first_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    monkeypatch.setattr(Server, "keep", lambda self, tips: None)
    hub = Hub()
    async with grown(hub, tmp_path, 5) as engines, running(hub, tmp_path / "late", GENESIS, LATE) as late:
        with trio.fail_after(90):
            await until_height(late, engines[0].state.height)
        assert late.reader.store.base == 1


async def test_a_young_chain_serves_the_state_of_its_newest_epoch(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    hub = Hub()
    async with grown(hub, tmp_path, 3 * EPOCH + 1) as engines:
        async with running(hub, tmp_path / "late", GENESIS, LATE) as late:
            await follows(late, engines, 3 * EPOCH)
        await until_height(engines[0], 2 * INTERVAL + EPOCH)
        assert sorted(engines[0]._server._states) == [INTERVAL, 2 * INTERVAL]


def _chunk(change: Callable[[Chunk], Chunk]) -> Twist:
    def twist(request: SyncRequest, answer: bytes) -> bytes:
        if not isinstance(request, ChunkRequest) or answer == NOTHING:
            return answer
        return encode(change(decode_chunk(answer)))

    return twist


def _light(change: Callable[[LightBlock], LightBlock]) -> Twist:
    def twist(request: SyncRequest, answer: bytes) -> bytes:
        return encode(change(decode_light_block(answer))) if isinstance(request, LightRequest) else answer

    return twist


def _answer(kind: type[SyncRequest], answer: bytes) -> Twist:
    return lambda request, honest: answer if isinstance(request, kind) else honest


def _richer(chunk: Chunk) -> Chunk:
    rows = tuple(structs.replace(row, value=row.value[:-1] + b"\x07") for row in chunk.rows)
    return structs.replace(chunk, rows=rows)


def _without_certificate(request: SyncRequest, answer: bytes) -> bytes:
    if not isinstance(request, RangeRequest):
        return answer
    try:
        finals = decode_range(answer)
    except DecodeError:
        return answer
    changed = (structs.replace(final, block=structs.replace(final.block, parent_certificate=None)) for final in finals)
    return encode((tuple(changed),))


ATTACKS: dict[str, tuple[Twist, set[str]]] = {
    "a changed row": (_chunk(_richer), {"wrong-chunk"}),
    "a missing row": (_chunk(lambda c: structs.replace(c, rows=c.rows[1:])), {"wrong-chunk"}),
    "a row twice": (_chunk(lambda c: structs.replace(c, rows=(*c.rows, *c.rows[-1:]))), {"wrong-chunk"}),
    "rows reversed": (_chunk(lambda c: structs.replace(c, rows=c.rows[::-1])), {"wrong-chunk"}),
    "no siblings": (_chunk(lambda c: structs.replace(c, siblings=())), {"wrong-chunk"}),
    "another place": (_chunk(lambda c: structs.replace(c, index=c.index ^ 1)), {"wrong-chunk"}),
    "junk for a chunk": (_answer(ChunkRequest, b"\xc1" * 999), {"malformed"}),
    "a large answer": (_answer(ChunkRequest, bytes(5 << 20)), {"malformed"}),
    "nothing for a chunk": (_answer(ChunkRequest, NOTHING), {"empty-answer"}),
    "silence for a chunk": (_answer(ChunkRequest, b"silence"), {"stalled"}),
    "a false height": (_answer(SnapshotRequest, encode(SnapshotInfo(10**12, 3))), set()),
    "a false depth": (
        _answer(SnapshotRequest, encode(SnapshotInfo(2 * INTERVAL, 16))),
        {"empty-answer"},
    ),
    "junk for an offer": (_answer(SnapshotRequest, b"\xc1"), {"malformed"}),
    "another header": (
        _light(lambda b: structs.replace(b, header=structs.replace(b.header, state_root=bytes(32)))),
        {"wrong-block"},
    ),
    "another set": (
        _light(
            lambda b: structs.replace(b, validators=structs.replace(b.validators, members=b.validators.members[:1]))
        ),
        {"wrong-validators"},
    ),
    "a light block cut short": (
        lambda request, answer: answer[:-9] if isinstance(request, LightRequest) else answer,
        {"malformed"},
    ),
    "another body": (_without_certificate, {"wrong-block"}),
}


@pytest.fixture(scope="module")
def old_homes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the homes of four validators whose chain ends at a snapshot."""
    folder = tmp_path_factory.mktemp("old")

    async def grow() -> None:
        async with grown(Hub(), folder, 2 * INTERVAL) as engines:
            for engine in engines:
                await until_height(engine, 2 * INTERVAL)

    trio.run(grow, clock=trio.testing.MockClock(autojump_threshold=0))
    return folder


@asynccontextmanager
async def regrown(hub: Hub, old: Path, folder: Path) -> AsyncIterator[list[ChainEngine]]:
    """Run the four validators again, after the time that their chain took."""
    await trio.sleep(10 * INTERVAL + 60)
    shutil.copytree(old, folder, dirs_exist_ok=True)
    async with AsyncExitStack() as stack:
        engines = []
        for i, key in enumerate(MEMBERS[:4]):
            engine = await stack.enter_async_context(running(hub, folder / str(i), GENESIS, key))
            engine._server.keep([engine._core.tip])
            engines.append(engine)
        hub.config = replace(CONFIG, snapshot=True)
        yield engines


@pytest.mark.parametrize("attack", ATTACKS)
async def test_one_honest_server_among_hostile_ones_is_enough(
    attack: str, old_homes: Path, tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    hub = Hub()
    twist, reasons = ATTACKS[attack]
    async with regrown(hub, old_homes, tmp_path):
        honest, *others = hub.engines
        for name in others:
            hub.engines[name] = Hostile(hub.engines[name], twist)  # type: ignore[assignment]
        hub.group = {honest: 1}
        async with running(hub, tmp_path / "late", GENESIS, LATE) as late:
            await trio.sleep(5)
            assert late.state.height == 0
            hub.group = {}
            with trio.fail_after(120):
                while late.state.height < 2 * INTERVAL:
                    await trio.sleep(1)
            assert late.reader.store.base == 2 * INTERVAL
            assert reasons & late._peers.faults.keys() == reasons
            assert all(peer != honest for peer, _ in hub.penalized)


async def test_offers_that_come_to_nothing_end_in_fetching_every_block(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    hub = Hub()
    async with grown(hub, tmp_path, INTERVAL + 1):
        silent = _answer(ChunkRequest, b"silence")
        hub.engines = {name: Hostile(engine, silent) for name, engine in hub.engines.items()}  # type: ignore[misc]
        async with running(hub, tmp_path / "late", GENESIS, LATE) as late:
            with trio.fail_after(800):
                await until_height(late, INTERVAL)
            assert late.reader.store.base == 1


async def test_servers_that_drip_do_not_hold_a_join_for_longer_than_the_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    hub = Hub()
    monkeypatch.setattr("chain.engine_join.LONGEST_SECONDS", 20.0)
    async with grown(hub, tmp_path, INTERVAL + 1) as engines:
        hub.engines = {name: Dripping(engine) for name, engine in hub.engines.items()}  # type: ignore[misc]
        async with running(hub, tmp_path / "late", GENESIS, LATE) as late:
            await trio.sleep(15)
            assert late.state.height == 0
            with trio.fail_after(20):
                await until_height(late, 1)
            assert late.status()["joining"] is None
            await until_height(late, engines[0].state.height)
            assert late.reader.store.base == 1


async def test_a_join_waits_for_peers(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    hub = Hub()
    async with grown(hub, tmp_path, INTERVAL + 1) as engines:
        hub.group = dict.fromkeys(hub.engines, 1)
        async with running(hub, tmp_path / "late", GENESIS, LATE) as late:
            await trio.sleep(200)
            hub.group = {}
            with trio.fail_after(60):
                await until_height(late, engines[0].state.height)
            assert late.reader.store.base >= INTERVAL


async def test_an_interrupted_join_begins_anew(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    hub = Hub()
    async with grown(hub, tmp_path, INTERVAL + 3) as engines:
        names = dict(hub.engines)
        served = 0

        def few(request: SyncRequest, answer: bytes) -> bytes:
            nonlocal served
            served += isinstance(request, ChunkRequest)
            return b"silence" if served > 3 and not isinstance(request, StatusRequest) else answer

        hub.engines = {name: Hostile(engine, few) for name, engine in names.items()}  # type: ignore[misc]
        async with running(hub, tmp_path / "late", GENESIS, LATE) as late:
            await trio.sleep(5)
            assert late.state.height == 0
            assert "chunks are here" in str(late.status()["joining"])
        hub.engines = names
        async with running(hub, tmp_path / "late", GENESIS, LATE) as late:
            await follows(late, engines, INTERVAL)


class _Slow(Threads):
    async def compute(self, work: Callable[[], T], *, is_large: bool = True) -> T:
        await trio.sleep(1)
        return work()


async def test_many_who_ask_at_once_have_the_state_cut_once(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuts: list[int] = []

    def cut(state: State) -> snapshots.Snapshot:
        cuts.append(state.height)
        return snapshots.Snapshot(state)

    monkeypatch.setattr(engine_serve, "Snapshot", cut)
    tip = Tip(CHAIN, genesis_state(GENESIS))
    server = Server(cast(Files, None), _Slow(offload=False), lambda: tip)
    server.keep([tip])
    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(server._snapshot, 0)
    assert cuts == [0]


async def test_a_joiner_whose_clock_is_behind_bans_nobody(
    old_homes: Path, tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    hub = Hub()
    async with regrown(hub, old_homes, tmp_path) as engines:
        peers = Peers(Link(hub, "late"), 5.0)
        begin, verify = (lambda: GENESIS.timestamp), VerifiedSignatures()
        config = JoinConfig(peers, GENESIS, None, verify, Threads(offload=False), begin, lambda _: None, lambda: True)
        with trio.move_on_after(10):
            await Join(config).fetch()
        assert len(peers.connected()) == len(engines)
        with trio.fail_after(200):
            while len(peers.usable()) < len(engines):
                await trio.sleep(1)
    assert hub.penalized == []
