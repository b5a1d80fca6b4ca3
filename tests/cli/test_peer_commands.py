"""`tdml-peer`'s short commands: homes, keys and settings on disk; status, tasks and wallet through a daemon."""

import json
import logging
import stat
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import structlog
import trio
from control_kit import FakeDaemon, Run

from chain.genesis import from_json, to_json
from chain.keys import PrivateKey, account_of, peer_id
from cli import peer as commands
from tdml_p2p import peer, train
from tdml_p2p.bootstrap import private_genesis
from tdml_p2p.config import PeerConfig, TrainConfig
from tdml_p2p.home import Home

PEER = peer_id(PrivateKey(bytes([1]) * 32).account)
OTHER = peer_id(PrivateKey(bytes([2]) * 32).account)
STATUS = {
    "peer": PEER,
    "name": "attic",
    "invite": f"/ip4/127.0.0.1/tcp/4001/p2p/{PEER}@{'ab' * 32}",
    "status_url": "http://127.0.0.1:8080/",
    "chain_id": "ab" * 32,
    "network": "private",
    "syncing": False,
    "height": 412,
    "finality": {"p50": 0.234, "p99": 1.5, "block_age": 3.2},
    "peers": [OTHER],
    "reachability": {"verdict": "unknown", "detail": "nobody has dialled", "steps": []},
    "is_validator": True,
    "validators": [{"peer": PEER, "power": "7"}, {"peer": OTHER, "power": "7"}],
    "balance": "1000",
    "bonded": "250",
    "earnings": "12",
    "seats": [{"task": "cd" * 32, "stage": 1, "bond": "5", "settled_cells": 40, "lease_until": 500}],
    "warnings": [{"code": "one-owner", "message": "Verdicts rest on one owner.", "hint": "bond more"}],
}
TASK = {"task": "cd" * 32, "client": PEER, "status": "running", "stages": 2, "price": "1", "announced": True}
WALLET = [
    (("stake", "250"), {"kind": "bond", "amount": "250"}),
    (("unstake", "10"), {"kind": "unbond", "amount": "10"}),
    (("send", OTHER, "7"), {"kind": "transfer", "to": OTHER, "amount": "7"}),
    (("send", OTHER, str(10**17)), {"kind": "transfer", "to": OTHER, "amount": str(10**17)}),
    (("faucet",), {"kind": "faucet"}),
]


@pytest.fixture(autouse=True)
def _logs() -> Iterator[None]:
    """Give back the logging that commands set up for their process."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def columns(text: str) -> dict[str, str]:
    """Return `name  value` lines by name."""
    return dict(line.split(maxsplit=1) for line in text.splitlines() if len(line.split(maxsplit=1)) == 2)


def test_init_makes_a_home(run: Run, tmp_path: Path) -> None:
    home = tmp_path / "new" / "home"
    ran = run("tdml-peer", "init", "--home", home, "--json")
    made = json.loads(ran.out)
    genesis = from_json((home / "genesis.json").read_text())
    assert ran.code == 0
    assert made == {
        "home": str(home),
        "peer": peer_id(Home(home).load_key().account),
        "chain_id": genesis.chain_id.hex(),
        "config": str(home / "config.toml"),
    }
    assert [peer_id(validator.account) for validator in genesis.validators] == [made["peer"]]
    assert stat.S_IMODE((home / "key").stat().st_mode) == 0o600
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert not (home / "lock").exists()


def test_init_again_changes_nothing(run: Run, tmp_path: Path) -> None:
    first = run("tdml-peer", "init", "--home", tmp_path)
    (tmp_path / "config.toml").write_text("threads = 2\n")
    second = run("tdml-peer", "init", "--home", tmp_path)
    assert (first.code, first.out) == (second.code, second.out)
    assert columns(first.out)["home"] == str(tmp_path)
    assert (tmp_path / "config.toml").read_text() == "threads = 2\n"


def test_init_joins_a_network_by_its_genesis(run: Run, tmp_path: Path) -> None:
    genesis = private_genesis(PrivateKey(bytes([3]) * 32), 1_700_000_000_000)
    (tmp_path / "genesis.json").write_text(to_json(genesis))
    ran = run("tdml-peer", "init", "--home", tmp_path / "home", "--genesis", tmp_path / "genesis.json", "--json")
    assert json.loads(ran.out)["chain_id"] == genesis.chain_id.hex()
    assert Home(tmp_path / "home").load_genesis() == genesis


def test_a_home_keeps_its_network(run: Run, tmp_path: Path) -> None:
    genesis = private_genesis(PrivateKey(bytes([3]) * 32), 1_700_000_000_000)
    (tmp_path / "other.json").write_text(to_json(genesis))
    run("tdml-peer", "init", "--home", tmp_path / "home")
    before = (tmp_path / "home" / "genesis.json").read_bytes()
    ran = run("tdml-peer", "init", "--home", tmp_path / "home", "--genesis", tmp_path / "other.json")
    assert ran.code == 1
    assert "belongs to network" in ran.err
    assert "hint: use another home" in ran.err
    assert (tmp_path / "home" / "genesis.json").read_bytes() == before


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff", b"[]", b'{"name": 3}'])
def test_a_genesis_that_is_none(run: Run, tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "genesis.json").write_bytes(content)
    ran = run("tdml-peer", "init", "--home", tmp_path / "home", "--genesis", tmp_path / "genesis.json")
    message, hint = ran.err.splitlines()
    assert ran.code == 1
    assert message.startswith(f"error: {tmp_path / 'genesis.json'} ")
    assert hint.startswith("hint: ")


def test_a_home_in_use_is_not_initialised(run: Run, tmp_path: Path) -> None:
    with Home(tmp_path).lock():
        ran = run("tdml-peer", "init", "--home", tmp_path)
    assert ran.code == 1
    assert "is in use by the peer with process id" in ran.err
    assert not (tmp_path / "key").exists()


def test_key_shows_the_account_and_no_secret(run: Run, tmp_path: Path) -> None:
    shown = json.loads(run("tdml-peer", "key", "--home", tmp_path, "--json").out)
    text = run("tdml-peer", "key", "--home", tmp_path)
    secret = (tmp_path / "key").read_text().strip()
    assert shown.keys() == {"peer", "file"}
    assert columns(text.out) == shown
    assert account_of(shown["peer"]) == Home(tmp_path).load_key().account
    assert secret not in text.out + json.dumps(shown)


@pytest.mark.parametrize(
    ("content", "mode", "said"),
    [("00" * 32, 0o644, "open to other users"), ("00" * 31, 0o600, "does not hold a key"), ("x" * 64, 0o600, "a key")],
)
def test_a_key_that_cannot_be_used(run: Run, tmp_path: Path, content: str, mode: int, said: str) -> None:
    (tmp_path / "key").write_text(content)
    (tmp_path / "key").chmod(mode)
    ran = run("tdml-peer", "key", "--home", tmp_path)
    assert (ran.code, ran.out) == (1, "")
    assert said in ran.err
    assert "hint: " in ran.err
    assert (tmp_path / "key").read_text() == content


def test_status(run: Run, daemon: FakeDaemon) -> None:
    daemon.reply("/status.json", STATUS)
    assert json.loads(run("tdml-peer", "status", "--home", daemon.home, "--json").out) == STATUS
    text = run("tdml-peer", "status", "--home", daemon.home).out
    assert columns(text) == {
        "peer": f"{PEER}  attic",
        "invite": STATUS["invite"],
        "page": STATUS["status_url"],
        "chain": "abababababab  private",
        "height": "412  final after 0.23 s (p99 1.50 s)  last block 3 s ago",
        "peers": "1  unknown  nobody has dialled",
        "role": "validator, 2 in the set",
        "balance": "1000  bonded 250  earned 12",
        "task": "stage  bond  settled_cells  lease_until",
        "cdcdcdcdcdcd": "1      5     40             500",
        "warning:": "Verdicts rest on one owner.",
        "hint:": "bond more",
    }


def test_status_shows_the_latest_audits_and_evictions(run: Run, daemon: FakeDaemon) -> None:
    audit = {"audit": "ab" * 32, "status": "convicted", "task": "cd" * 32, "step": 5, "stage": 1, "cell": "optimiser",
             "worker": OTHER, "auditor": PEER, "votes": 3, "finding": "fraud", "off": "gw 4e+03 τ"}  # fmt: skip
    evicted = {"peer": OTHER, "task": "cd" * 32, "step": 5, "reason": "faulted", "evidence": "ef" * 32,
               "slashed": "0", "height": 77}  # fmt: skip
    daemon.reply("/status.json", STATUS | {"recent_audits": [audit], "evictions": [evicted]})
    lines = run("tdml-peer", "status", "--home", daemon.home).out.splitlines()
    shown = [" ".join(line.split()) for line in lines]
    at = shown.index("latest audits")
    assert shown[at + 1] == "audit status step stage cell worker auditor off votes"
    assert shown[at + 2] == f"abababababab convicted 5 1 optimiser …{OTHER[-8:]} …{PEER[-8:]} gw 4e+03 τ 3"
    at = shown.index("evictions")
    assert shown[at + 2] == f"…{OTHER[-8:]} 5 faulted 0 77 efefefefefef"
    assert shown[-1] == "hint: bond more"


def test_status_of_a_peer_that_has_just_started(run: Run, daemon: FakeDaemon) -> None:
    empty = {"p50": None, "p99": None, "block_age": None}
    young = STATUS | {"finality": empty, "seats": [], "warnings": [], "name": "", "status_url": None, "syncing": True}
    daemon.reply("/status.json", young | {"is_validator": False, "validators": [], "peers": []})
    found = columns(run("tdml-peer", "status", "--home", daemon.home).out)
    assert (found["height"], found["role"], found["peer"]) == ("412", "not a validator, 0 in the set", PEER)
    assert found["chain"].endswith("syncing")
    assert not {"page", "task", "warning:", "hint:"} & found.keys()


def test_status_is_printed_again_until_an_interruption(
    run: Run, daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses = iter([None, KeyboardInterrupt()])

    def pause(seconds: float) -> None:
        if (event := next(pauses)) is not None:
            raise event

    monkeypatch.setattr(commands.time, "sleep", pause)
    daemon.reply("/status.json", STATUS)
    ran = run("tdml-peer", "status", "--watch", "--home", daemon.home, "--json")
    assert ran.code == 130
    assert [json.loads(line) for line in ran.out.splitlines()] == [STATUS, STATUS]


def test_tasks(run: Run, daemon: FakeDaemon) -> None:
    daemon.reply("/tasks.json", [TASK])
    assert json.loads(run("tdml-peer", "tasks", "--home", daemon.home, "--json").out) == [TASK]
    head, row = run("tdml-peer", "tasks", "--home", daemon.home).out.splitlines()
    assert head.split() == list(TASK)
    assert row.split() == ["cdcdcdcdcdcd", f"…{PEER[-8:]}", "running", "2", "1", "yes"]
    daemon.reply("/tasks.json", [])
    assert run("tdml-peer", "tasks", "--home", daemon.home).out == "none\n"
    assert run("tdml-peer", "tasks", "--home", daemon.home, "--json").out == "[]\n"


@pytest.mark.parametrize(("words", "body"), WALLET)
def test_wallet(run: Run, daemon: FakeDaemon, words: tuple[str, ...], body: dict[str, str]) -> None:
    daemon.reply("/transactions", {"id": "ef" * 32, "height": 9})
    text = run("tdml-peer", *words, "--home", daemon.home)
    told = run("tdml-peer", *words, "--home", daemon.home, "--json")
    assert (text.code, columns(text.out)) == (0, {"id": "ef" * 32, "height": "9"})
    assert (told.code, json.loads(told.out)) == (0, {"id": "ef" * 32, "height": 9})
    assert daemon.requests == [("POST", "/transactions", body)] * 2


@pytest.mark.parametrize(("status", "code"), [(400, 2), (409, 1), (413, 1), (504, 1)])
def test_a_refused_transaction(run: Run, daemon: FakeDaemon, status: int, code: int) -> None:
    daemon.reply("/transactions", {"error": "The ledger refused it: no-funds.", "hint": "earn some"}, status)
    ran = run("tdml-peer", "stake", "5", "--home", daemon.home, "--json")
    assert (ran.code, ran.out) == (code, "")
    assert ran.err == "error: The ledger refused it: no-funds.\nhint: earn some\n"


@pytest.mark.parametrize(
    "line",
    [
        *(
            "stake",
            "stake much",
            "stake 1.5",
            "stake -5",
            "stake 1e3",
            "unstake",
            "send",
            f"send {OTHER}",
            f"send {OTHER} 5 6",
        ),
        *("status --every 5", "tasks all", "key --secret", "start --threads many", "nothing", "init --genesis"),
        *("demo --steps x", "generate", "train --steps", "stake 1 --home"),
    ],
)
def test_wrong_usage(run: Run, line: str) -> None:
    ran = run("tdml-peer", *line.split())
    message, hint = ran.err.splitlines()
    assert (ran.code, ran.out) == (2, "")
    assert message.startswith("error: ")
    assert hint == "hint: see tdml-peer --help"


@pytest.mark.parametrize("line", ["status", "tasks", "stake 5", "unstake 5", f"send {OTHER} 5", "faucet"])
def test_a_daemon_that_has_stopped(run: Run, tmp_path: Path, line: str) -> None:
    ran = run("tdml-peer", *line.split(), "--home", tmp_path)
    assert (ran.code, ran.out) == (3, "")
    assert ran.err.startswith(f"error: No peer answers at {tmp_path} (nothing listens there).\nhint: start one with ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("line", ["status", "tasks", "faucet"])
@pytest.mark.parametrize("body", [b"", b"<html>", b'{"peer":', b"\xff"])
def test_an_answer_that_is_none(run: Run, daemon: FakeDaemon, line: str, body: bytes) -> None:
    for status in (200, 400, 500):
        for path in ("/status.json", "/tasks.json", "/transactions"):
            daemon.reply(path, body, status)
        ran = run("tdml-peer", line, "--home", daemon.home)
        assert (ran.code, ran.out) == (1, "")
        assert ran.err == "error: The peer gave an answer that cannot be read.\nhint: see its log\n"


def test_a_model_that_is_not_there(run: Run, tmp_path: Path) -> None:
    ran = run("tdml-peer", "generate", "--model", tmp_path / "none", "--prompt", "def ")
    assert (ran.code, ran.out) == (1, "")
    assert "hint: " in ran.err


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Return with what settings `start` and `train` were called; neither runs."""
    calls: list[tuple[Any, ...]] = []

    async def note(*arguments: Any) -> int:
        await trio.lowlevel.checkpoint()
        calls.append(arguments[:-1])
        return 0

    monkeypatch.setattr(peer, "run_start", note)
    monkeypatch.setattr(train, "run_train", note)
    return calls


def test_the_settings_file_of_a_new_home_holds_the_defaults(
    run: Run, tmp_path: Path, started: list[tuple[Any, ...]]
) -> None:
    run("tdml-peer", "init", "--home", tmp_path)
    path = tmp_path / "config.toml"
    assert tomllib.loads(path.read_text()) == {}
    lines = [line.removeprefix("# ") for line in path.read_text().splitlines() if " = " in line]
    path.write_text("\n".join(lines))
    assert tomllib.loads(path.read_text()).keys() == {
        field.name.replace("_", "-") for field in fields(PeerConfig) if field.name != "home"
    }
    assert run("tdml-peer", "start", "--home", tmp_path).code == 0
    assert started == [(PeerConfig(home=tmp_path),)]


def test_flags_come_before_the_environment_and_that_before_the_file(
    run: Run, tmp_path: Path, started: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.toml").write_text('threads = 2\nstatus-port = 7\npublic-name = "file"\n[train]\nsteps = 3\n')
    monkeypatch.setenv("TDML_STATUS_PORT", "8")
    monkeypatch.setenv("TDML_PUBLIC_NAME", "environment")
    assert run("tdml-peer", "start", "--home", tmp_path, "--public-name", "flag").code == 0
    assert run("tdml-peer", "train", "--home", tmp_path, "--seed", "5").code == 0
    expected = PeerConfig(home=tmp_path, threads=2, status_port=8, public_name="environment")
    assert started == [
        (PeerConfig(home=tmp_path, threads=2, status_port=8, public_name="flag"),),
        (expected, TrainConfig(steps=3, seed=5)),
    ]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--lora 8", TrainConfig(lora=8)),
        (
            "--lora 8 --lora-alpha 16 --lora-targets q_proj --lora-targets v_proj --lora-dropout 0.1",
            TrainConfig(lora=8, lora_alpha=16, lora_targets=("q_proj", "v_proj"), lora_dropout=0.1),
        ),
        ("--lora 8 --lora-targets q_proj,v_proj", TrainConfig(lora=8, lora_targets=("q_proj,v_proj",))),
    ],
)
def test_adapters_are_asked_for_by_their_rank(
    flags: str, expected: TrainConfig, run: Run, tmp_path: Path, started: list[tuple[Any, ...]]
) -> None:
    assert run("tdml-peer", "train", "--home", tmp_path, *flags.split()).code == 0
    assert started == [(PeerConfig(home=tmp_path), expected)]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("threads = ", "is not TOML"),
        ("thread = 1", "has a setting 'thread' that does not exist"),
        ("[train]\nstep = 1", "has a setting 'step' that does not exist"),
        ("train = 1", "is not a table"),
        ('home = "/elsewhere"', "has a setting 'home' that does not exist"),
        ('threads = "many"', "threads"),
    ],
)
def test_a_settings_file_without_sense(
    run: Run, tmp_path: Path, started: list[tuple[Any, ...]], content: str, said: str
) -> None:
    (tmp_path / "config.toml").write_text(content)
    ran = run("tdml-peer", "start", "--home", tmp_path)
    assert (ran.code, started) == (2, [])
    assert said in ran.err
    assert "hint: " in ran.err
