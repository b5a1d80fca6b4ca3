"""The home folder: made safely, held by one process, refused when it is open to others or damaged."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from chain.keys import PrivateKey
from tdml_p2p.errors import UserError
from tdml_p2p.home import Home


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path / "peer")
    home.create()
    return home


def test_folder_and_key_are_private(home: Home) -> None:
    key = home.load_key()
    assert stat.S_IMODE(home.path.stat().st_mode) == 0o700
    assert stat.S_IMODE(home.key_path.stat().st_mode) == 0o600
    assert home.load_key().account == key.account
    assert [path.name for path in home.path.iterdir()] == ["key"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_a_key_open_to_others_is_refused_and_kept(home: Home, mode: int) -> None:
    home.load_key()
    before = home.key_path.read_bytes()
    home.key_path.chmod(mode)
    with pytest.raises(UserError, match="open to other users") as caught:
        home.load_key()
    assert caught.value.hint == f"chmod 600 {home.key_path}"
    assert home.key_path.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"zz" * 32, b"ab" * 31, b"ab" * 33, b"\xff" * 64])
def test_a_damaged_key_is_refused_and_kept(home: Home, content: bytes) -> None:
    home.key_path.touch(0o600)
    home.key_path.write_bytes(content)
    with pytest.raises(UserError, match="does not hold a key"):
        home.load_key()
    assert home.key_path.read_bytes() == content


def test_a_linked_key_is_refused(home: Home, tmp_path: Path) -> None:
    home.key_path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="symbolic link"):
        home.load_key()


def test_a_draft_of_a_killed_process_does_no_harm(home: Home) -> None:
    (home.path / ".key.new").write_bytes(b"half")
    assert isinstance(home.load_key(), PrivateKey)
    assert [path.name for path in home.path.iterdir()] == ["key"]


def test_a_home_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be made"):
        Home(tmp_path / "file").create()


def test_the_lock_names_the_process_that_holds_it(home: Home) -> None:
    program = (
        "import sys, pathlib\n"
        "from tdml_p2p.home import Home\n"
        "with Home(pathlib.Path(sys.argv[1])).lock():\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(home.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=f"in use by the peer with process id {other.pid}"), home.lock():
            pass
        other.kill()
    with home.lock():
        assert home.lock_path.read_text() == f"{os.getpid()}\n"
    assert not home.lock_path.exists()


def test_a_lock_is_released_when_the_block_fails(home: Home) -> None:
    with pytest.raises(RuntimeError), home.lock():
        raise RuntimeError
    with home.lock():
        pass
