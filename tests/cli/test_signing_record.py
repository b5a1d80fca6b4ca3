"""`tdml-peer signing-record`: the right to sign moves, and is nowhere twice."""

import stat
from contextlib import closing
from pathlib import Path

from control_kit import Run

from chain.blocks import Vote, VoteKind
from chain.hashing import ZERO, digest
from chain.signing import SigningRecord
from tdml_p2p.home import Home

CHAIN = digest("chain")


def made(path: Path) -> Home:
    home = Home(path)
    home.create()
    key = home.load_key()
    arguments = {"chain_id": CHAIN, "account": key.account, "sign": key.sign, "tip": 0}
    with closing(SigningRecord.open(path / "signing.db", **arguments)) as record:  # type: ignore[arg-type]
        record.sign(Vote(VoteKind.NULLIFY, CHAIN, 3, 1, ZERO, key.account, bytes(64)))
    return home


def test_a_validator_moves(run: Run, tmp_path: Path) -> None:
    old, new, file = made(tmp_path / "old"), Home(tmp_path / "new"), tmp_path / "record"
    ran = run("tdml-peer", "signing-record", "export", file, "--home", old.path)
    assert (ran.code, ran.err) == (0, "")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    stranger = run("tdml-peer", "signing-record", "import", file, "--home", new.path)
    assert (stranger.code, "another key" in stranger.err) == (1, True)
    new.key_path.write_bytes(old.key_path.read_bytes())
    ran = run("tdml-peer", "signing-record", "import", file, "--home", new.path)
    assert (ran.code, ran.err) == (0, "")
    assert "height 3" in ran.out
    twice = run("tdml-peer", "signing-record", "import", file, "--home", new.path)
    assert (twice.code, "has a signing record already" in twice.err) == (1, True)
    again = run("tdml-peer", "signing-record", "export", file, "--home", old.path)
    assert (again.code, "exists" in again.err) == (2, True)


def test_a_running_peer_keeps_its_record(run: Run, tmp_path: Path) -> None:
    home = made(tmp_path / "home")
    with home.lock():
        ran = run("tdml-peer", "signing-record", "export", tmp_path / "record", "--home", home.path)
    assert ran.code != 0
    assert not (tmp_path / "record").exists()


def test_what_is_not_there_or_not_a_record_is_named(run: Run, tmp_path: Path) -> None:
    home = tmp_path / "empty"
    assert run("tdml-peer", "signing-record", "export", tmp_path / "record", "--home", home).code == 1
    assert run("tdml-peer", "signing-record", "import", tmp_path / "nothing", "--home", home).code == 2
    junk = tmp_path / "junk"
    junk.write_bytes(b"junk")
    ran = run("tdml-peer", "signing-record", "import", junk, "--home", home)
    assert (ran.code, "no exported record" in ran.err) == (1, True)
    assert not (home / "signing.db").exists()
