"""What a store keeps of the past: earlier states, pruned blocks, older schemas."""

import shutil
import sqlite3
import tracemalloc
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import pytest

from chain import store as stores
from chain import store_schema
from chain.engine_files import Files
from chain.replay import replay
from chain.store import Store, StoreCorrupt
from chain.sync import RANGE_BYTES
from chain.transactions import Transfer
from tests.chain.ledger_kit import KEYS, Ledger, genesis_of, start_swarm
from tests.chain.store_kit import final_blocks, write

BOB = KEYS[7].account


@pytest.fixture
def swarm_ledger() -> Ledger:
    swarm = start_swarm(Ledger(genesis_of(history_blocks=5)))
    swarm.work(14)
    return swarm.ledger


def test_every_earlier_state_can_be_had_again(swarm_ledger: Ledger, tmp_path: Path) -> None:
    blocks = list(final_blocks(swarm_ledger))
    with closing(write(swarm_ledger, tmp_path / "chain.db")) as store:
        for block, _, _, executed in blocks:
            state = store.state_at(block.height, swarm_ledger.state)
            assert state.tables == executed.state.tables
            assert state.root == executed.state.root
        for height in (0, len(blocks) + 1):
            with pytest.raises(LookupError, match=f"height {height} is not kept"):
                store.state_at(height, swarm_ledger.state)


def test_an_earlier_state_is_had_from_one_that_is_not_the_newest_any_more(
    swarm_ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = list(final_blocks(swarm_ledger))[-3][3].state
    with closing(write(swarm_ledger, tmp_path / "chain.db")) as store:
        monkeypatch.setattr(Store, "load_state", None)  # a running peer has it at hand: nothing is read whole
        assert store.state_at(later.height - 2, later).height == later.height - 2
        with pytest.raises(LookupError):
            store.state_at(later.height + 1, later)


def test_the_journal_ends(swarm_ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "UNDO_HEIGHTS", 5)
    with closing(write(swarm_ledger, tmp_path / "chain.db")) as store:
        last = swarm_ledger.state.height
        assert store.state_at(last - 5, swarm_ledger.state).height == last - 5
        with pytest.raises(LookupError):
            store.state_at(last - 6, swarm_ledger.state)


def test_a_false_journal_is_damage(swarm_ledger: Ledger, tmp_path: Path) -> None:
    with closing(write(swarm_ledger, tmp_path / "chain.db")) as store:
        store._db.execute("DELETE FROM undo WHERE height = ?", (swarm_ledger.state.height,))
        with pytest.raises(StoreCorrupt, match="the journal does not lead"):
            store.state_at(swarm_ledger.state.height - 1, swarm_ledger.state)


def test_old_blocks_are_pruned_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "PRUNE_EVERY", 2)
    monkeypatch.setattr(stores, "PRUNE_SLICE", 3)
    ledger = Ledger(genesis_of(validators=1))
    for _ in range(60):
        ledger.block((KEYS[0], Transfer(BOB, 1)))
    bases = []
    with closing(Store.open(tmp_path / "chain.db", ledger.genesis)) as store:
        for step in final_blocks(ledger):
            store.keep = 10 if step[0].height > 20 else 0
            store.commit(*step)
            bases.append(store.base)
        assert bases[:20] == [1] * 20
        assert max(later - earlier for earlier, later in pairwise(bases)) == 3
        assert bases[-1] == 60 - 10 + 1
        assert store.block(50) is None
        assert store.receipts(50) == ()
        assert store.block(51) is not None
        assert store.raw_blocks(1, 60)[0][0] == store.raw_blocks(51, 51)[0][0]
        assert replay(store) == {"from": 51, "ok": True, "height": 60, "problem": None}
        assert store.load_state().root == ledger.state.root


SPOILT = {
    "a link": ("DELETE FROM blocks WHERE height = 35", "block 35: it is missing"),
    "a certificate": (
        "UPDATE blocks SET certificate = (SELECT certificate FROM blocks WHERE height = 34) WHERE height = 35",
        "block 35: the certificate is not its finalization",
    ),
    "a block": (
        "UPDATE blocks SET block = (SELECT block FROM blocks WHERE height = 34) WHERE height = 36",
        "block 36: it belongs elsewhere",
    ),
    "a receipt": ("UPDATE receipts SET reason = 'spoilt' WHERE height = 37", "block 37: the stored receipts differ"),
    "an event": (
        "INSERT INTO events VALUES (38, 99, 'spoilt', '{}')",
        "block 38: the stored events differ",
    ),
    "the journal": (
        "DELETE FROM undo WHERE height = 32",
        "the journal does not lead to the state of height 31",
    ),
    "the validators": ("DELETE FROM validator_sets", "block 31: its validators are missing"),
}


@pytest.mark.parametrize("what", SPOILT)
def test_what_is_wrong_above_the_base_is_named(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "PRUNE_EVERY", 1)
    ledger = Ledger(genesis_of(validators=1))
    for _ in range(40):
        ledger.block((KEYS[0], Transfer(BOB, 1)))
    spoil, problem = SPOILT[what]
    with closing(Store.open(tmp_path / "chain.db", ledger.genesis)) as store:
        store.keep = 10
        for step in final_blocks(ledger):
            store.commit(*step)
        store._db.execute(spoil)
        found = replay(store)
    assert (found["ok"], found["from"]) == (False, 31)
    assert problem in found["problem"]


def _older(path: Path) -> None:
    """Make the file what version 2 of the schema wrote."""
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP TABLE undo")
        connection.execute("UPDATE meta SET value = x'00000002' WHERE name = 'schema'")
        connection.commit()


def test_a_file_of_the_schema_before_is_migrated_and_goes_on(swarm_ledger: Ledger, tmp_path: Path) -> None:
    path = tmp_path / "chain.db"
    steps = list(final_blocks(swarm_ledger))
    with closing(Store.open(path, swarm_ledger.genesis)) as store:
        for step in steps[:-1]:
            store.commit(*step)
    _older(path)
    with closing(Store.open_read_only(path)) as store:
        assert store.load_state().height == len(steps) - 1
    with closing(Store.open(path, swarm_ledger.genesis)) as store:
        store.commit(*steps[-1])
        assert replay(store)["ok"]
        assert store.state_at(len(steps) - 1, store.load_state()).root == steps[-2][3].state.root


def test_a_migration_cut_short_leaves_the_old_file(
    swarm_ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "chain.db"
    write(swarm_ledger, path).close()
    _older(path)
    with monkeypatch.context() as patch:
        patch.setattr(store_schema, "_MIGRATIONS", {2: store_schema._UNDO + "; CREATE TABLE undo (broken)"})
        with pytest.raises((StoreCorrupt, sqlite3.OperationalError)):
            Store.open(path, swarm_ledger.genesis)
    with closing(Store.open(path, swarm_ledger.genesis)) as store:
        assert replay(store)["ok"]


def test_a_newer_schema_is_refused_and_untouched(swarm_ledger: Ledger, tmp_path: Path) -> None:
    path = tmp_path / "chain.db"
    write(swarm_ledger, path).close()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE meta SET value = x'00000004' WHERE name = 'schema'")
        connection.commit()
    before = path.read_bytes()
    for opened in (Store.open_read_only, lambda at: Store.open(at, swarm_ledger.genesis)):
        with pytest.raises(StoreCorrupt, match="newer version"):
            opened(path)
    assert path.read_bytes() == before
    shutil.rmtree(tmp_path)


def test_a_long_range_of_large_blocks_is_not_read_whole(tmp_path: Path) -> None:
    genesis = genesis_of(validators=1)
    with closing(Files(tmp_path, genesis, None)) as files, files.store.batch():
        rows = [(height, bytes([height]) * 32, bytes(300_000), b"") for height in range(1, 101)]
        files.store._db.executemany("INSERT INTO blocks VALUES (?, ?, ?, ?)", rows)
        tracemalloc.start()
        try:
            files.range(1, 100)
            assert tracemalloc.get_traced_memory()[1] < 4 * RANGE_BYTES
        finally:
            tracemalloc.stop()
