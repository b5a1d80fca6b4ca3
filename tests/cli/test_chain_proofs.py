"""`tdml-chain proof` and `verify`: from a database to a file, and from a file to somebody's trust."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from chain_kit import ALICE, STRANGER
from control_kit import Run

from chain.keys import peer_id

LONG = ("--trusting-hours", "100000000")


@pytest.fixture
def proof(run: Run, chain_db: Path, tmp_path: Path) -> Any:
    """Return a function that writes a proof file."""

    def write(*words: str) -> Path:
        ran = run("tdml-chain", "proof", *words, "--db", chain_db)
        assert (ran.code, ran.err) == (0, "")
        path = tmp_path / "p.json"
        path.write_text(ran.out)
        return path

    return write


@pytest.fixture
def trusted(run: Run, chain_db: Path) -> Any:
    """Return a function that says HEIGHT:HASH of a block."""

    def of_block(ref: str) -> str:
        data = json.loads(run("tdml-chain", "block", ref, "--db", chain_db, "-o", "json").out)["data"]
        return f"{data['height']}:{data['hash']}"

    return of_block


def test_a_balance_is_proven_offline(run: Run, proof: Any, trusted: Any) -> None:
    path = proof("account", peer_id(ALICE.account))
    ran = run("tdml-chain", "verify", path, "--trust", trusted("latest"))
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith("✓ This is the account ")
    shown = json.loads(run("tdml-chain", "verify", path, "--trust", trusted("latest"), "-o", "json").out)
    assert shown["success"] is True
    assert shown["data"]["record"]["balance"] == json.loads(path.read_text())["record"]["balance"]
    assert shown["data"]["present"] is True


@pytest.mark.parametrize(("kind", "table"), [("supply", "chain"), ("conviction", "evidence")])
def test_other_names_of_what_is_proven(
    run: Run, proof: Any, trusted: Any, chain_db: Path, kind: str, table: str
) -> None:
    listed = json.loads(run("tdml-chain", "evidence", "--db", chain_db, "-o", "json").out)["data"]
    path = proof(kind, *([listed[0]["id"]] if kind == "conviction" else []))
    told = json.loads(run("tdml-chain", "verify", path, "--trust", trusted("latest"), "-o", "json").out)["data"]
    assert (told["kind"], told["present"]) == (table, True)


def test_a_stranger_is_proven_to_have_no_account(run: Run, proof: Any, trusted: Any) -> None:
    path = proof("account", STRANGER)
    ran = run("tdml-chain", "verify", path, "--trust", trusted("latest"))
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith("✓ There is no account ")


def test_the_proof_leads_from_an_old_block(run: Run, proof: Any, trusted: Any) -> None:
    path = proof("chain", "--from", "2")
    assert json.loads(path.read_text())["trusted_height"] == 2
    assert run("tdml-chain", "verify", path, "--trust", trusted("2"), *LONG).code == 0
    expired = run("tdml-chain", "verify", path, "--trust", trusted("2"))
    assert expired.code == 1
    assert "trust-expired" in expired.err


def test_another_trusted_block_proves_nothing(run: Run, proof: Any, trusted: Any) -> None:
    path = proof("params")
    ran = run("tdml-chain", "verify", path, "--trust", trusted("3"), "-o", "json")
    assert ran.code == 1
    assert json.loads(ran.out)["success"] is False
    assert "hint: " in ran.err


def test_a_changed_file_proves_nothing(run: Run, proof: Any, trusted: Any) -> None:
    path = proof("account", peer_id(ALICE.account))
    path.write_text(path.read_text().replace('"granted": false', '"granted": true'))
    ran = run("tdml-chain", "verify", path, "--trust", trusted("latest"))
    assert ran.code == 1
    assert "says something else" in ran.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("verify", "FILE"), "--trust"),
        (("verify", "FILE", "--trust", "x"), "HEIGHT:HASH"),
        (("verify", "FILE", "--trust", "5:00"), "block hash"),
        (("verify", "nowhere.json", "--trust", "5:" + "00" * 32), "There is no file"),
        (("verify", "FOLDER", "--trust", "5:" + "00" * 32), "cannot be read"),
        (("proof", "weather"), "Nothing is proven of"),
        (("proof", "account", "nobody"), "peer id"),
        (("proof", "params", "x"), "no key"),
        (("proof", "params", "--from", "1000000"), "There is no height"),
    ],
)
def test_what_makes_no_sense_is_a_matter_of_usage(
    words: tuple[str, ...], said: str, run: Run, proof: Any, chain_db: Path, tmp_path: Path
) -> None:
    places = {"FILE": proof("params"), "FOLDER": tmp_path}
    db = ("--db", chain_db) if words[0] == "proof" else ()
    ran = run("tdml-chain", *[places.get(word, word) for word in words], *db)
    assert ran.code == 2
    assert said in ran.err


def test_an_endless_file_is_no_proof(run: Run) -> None:
    ran = run("tdml-chain", "verify", "/dev/zero", "--trust", "5:" + "00" * 32)
    assert (ran.code, "at most" in ran.err) == (1, True)


def test_verifying_loads_neither_network_nor_tensors() -> None:
    code = (
        "import sys, cli.chain, cli.verification, chain.proofs\n"
        "print([name for name in ('torch', 'libp2p', 'trio', 'starlette', 'transformers') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_a_binary_file_is_no_proof(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_bytes(b"\xff\xfe")
    ran = run("tdml-chain", "verify", path, "--trust", "5:" + "00" * 32)
    assert ran.code == 1
    assert "not text" in ran.err


def test_the_past_can_be_asked(run: Run, chain_db: Path) -> None:
    def supply(*words: str) -> Any:
        return json.loads(run("tdml-chain", "supply", *words, "--db", chain_db, "-o", "json").out)["data"]

    assert supply("--height", "1") != supply()
    assert sum(int(supply("--height", "1")[name]) for name in ("balances", "bonded")) > 0
    beyond = run("tdml-chain", "account", peer_id(ALICE.account), "--height", "100000", "--db", chain_db)
    assert (beyond.code, "is not kept" in beyond.err) == (1, True)
    senseless = run("tdml-chain", "blocks", "--height", "3", "--db", chain_db)
    assert (senseless.code, "does not depend on a height" in senseless.err) == (2, True)
