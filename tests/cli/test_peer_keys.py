"""`tdml-peer key` and `vote-params`: what they write first, what they send, what they say."""

import json
import stat

import pytest
from control_kit import FakeDaemon, Run

from chain.keys import account_of, peer_id, verify
from chain.transactions import rotation_bytes
from chain.views import plain
from tdml_p2p.home import Home
from tests.chain.ledger_kit import genesis_of

GENESIS = genesis_of()
PARAMS = plain(GENESIS.params) | {"pending": []}


@pytest.fixture
def home(daemon: FakeDaemon) -> Home:
    folder = Home(daemon.home)
    folder.save_genesis(GENESIS)
    folder.load_key()
    return folder


def test_a_rotation_makes_the_key_durable_before_it_is_sent(run: Run, daemon: FakeDaemon, home: Home) -> None:
    old = peer_id(home.load_key().account)
    daemon.reply(f"/chain/account?id={old}", {"account": old})
    daemon.reply("/transactions", {"error": "The transaction was not included in time.", "hint": "wait"}, 504)
    assert run("tdml-peer", "key", "rotate", "--home", daemon.home).code == 1
    new = home.load_next_key()
    assert new is not None
    assert stat.S_IMODE(home.next_key_path.stat().st_mode) == 0o600
    assert peer_id(home.load_key().account) == old
    (body,) = [body for _, path, body in daemon.requests if path == "/transactions"]
    assert account_of(body["successor"]) == new.account
    signed = rotation_bytes(GENESIS.chain_id, account_of(old))
    assert verify(new.account, signed, bytes.fromhex(body["proof"]))
    daemon.reply("/transactions", {"id": "ef" * 32, "height": 9})
    ran = run("tdml-peer", "key", "rotate", "--home", daemon.home, "--json")
    told = json.loads(ran.out)
    assert (told["old"], told["new"]) == (old, peer_id(new.account))
    assert "stop this peer" in told["next"]


def test_a_rotation_that_is_final_is_not_sent_again(run: Run, daemon: FakeDaemon, home: Home) -> None:
    old, new = home.load_key(), home.load_next_key(make=True)
    assert new is not None
    found = {"account": peer_id(old.account), "successor": peer_id(new.account)}
    daemon.reply(f"/chain/account?id={peer_id(old.account)}", found)
    assert run("tdml-peer", "key", "rotate", "--home", daemon.home).code == 0
    assert [path for _, path, _ in daemon.requests if path == "/transactions"] == []


def test_a_home_without_a_network_has_nothing_to_rotate(run: Run, daemon: FakeDaemon) -> None:
    ran = run("tdml-peer", "key", "rotate", "--home", daemon.home)
    assert (ran.code, "belongs to no network" in ran.err) == (1, True)


def test_without_a_next_key_there_is_nothing_to_adopt(run: Run, home: Home) -> None:
    ran = run("tdml-peer", "key", "adopt", "--home", home.path)
    assert (ran.code, "no next key" in ran.err) == (1, True)


def test_a_vote_names_all_parameters(run: Run, daemon: FakeDaemon) -> None:
    daemon.reply("/chain/params", PARAMS)
    daemon.reply("/transactions", {"id": "ef" * 32, "height": 9})
    words = ("lease_blocks=99", "tau=2500,27000,40000", "free_tasks=true")
    assert run("tdml-peer", "vote-params", *words, "--home", daemon.home).code == 0
    changed = {"lease_blocks": 99, "tau": [2500, 27_000, 40_000], "free_tasks": True}
    wanted = {name: value for name, value in PARAMS.items() if name != "pending"} | changed
    assert daemon.requests[-1] == ("POST", "/transactions", {"kind": "vote-params", "params": wanted})


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("nothing=1", "There is no parameter 'nothing'"),
        ("lease_blocks=many", "is not NAME=VALUE"),
        ("lease_blocks", "a parameter is wrong"),
        ("lease_blocks=1,2", "a parameter is wrong"),
        ("lease_blocks=0", "a parameter is wrong"),
        ("free_tasks=1", "a parameter is wrong"),
        ("tau=1", "a parameter is wrong"),
        ("jail_missed=101", "jail_missed is more than jail_window"),
        ("unbonding_blocks=10", "leaving stake would be bound for less time"),
        ("max_block_bytes=2000000", "max_block_bytes is more than 1000000"),
    ],
)
def test_a_vote_that_can_lead_nowhere_is_not_sent(run: Run, daemon: FakeDaemon, word: str, told: str) -> None:
    daemon.reply("/chain/params", PARAMS)
    ran = run("tdml-peer", "vote-params", word, "--home", daemon.home)
    assert (ran.code, ran.out) == (2, "")
    assert told in ran.err
    assert [path for _, path, _ in daemon.requests if path == "/transactions"] == []
