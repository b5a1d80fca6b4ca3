"""The signing record: durable before released, idempotent, never contradictory, never started afresh."""

import sqlite3
from pathlib import Path

import pytest
from msgspec import structs

from chain.blocks import Vote, VoteKind, verify_vote
from chain.codec import DecodeError
from chain.hashing import ZERO
from chain.keys import verify
from chain.signing import Conflict, RecordInUse, RecordMissing, SigningRecord
from tests.chain.test_blocks import CHAIN, KEYS, SET, block, proposal

KEY = KEYS[0]
ONE, TWO = b"1" * 32, b"2" * 32


def unsigned(kind: VoteKind, block_hash: bytes = ZERO, *, height: int = 1, view: int = 1) -> Vote:
    return Vote(kind, CHAIN, height, view, block_hash, KEY.account, bytes(64))


def opened(folder: Path, tip: int = 0) -> SigningRecord:
    return SigningRecord.open(folder / "signing.db", chain_id=CHAIN, account=KEY.account, sign=KEY.sign, tip=tip)


def test_signed_votes_are_authentic_and_survive_reopening(tmp_path: Path) -> None:
    record = opened(tmp_path)
    draft = structs.replace(proposal(block()), vote=unsigned(VoteKind.PROPOSE, ONE))
    signed = record.sign_all(
        [
            (draft.vote, draft),
            (unsigned(VoteKind.NOTARIZE, TWO), draft),
            (unsigned(VoteKind.NULLIFY, view=2), None),
        ]
    )
    for vote in signed:
        verify_vote(vote, SET, verify)
    record.close()
    again = opened(tmp_path, tip=9)
    assert list(again.votes(1)) == signed
    assert again.proposals(1) == (structs.replace(draft, vote=signed[0]),)
    assert again.votes(2) == ()
    again.close()


def test_the_vote_is_on_disk_before_it_is_returned(tmp_path: Path) -> None:
    record = opened(tmp_path)
    vote = record.sign(unsigned(VoteKind.FINALIZE, ONE))
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in tmp_path.glob("signing.db*"):
        (copy / file.name).write_bytes(file.read_bytes())
    record.close()
    after_crash = opened(copy, tip=1)
    assert after_crash.votes(1) == (vote,)
    after_crash.close()


def test_the_same_vote_returns_the_stored_signature(tmp_path: Path) -> None:
    record = opened(tmp_path)
    first = record.sign(unsigned(VoteKind.NOTARIZE, ONE))
    record._sign = lambda message: pytest.fail("signed twice")
    assert record.sign(unsigned(VoteKind.NOTARIZE, ONE)) == first
    record.close()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (unsigned(VoteKind.PROPOSE, ONE), unsigned(VoteKind.PROPOSE, TWO)),
        (unsigned(VoteKind.NOTARIZE, ONE), unsigned(VoteKind.NOTARIZE, TWO)),
        (unsigned(VoteKind.FINALIZE, ONE), unsigned(VoteKind.NULLIFY)),
        (unsigned(VoteKind.NULLIFY), unsigned(VoteKind.FINALIZE, ONE)),
        (unsigned(VoteKind.NOTARIZE, ONE), unsigned(VoteKind.FINALIZE, TWO)),
    ],
)
def test_a_conflicting_vote_is_refused_also_after_a_restart(tmp_path: Path, first: Vote, second: Vote) -> None:
    record = opened(tmp_path)
    record.sign(first)
    with pytest.raises(Conflict):
        record.sign_all([(unsigned(VoteKind.NULLIFY, view=7), None), (second, None)])
    assert len(record.votes(1)) == 1
    record.close()
    record = opened(tmp_path)
    with pytest.raises(Conflict):
        record.sign(second)
    record.close()


def test_votes_of_another_key_chain_or_closed_height_are_refused(tmp_path: Path) -> None:
    record = opened(tmp_path)
    record.sign(unsigned(VoteKind.NOTARIZE, ONE, height=3))
    record.forget(3)
    assert record.votes(3) == ()
    for vote in (
        structs.replace(unsigned(VoteKind.NULLIFY), validator=KEYS[1].account),
        structs.replace(unsigned(VoteKind.NULLIFY), chain_id=bytes(32)),
        unsigned(VoteKind.NOTARIZE, TWO, height=3),
    ):
        with pytest.raises(Conflict):
            record.sign(vote)
    record.sign(unsigned(VoteKind.NOTARIZE, TWO, height=4))
    record.close()
    record = opened(tmp_path)
    with pytest.raises(Conflict):
        record.sign(unsigned(VoteKind.NULLIFY, height=2))
    record.close()


def test_a_missing_record_beside_a_chain_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordMissing):
        opened(tmp_path, tip=1)
    assert not (tmp_path / "signing.db").exists()
    (tmp_path / "signing.db").touch()
    with pytest.raises(RecordMissing):
        opened(tmp_path, tip=1)


def test_a_record_of_another_key_is_refused(tmp_path: Path) -> None:
    opened(tmp_path).close()
    with pytest.raises(RecordMissing):
        SigningRecord.open(tmp_path / "signing.db", chain_id=CHAIN, account=KEYS[1].account, sign=KEYS[1].sign, tip=0)


def test_two_processes_never_share_a_record(tmp_path: Path) -> None:
    record = opened(tmp_path)
    with pytest.raises(RecordInUse):
        opened(tmp_path)
    record.close()
    opened(tmp_path).close()


def test_a_new_record_beside_a_chain_signs_only_above_its_floor(tmp_path: Path) -> None:
    path = tmp_path / "signing.db"
    record = SigningRecord.create(path, chain_id=CHAIN, account=KEY.account, sign=KEY.sign, floor=11)
    with pytest.raises(Conflict):
        record.sign(unsigned(VoteKind.NULLIFY, height=11))
    assert record.sign(unsigned(VoteKind.NULLIFY, height=12)).height == 12
    record.close()
    with pytest.raises(FileExistsError):
        SigningRecord.create(path, chain_id=CHAIN, account=KEY.account, sign=KEY.sign, floor=11)


def test_a_damaged_record_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "signing.db").write_bytes(b"this is not a database, it only lies in its place" * 100)
    with pytest.raises(sqlite3.DatabaseError):
        opened(tmp_path)


def filled(folder: Path) -> tuple[SigningRecord, list[Vote]]:
    record = opened(folder)
    draft = structs.replace(proposal(block()), vote=unsigned(VoteKind.PROPOSE, ONE))
    requests = [
        (draft.vote, draft),
        (unsigned(VoteKind.NOTARIZE, TWO), draft),
        (unsigned(VoteKind.NULLIFY, view=2), None),
    ]
    return record, record.sign_all(requests)


def imported(folder: Path, data: bytes) -> int:
    folder.mkdir()
    return SigningRecord.import_(folder / "signing.db", data, KEY.account)


def test_an_exported_record_signs_in_the_other_place_only(tmp_path: Path) -> None:
    record, signed = filled(tmp_path)
    data = record.export()
    with pytest.raises(Conflict, match="exported"):
        record.sign(unsigned(VoteKind.NULLIFY, height=7))
    assert record.export() == data
    record.close()
    with pytest.raises(RecordMissing, match="somewhere else"):
        opened(tmp_path, tip=5)
    again = SigningRecord.open_existing(tmp_path / "signing.db", KEY.sign)
    assert again.export() == data
    again.close()
    assert imported(tmp_path / "new", data) == 1
    moved = opened(tmp_path / "new", tip=5)
    assert moved.votes(1) == tuple(sorted(signed, key=lambda vote: (vote.view, vote.kind)))
    assert len(moved.proposals(1)) == 1
    with pytest.raises(Conflict):
        moved.sign(unsigned(VoteKind.NOTARIZE, ONE))
    moved.sign(unsigned(VoteKind.NULLIFY, height=7))
    moved.close()


def test_the_floor_moves_too(tmp_path: Path) -> None:
    record, _ = filled(tmp_path)
    record.forget(4)
    imported(tmp_path / "new", record.export())
    record.close()
    moved = opened(tmp_path / "new", tip=5)
    with pytest.raises(Conflict, match="closed up to height 4"):
        moved.sign(unsigned(VoteKind.NULLIFY, height=4))
    moved.close()


def test_nothing_is_overwritten_and_nothing_foreign_or_damaged_taken(tmp_path: Path) -> None:
    record, _ = filled(tmp_path)
    data = record.export()
    record.close()
    with pytest.raises(FileExistsError):
        SigningRecord.import_(tmp_path / "signing.db", data, KEY.account)
    target = tmp_path / "other.db"
    with pytest.raises(RecordMissing, match="another key"):
        SigningRecord.import_(target, data, KEYS[1].account)
    for damaged in (data[:-1], data + b"\x00", b"", data.replace(KEY.account, KEY.account[:-1], 1)):
        with pytest.raises(DecodeError):
            SigningRecord.import_(target, damaged, KEY.account)
    assert not target.exists()


def test_an_import_that_was_cut_off_is_made_again(tmp_path: Path) -> None:
    record, _ = filled(tmp_path)
    data = record.export()
    record.close()
    (tmp_path / "new").mkdir()
    sqlite3.connect(target := tmp_path / "new" / "signing.db").close()  # the file is there before what is in it
    assert not target.read_bytes()
    SigningRecord.import_(target, data, KEY.account)
    moved = opened(tmp_path / "new")
    assert moved.export() == data
    moved.close()
    target.write_bytes(b"no database")
    with pytest.raises(FileExistsError):
        SigningRecord.import_(target, data, KEY.account)


def test_there_must_be_a_record_to_export(tmp_path: Path) -> None:
    with pytest.raises(RecordMissing):
        SigningRecord.open_existing(tmp_path / "signing.db", KEY.sign)
    sqlite3.connect(tmp_path / "signing.db").close()
    with pytest.raises(RecordMissing):
        SigningRecord.open_existing(tmp_path / "signing.db", KEY.sign)
