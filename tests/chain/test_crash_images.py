"""Files as a power cut leaves them, taken at every moment of every kind of write: each opens and goes on.

An image is what the files hold at one moment, with any part of the unsynced end of the WAL missing or torn,
and with any mixture of pages where a checkpoint was under way.
"""

import random
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path

import pytest
from msgspec import structs

from chain import store as stores
from chain.blocks import Block, Certificate, Vote, VoteKind
from chain.ledger import Executed
from chain.replay import replay
from chain.signing import SigningRecord
from chain.state import State
from chain.store import Store
from chain.store_schema import migrate
from tests.chain.ledger_kit import Ledger, genesis_of, start_swarm
from tests.chain.store_kit import final_blocks
from tests.chain.test_blocks import block, proposal
from tests.chain.test_signing import KEY, ONE, opened, unsigned

Image = tuple[bytes, bytes]
Step = tuple[Block, Certificate, State, Executed]
PAGE = 4096
CUTS = 4


def files(path: Path) -> Image:
    wal = path.with_name(path.name + "-wal")
    return path.read_bytes(), wal.read_bytes() if wal.exists() else b""


@contextmanager
def watched(connection: sqlite3.Connection, path: Path, every: int) -> Iterator[list[Image]]:
    """Collect the files' distinct images while statements run on the connection."""
    images = [files(path)]

    def look() -> int:
        image = files(path)
        if image != images[-1]:
            images.append(image)
        return 0

    connection.set_progress_handler(look, every)
    try:
        yield images
    finally:
        connection.set_progress_handler(None, 0)
        look()


def torn(images: list[Image], rng: random.Random) -> Iterator[Image]:
    """Yield the images, and each with its newest bytes of the WAL missing or overwritten."""
    durable = len(images[0][1])
    for data, wal in images:
        yield data, wal
        for _ in range(CUTS if len(wal) > durable else 0):
            cut = rng.randrange(durable, len(wal))
            yield data, wal[:cut]
            yield data, wal[:cut] + rng.randbytes(min(512, len(wal) - cut)) + wal[cut + 512 :]


def half_checkpointed(before: Image, after: Image, rng: random.Random) -> Iterator[Image]:
    """Yield files in which a checkpoint had copied some pages; the WAL stays until all are synced."""
    (old, wal), (new, _) = before, after
    for _ in range(8):
        size = rng.choice((len(old), len(new)))
        pages = [rng.choice((old, new))[at : at + PAGE] or new[at : at + PAGE] for at in range(0, size, PAGE)]
        yield b"".join(page.ljust(PAGE, b"\0") for page in pages), wal


def placed(folder: Path, image: Image) -> Path:
    path = folder / "chain.db"
    path.write_bytes(image[0])
    path.with_name("chain.db-wal").write_bytes(image[1])
    path.with_name("chain.db-shm").unlink(missing_ok=True)
    return path


@cache
def life() -> tuple[Ledger, tuple[Step, ...]]:
    swarm = start_swarm(Ledger(genesis_of(history_blocks=5)))
    swarm.work(8)
    return swarm.ledger, tuple(final_blocks(swarm.ledger))


def stored(path: Path, count: int) -> Store:
    ledger, steps = life()
    store = Store.open(path, ledger.genesis)
    for step in steps[:count]:
        store.commit(*step)
    return store


def expect(path: Path, heights: set[int]) -> None:
    """Check that a file opens at one of these heights, is consistent and takes the rest of the chain."""
    ledger, steps = life()
    with closing(Store.open(path, ledger.genesis)) as store:
        height = store.load_state().height
        assert height in heights
        for step in steps[height:]:
            store.commit(*step)
        assert store.load_state().root == ledger.state.root
        assert replay(store)["ok"]


@pytest.mark.parametrize("height", [1, 4, 9])
def test_a_commit_is_there_or_not(height: int, tmp_path: Path) -> None:
    (tmp_path / "image").mkdir()
    path, rng = tmp_path / "chain.db", random.Random(height)
    with closing(stored(path, height)) as store:
        with watched(store._db, path, 7) as images:
            store.commit(*life()[1][height])
        assert len(images) >= 2
        for image in torn(images, rng):
            expect(placed(tmp_path / "image", image), {height, height + 1})
        expect(placed(tmp_path / "image", images[-1]), {height + 1})


def test_a_checkpoint_cut_short_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / "image").mkdir()
    path, rng = tmp_path / "chain.db", random.Random(0)
    with closing(stored(path, 9)) as store:
        before = files(path)
        store._db.execute("PRAGMA wal_checkpoint(FULL)")
        for image in half_checkpointed(before, files(path), rng):
            expect(placed(tmp_path / "image", image), {9})


def test_pruning_is_there_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "PRUNE_EVERY", 1)
    (tmp_path / "image").mkdir()
    path, rng = tmp_path / "chain.db", random.Random(1)
    ledger, steps = life()
    with closing(stored(path, 9)) as store:
        store.keep = 3
        with watched(store._db, path, 7) as images:
            store.commit(*steps[9])
    bases = set()
    for image in torn(images, rng):
        with closing(Store.open(placed(tmp_path / "image", image), ledger.genesis)) as store:
            bases.add((store.load_state().height, store.base))
            assert replay(store)["ok"]
    assert bases == {(9, 1), (10, 8)}


def test_a_snapshot_is_installed_or_not(tmp_path: Path) -> None:
    (tmp_path / "image").mkdir()
    path, rng = tmp_path / "chain.db", random.Random(2)
    ledger, steps = life()
    found, certificate, before, executed = steps[8]
    with closing(Store.open(path, ledger.genesis)) as store, watched(store._db, path, 23) as images:
        store.install(found, certificate, before.validators(), executed.state)
    heights = set()
    for image in torn(images, rng):
        with closing(Store.open(placed(tmp_path / "image", image), ledger.genesis)) as store:
            heights.add(store.load_state().height)
    assert heights == {0, 9}


def test_a_migration_is_done_or_not(tmp_path: Path) -> None:
    (tmp_path / "image").mkdir()
    path, rng = tmp_path / "chain.db", random.Random(3)
    stored(path, 5).close()
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("DROP TABLE undo")
        connection.execute("UPDATE meta SET value = x'00000002' WHERE name = 'schema'")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        with watched(connection, path, 1) as images:
            migrate(connection)
        assert len(images) >= 2
        for image in torn(images, rng):
            expect(placed(tmp_path / "image", image), {5})


def test_no_vote_that_was_given_out_is_missing(tmp_path: Path) -> None:
    (tmp_path / "image").mkdir()
    path, rng = tmp_path / "signing.db", random.Random(4)
    draft = structs.replace(proposal(block()), vote=unsigned(VoteKind.PROPOSE, ONE))
    rounds: list[list[tuple[Vote, object]]] = [
        [(draft.vote, draft), (unsigned(VoteKind.NOTARIZE, ONE), draft)],
        [(unsigned(VoteKind.FINALIZE, ONE), None)],
        [(unsigned(VoteKind.NULLIFY, view=2), None), (unsigned(VoteKind.NULLIFY, view=3), None)],
    ]
    given: list[Vote] = []
    with closing(opened(tmp_path)) as record:
        for requests in rounds:
            before = set(given)
            with watched(record._db, path, 1) as images:
                new = record.sign_all(requests)  # type: ignore[arg-type]
            given += new
            for image in torn(images, rng):
                assert before <= _votes(tmp_path / "image", image) <= {*before, *new}
            assert _votes(tmp_path / "image", images[-1]) == set(given)


def _votes(folder: Path, image: Image) -> set[Vote]:
    for suffix, data in zip(("", "-wal"), image, strict=True):
        (folder / f"signing.db{suffix}").write_bytes(data)
    with closing(SigningRecord.open_existing(folder / "signing.db", KEY.sign)) as record:
        return set(record.votes(1))
