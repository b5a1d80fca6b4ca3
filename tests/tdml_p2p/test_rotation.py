"""Key rotation of a home: files changed over only when the chain knows the successor, and after any crash."""

import os
from pathlib import Path

import pytest

from chain.keys import PrivateKey, peer_id, verify
from chain.signing import SigningRecord
from chain.transactions import RotateKey, Transfer, VoteParams, rotation_bytes
from tdml_p2p.errors import UserError
from tdml_p2p.home import Home
from tdml_p2p.http_transactions import parse_transaction
from tdml_p2p.rotation import adopt, rotation
from tests.chain.ledger_kit import KEYS, Ledger, genesis_of
from tests.chain.store_kit import write

OLD, NEW, OTHER = KEYS[0], KEYS[10], KEYS[7]


def home_with(path: Path, *, is_rotated: bool = True) -> Home:
    """Return the home of a validator with a chain, a signing record and a next key."""
    home, ledger = Home(path), Ledger(genesis_of())
    ledger.one(OTHER, Transfer(OLD.account, 1))
    if is_rotated:
        proof = NEW.sign(rotation_bytes(ledger.genesis.chain_id, OLD.account))
        assert ledger.one(OLD, RotateKey(NEW.account, bytes(32), proof)) == ""
    write(ledger, home.chain_path).close()
    home.save_genesis(ledger.genesis)
    for file, key in ((home.key_path, OLD), (home.next_key_path, NEW)):
        file.write_text(key.seed.hex())
        file.chmod(0o600)
    record(home, OLD).close()
    return home


def record(home: Home, key: PrivateKey, tip: int = 0) -> SigningRecord:
    genesis = home.load_genesis()
    assert genesis is not None
    return SigningRecord.open(home.signing_path, chain_id=genesis.chain_id, account=key.account, sign=key.sign, tip=tip)


def is_adopted(home: Home) -> bool:
    record(home, NEW, tip=2).close()
    kept = [path for path in home.path.glob("key-*") if path.read_text().strip() == OLD.seed.hex()]
    return home.load_key().seed == NEW.seed and home.load_next_key() is None and len(kept) == 1


def test_key_and_record_change_over_and_the_old_ones_are_kept(tmp_path: Path) -> None:
    home = home_with(tmp_path)
    assert [key.account for key in adopt(home)] == [OLD.account, NEW.account]
    assert is_adopted(home)
    assert len(list(tmp_path.glob("signing-*.db"))) == 1
    assert home.key_path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(UserError, match="no next key"):
        adopt(home)


def test_nothing_changes_before_the_chain_knows_the_successor(tmp_path: Path) -> None:
    home = home_with(tmp_path, is_rotated=False)
    with pytest.raises(UserError, match="does not know"):
        adopt(home)
    assert home.load_key().seed == OLD.seed
    record(home, OLD, tip=1).close()


def test_nothing_changes_while_a_peer_runs_here(tmp_path: Path) -> None:
    home = home_with(tmp_path)
    with home.lock(), pytest.raises(UserError, match="in use"):
        adopt(home)
    assert home.load_key().seed == OLD.seed


@pytest.mark.parametrize("death", range(3))
def test_a_crash_at_any_change_of_a_name_is_made_good_by_running_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, death: int
) -> None:
    home = home_with(tmp_path)
    left, real = death, os.replace

    def dying(source: Path, target: Path) -> None:
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        real(source, target)

    monkeypatch.setattr("tdml_p2p.rotation.os.replace", dying)
    with pytest.raises(KeyboardInterrupt):
        adopt(home)
    assert home.load_key().seed == OLD.seed
    monkeypatch.undo()
    adopt(home)
    assert is_adopted(home)
    assert not list(tmp_path.glob("signing.next*"))


def test_a_home_without_a_record_gets_none_of_the_old_key(tmp_path: Path) -> None:
    home = home_with(tmp_path)
    home.signing_path.unlink()
    adopt(home)
    assert is_adopted(home)


def test_the_next_key_is_durable_private_and_made_once(tmp_path: Path) -> None:
    home = Home(tmp_path)
    assert home.load_next_key() is None
    keys = [home.load_next_key(make=True), home.load_next_key(make=True), home.load_next_key()]
    assert len({key.seed for key in keys if key is not None}) == 1
    assert None not in keys
    assert home.next_key_path.stat().st_mode & 0o777 == 0o600
    home.next_key_path.chmod(0o644)
    with pytest.raises(UserError, match="open to other users"):
        home.load_next_key()


def test_the_successor_consents_to_this_account_on_this_network() -> None:
    genesis = genesis_of()
    payload = rotation(genesis, OLD.account, NEW)
    assert payload.successor == NEW.account
    assert verify(NEW.account, rotation_bytes(genesis.chain_id, OLD.account), payload.proof)


def test_requests_of_rotation_and_votes_are_read() -> None:
    body = b'{"kind":"rotate-key","successor":"%s","onion_tip":"%s","proof":"%s"}'
    wanted = RotateKey(NEW.account, bytes(32), bytes(64))
    said = (peer_id(NEW.account).encode(), b"00" * 32, b"00" * 64)
    assert parse_transaction(body % said) == wanted
    vote = parse_transaction(b'{"kind":"vote-params","params":{"redraws":1,"tau":[1,2,3]}}')
    assert isinstance(vote, VoteParams)
    assert (vote.params.redraws, vote.params.tau, vote.params.epoch_blocks) == (1, (1, 2, 3), 20)


@pytest.mark.parametrize(
    "body",
    [
        b'{"kind":"rotate-key","successor":"x","onion_tip":"","proof":""}',
        b'{"kind":"rotate-key","successor":"x","onion_tip":"%s","proof":"%s"}' % (b"00" * 32, b"00" * 64),
        b'{"kind":"vote-params"}',
        b'{"kind":"vote-params","params":[]}',
        b'{"kind":"vote-params","params":{"nothing":1}}',
        b'{"kind":"vote-params","params":{"redraws":"1"}}',
        b'{"kind":"vote-params","params":{"redraws":-1}}',
        b'{"kind":"vote-params","params":{"tau":5}}',
        b'{"kind":"vote-params","params":{"free_tasks":null}}',
    ],
)
def test_requests_without_sense_are_refused_with_a_value_error(body: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_transaction(body)
