"""The chain database: what is written comes back, in one piece, and damage is named."""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
from msgspec import structs

from chain.keys import peer_id
from chain.ledger import Executed
from chain.state import State, Table, empty_state, genesis_state, state_key, value_hash
from chain.store import Store, StoreCorrupt
from chain.transactions import Transfer
from tests.chain.ledger_kit import KEYS, Ledger, genesis_of, start_swarm
from tests.chain.store_kit import certificate_of, write

ALICE, BOB = KEYS[6], KEYS[7]


@pytest.fixture(scope="module")
def lived() -> Ledger:
    """A short life with a task, a conviction and audits that have left the state."""
    swarm = start_swarm(Ledger(genesis_of(history_blocks=5)))
    swarm.deviation[swarm.seated(0)[0]] = -2.0
    swarm.work(36)
    swarm.ledger.one(ALICE, Transfer(BOB.account, 1))
    assert swarm.ledger.happened("slashed")
    return swarm.ledger


@pytest.fixture(scope="module")
def written(lived: Ledger, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "chain.db"
    write(lived, path).close()
    return path


@pytest.fixture
def copied(written: Path, tmp_path: Path) -> Path:
    path = tmp_path / "chain.db"
    path.write_bytes(written.read_bytes())
    return path


@pytest.fixture
def store(written: Path, lived: Ledger) -> Iterator[Store]:
    with closing(Store.open(written, lived.genesis)) as opened:
        yield opened


def from_scratch(state: State) -> bytes:
    rows = {
        state_key(table, key): value_hash(record)
        for table, records in state.tables.items()
        for key, record in records.items()
    }
    return empty_state().tree.update(rows).root


def test_the_root_of_every_block_is_that_of_a_tree_from_scratch(lived: Ledger) -> None:
    for *_, executed in lived.blocks[::5]:
        assert executed.state.root == from_scratch(executed.state)


def test_a_reopened_store_has_the_same_state(store: Store, lived: Ledger) -> None:
    state = store.load_state()
    assert state.root == lived.state.root
    assert state.tables == lived.state.tables
    assert store.genesis == lived.genesis


def test_blocks_certificates_receipts_and_events_come_back(store: Store, lived: Ledger) -> None:
    tip = store.tip()
    assert tip is not None
    assert tip[0].height == len(lived.blocks) == lived.state.height
    for height, (context, transactions, before, executed) in enumerate(lived.blocks, 1):
        pair = store.block(height)
        assert pair is not None
        block, certificate = pair
        assert block.transactions == transactions
        assert block.header.proposer == context.proposer
        assert certificate == certificate_of(block, before)
        assert store.block_by_hash(block.hash) == pair
        assert store.validators(block.header.validators_hash) == before.validators()
        assert store.receipts(height) == executed.receipts
        assert [event for _, event in store.events(height, height)] == list(executed.events)
    assert store.block(0) is None
    assert store.block(999) is None
    assert store.block_by_hash(bytes(32)) is None
    assert store.validators(bytes(32)) is None


def test_receipts_by_id(store: Store, lived: Ledger) -> None:
    transaction = lived.blocks[-1][1][0]
    assert store.receipt(transaction.tx_id) == (lived.state.height, 0, "")
    assert store.receipt(bytes(32)) is None


def test_events_by_kind_range_and_limit(store: Store, lived: Ledger) -> None:
    slashed = store.events(1, lived.state.height, ["slashed"])
    assert [event.data for _, event in slashed] == lived.happened("slashed")
    both = store.events(1, lived.state.height, ["slashed", "posted"])
    assert [event.kind for _, event in both] == ["posted", "slashed"]
    assert store.events(5, 4) == []
    assert len(store.events(1, lived.state.height, (), 3)) == 3


def test_what_left_the_state_is_in_the_archive(store: Store, lived: Ledger) -> None:
    passed = lived.happened("passed")[0]
    identity = bytes.fromhex(str(passed["audit"]))
    assert lived.state.audit(identity) is None
    audit = store.archived(Table.AUDITS, identity)
    assert audit is not None
    assert peer_id(audit.worker) == passed["worker"]  # type: ignore[attr-defined]
    assert store.archived(Table.AUDITS, bytes(32)) is None


def test_the_raw_range_is_what_sync_serves(store: Store) -> None:
    assert [len(pair) for pair in store.raw_blocks(2, 4)] == [2, 2, 2]
    assert store.raw_blocks(900, 901) == []


def test_a_new_store_starts_at_genesis(tmp_path: Path) -> None:
    genesis = genesis_of(faucet=3)
    for _ in range(2):
        with closing(Store.open(tmp_path / "chain.db", genesis)) as store:
            assert store.tip() is None
            assert store.load_state().tables == genesis_state(genesis).tables


def test_a_store_interrupted_while_it_was_made_starts_again(tmp_path: Path) -> None:
    path = tmp_path / "chain.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
    assert path.stat().st_size > 0
    with closing(Store.open(path, genesis_of())) as store:
        assert store.tip() is None


def test_writes_are_durable_and_in_wal(store: Store) -> None:
    assert store._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert store._db.execute("PRAGMA synchronous").fetchone() == (2,)


def test_a_height_is_written_whole_or_not_at_all(copied: Path, lived: Ledger) -> None:
    with closing(Store.open(copied, lived.genesis)) as store:
        pair, before = store.tip(), store.load_state()
        assert pair is not None
        broken = Executed(before, (), (), {Table.ACCOUNTS: {b"x" * 32: object()}})
        block = structs.replace(pair[0], header=structs.replace(pair[0].header, height=pair[0].height + 1))
        with pytest.raises(TypeError):
            store.commit(block, pair[1], before, broken)
        with pytest.raises(sqlite3.IntegrityError):
            store.commit(pair[0], pair[1], before, Executed(before, (), ()))
        assert store.tip() == pair
        assert store.load_state().tables == before.tables


def test_a_reader_beside_a_writer_sees_whole_heights(tmp_path: Path) -> None:
    ledger = Ledger()
    ledger.skip(2)
    path = tmp_path / "chain.db"
    with closing(write(ledger, path)), closing(Store.open_read_only(path)) as reader:
        with reader.snapshot():
            assert reader.load_state().height == 2
        with pytest.raises(sqlite3.OperationalError):
            reader._db.execute("DELETE FROM blocks")


def test_a_reader_needs_a_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Store.open_read_only(tmp_path / "missing.db")


def test_names_that_mean_something_in_an_address_are_only_names(tmp_path: Path) -> None:
    folder = tmp_path / "a?b#c%20 d"
    folder.mkdir()
    Store.open(folder / "chain.db", genesis_of()).close()
    with closing(Store.open_read_only(folder / "chain.db")) as store:
        assert store.tip() is None


def test_another_network_is_refused(copied: Path) -> None:
    with pytest.raises(StoreCorrupt, match="another network"):
        Store.open(copied, genesis_of(faucet=1))


def damage(path: Path, statement: str) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(statement)


def test_a_store_that_has_been_closed_is_not_called_damaged(written: Path) -> None:
    store = Store.open_read_only(written)
    store.close()
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        store.tip()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE meta SET value = x'00000001' WHERE name = 'schema'",
        "UPDATE meta SET value = x'7b7d' WHERE name = 'genesis'",
        "DELETE FROM meta",
        "DROP TABLE meta",
        "UPDATE state SET value = x'c0' WHERE tbl = 2",
        "DELETE FROM state WHERE tbl = 2",
        "UPDATE state SET tbl = 99 WHERE tbl = 3",
        "UPDATE blocks SET block = x'93' WHERE height = (SELECT MAX(height) FROM blocks)",
        "DELETE FROM blocks WHERE height = (SELECT MAX(height) FROM blocks)",
    ],
)
def test_damage_is_named_in_one_sentence(copied: Path, lived: Ledger, statement: str) -> None:
    damage(copied, statement)
    with (
        pytest.raises(StoreCorrupt, match=r"^[^\n]+ is damaged: [^\n]+\.$"),
        closing(Store.open(copied, lived.genesis)) as store,
    ):
        store.load_state()


@pytest.mark.parametrize("keep", [7, 100, 4096, 9000])
def test_a_truncated_or_overwritten_file_is_named(copied: Path, lived: Ledger, keep: int) -> None:
    data = copied.read_bytes()
    copied.write_bytes(data[:keep] + bytes(range(1, 256)) * ((len(data) - keep) // 255 // 2))
    with (
        pytest.raises(StoreCorrupt, match=r"^[^\n]+ is damaged: [^\n]+\.$"),
        closing(Store.open(copied, lived.genesis)) as store,
    ):
        store.load_state()


def test_a_file_that_may_not_be_opened_is_not_called_damaged(tmp_path: Path) -> None:
    (tmp_path / "chain.db").mkdir()
    with pytest.raises(sqlite3.OperationalError):
        Store.open(tmp_path / "chain.db", genesis_of())


def test_nothing_is_left_open(copied: Path, lived: Ledger) -> None:
    for wrong in (genesis_of(faucet=9), lived.genesis):
        with suppress(StoreCorrupt):
            Store.open(copied, wrong).close()
    assert not [name for name in os.listdir(copied.parent) if name.endswith(("-wal", "-shm"))]
