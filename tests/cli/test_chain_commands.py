"""`tdml-chain` on a database of real blocks and on a peer: every command, in text and in JSON."""

import json
from pathlib import Path
from typing import Any

import pytest
from control_kit import FakeDaemon, Run

from chain.keys import peer_id
from chain.transactions import Transfer
from tests.chain.ledger_kit import KEYS, Ledger, genesis_of, start_swarm
from tests.chain.store_kit import write

ALICE, BOB = KEYS[6], KEYS[7]
NOWHERE = "ab" * 32


@pytest.fixture(scope="module")
def lived() -> Ledger:
    """A short life with a task, a cheat that was convicted, and a transfer."""
    swarm = start_swarm(Ledger(genesis_of()))
    swarm.deviation[swarm.seated(0)[0]] = -2.0
    swarm.work(30)
    swarm.ledger.one(ALICE, Transfer(BOB.account, 1))
    assert swarm.ledger.happened("slashed")
    return swarm.ledger


@pytest.fixture(scope="module")
def database(lived: Ledger, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "chain.db"
    write(lived, path).close()
    return path


@pytest.fixture
def ask(run: Run, database: Path) -> Any:
    """Return the data that a command prints about the database as JSON."""

    def of_command(*arguments: object) -> Any:
        ran = run("tdml-chain", *arguments, "--db", database, "-o", "json")
        assert ran.code == 0, ran.err
        answer = json.loads(ran.out)
        assert answer["success"] is True
        assert answer["errors"] == []
        return answer["data"]

    return of_command


@pytest.fixture
def names(lived: Ledger) -> dict[str, str]:
    """Return an id of each kind."""
    [slashed] = lived.happened("slashed")
    return {
        "TASK": str(slashed["task"]),
        "AUDIT": str(slashed["evidence"]),
        "CHEAT": str(slashed["worker"]),
        "ALICE": peer_id(ALICE.account),
        "VALIDATOR": peer_id(KEYS[0].account),
        "CLAIM": str(lived.happened("claimed")[0]["claim"]),
    }


COMMANDS = [
    "status", "blocks", "block", "block 3", "account ALICE", "validators", "validator VALIDATOR", "tasks", "task TASK",
    "workers", "workers --task TASK", "worker CHEAT", "claim CLAIM", "audit AUDIT", "evidence", "certificate 2",
    "params", "supply", "mempool", "genesis", "db check",
]  # fmt: skip


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_answers_in_text_and_in_json(
    run: Run, ask: Any, database: Path, names: dict[str, str], line: str
) -> None:
    words = [names.get(word, word) for word in line.split()]
    text = run("tdml-chain", *words, "--db", database)
    assert (text.code, text.err) == (0, "")
    assert "Traceback" not in text.out
    assert text.out.strip() or line == "mempool"
    assert ask(*words) is not None


def test_the_answers_say_what_happened(ask: Any, lived: Ledger, names: dict[str, str]) -> None:
    height = lived.state.height
    assert ask("status")["height"] == height
    assert ask("block", height)["height"] == height
    assert ask("block")["hash"] == ask("block", height)["hash"]
    [conviction] = ask("evidence")
    assert (conviction["account"], conviction["subject"]) == (names["CHEAT"], names["AUDIT"])
    found = ask("audit", names["AUDIT"])
    assert found["worker"] == names["CHEAT"]
    assert found["status"] == "convicted"
    assert [worker["status"] for worker in ask("workers") if worker["worker"] == names["CHEAT"]] == ["evicted"]
    assert ask("account", names["ALICE"])["nonce"] == lived.state.account(ALICE.account).nonce
    assert ask("db", "check")["ok"] is True


def test_a_transaction_is_found_with_its_receipt(ask: Any) -> None:
    block = next(block for block in ask("blocks", "--count", 99) if block["transactions"])
    identity = ask("block", block["height"])["transactions"][0]["id"]
    assert ask("tx", identity)["height"] == block["height"]


def test_the_text_of_an_audit_shows_votes(run: Run, database: Path, names: dict[str, str]) -> None:
    said = run("tdml-chain", "audit", names["AUDIT"], "--db", database).out
    assert "convicted" in said
    assert "against-worker" in said


def test_watch_prints_all_events(run: Run, database: Path, lived: Ledger) -> None:
    lines = run("tdml-chain", "watch", "--db", database, "-o", "json").out.splitlines()
    assert [json.loads(line)["kind"] for line in lines] == lived.kinds()
    some = run("tdml-chain", "watch", "--db", database, "--topics", "slashed,evicted", "-o", "json").out.splitlines()
    assert {json.loads(line)["kind"] for line in some} == {"slashed", "evicted"}
    assert len(run("tdml-chain", "watch", "--db", database, "--count", 3).out.splitlines()) == 3


def test_one_field_and_raw_bytes(run: Run, database: Path) -> None:
    whole = json.loads(run("tdml-chain", "block", 3, "--db", database, "-o", "json").out)["data"]
    assert run("tdml-chain", "block", 3, "--db", database, "--field", "hash").out.strip() == whole["hash"]
    assert run("tdml-chain", "block", 3, "--db", database, "--field", "no.such").code == 2


@pytest.mark.parametrize("line", ["block 9999", f"tx {NOWHERE}", f"audit {NOWHERE}", f"task {NOWHERE}"])
def test_what_is_not_there_is_one_sentence(run: Run, database: Path, line: str) -> None:
    ran = run("tdml-chain", *line.split(), "--db", database)
    assert ran.code == 1
    assert ran.err.startswith("error: ")
    assert ran.out == ""


@pytest.mark.parametrize("line", ["tx", "block x y z", "nonsense", "blocks --count many", "status -o yaml"])
def test_wrong_usage_is_one_sentence_and_a_hint(run: Run, database: Path, line: str) -> None:
    ran = run("tdml-chain", *line.split())
    assert ran.code == 2
    assert ran.err.startswith("error: ")
    assert "hint: " in ran.err


def test_a_file_that_is_no_database(run: Run, tmp_path: Path) -> None:
    (tmp_path / "chain.db").write_bytes(b"no database" * 999)
    for path in (tmp_path / "chain.db", tmp_path / "none.db"):
        ran = run("tdml-chain", "status", "--db", path)
        assert ran.code == 1
        assert ran.err.startswith("error: ")
        assert "hint: " in ran.err


def test_a_peer_is_asked_through_its_socket(run: Run, daemon: FakeDaemon) -> None:
    daemon.reply("/chain/status", {"height": 7})
    ran = run("tdml-chain", "status", "--home", daemon.home, "-o", "json")
    assert json.loads(ran.out)["data"] == {"height": 7}
    assert [path for _, path, _ in daemon.requests] == ["/chain/status"]


def test_a_peer_that_does_not_run(run: Run, tmp_path: Path) -> None:
    ran = run("tdml-chain", "status", "--home", tmp_path)
    assert ran.code == 3
    assert "No peer answers" in ran.err


def test_a_peer_that_answers_nonsense(run: Run, daemon: FakeDaemon) -> None:
    daemon.reply("/chain/status", b"<html>")
    ran = run("tdml-chain", "status", "--home", daemon.home)
    assert ran.code == 1
    assert "cannot be read" in ran.err


def test_what_cheating_is_worth(run: Run, ask: Any, database: Path) -> None:
    found = ask("params", "--economics", "--price", "10", "--cells-in-flight", "0")
    assert found["is_sound"] is True
    assert found["bond"] == found["least_bond"] == 260
    cheats = {row["cheat"]: row for row in found["cheats"]}
    assert cheats["cheat and hope"]["cells_for_certainty"] == 178
    assert cheats["leave out optimiser's steps"]["cells_for_certainty"] == 362
    cheap = ask("params", "--economics", "--price", "10", "--bond", "5")
    assert cheap["is_sound"] is False
    said = run("tdml-chain", "params", "--economics", "--db", database).out
    assert "no way to cheat pays more than once" in said
    refused = run("tdml-chain", "params", "--economics", "--audit-rate", "0", "--db", database)
    assert refused.code == 2
    assert "make no sense" in refused.err
