"""What `tdml-chain` says of a chain's life: exact values, the text, whole ids, raw bytes, refusals."""

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from chain_kit import ALICE, UNKNOWN
from control_kit import Run

from chain.genesis import from_json
from chain.hashing import digest
from chain.keys import peer_id
from chain.state import holdings
from tests.chain.ledger_kit import KEYS, Ledger

Data = Callable[[str], Any]
Text = Callable[[str], str]


@pytest.fixture
def data(run: Run, chain_db: Path, names: dict[str, str]) -> Data:
    """Return the data of a command's JSON; upper-case words stand for ids."""

    def of_line(line: str) -> Any:
        words = [names.get(word, word) for word in line.split()]
        ran = run("tdml-chain", *words, "--db", chain_db, "-o", "json")
        assert (ran.code, ran.err) == (0, "")
        answer = json.loads(ran.out)
        assert answer.keys() == {"schema_version", "success", "data", "errors", "warnings"}
        return answer["data"]

    return of_line


@pytest.fixture
def text(run: Run, chain_db: Path, names: dict[str, str]) -> Text:
    """Return what a command prints for people; upper-case words stand for ids."""

    def of_line(line: str) -> str:
        ran = run("tdml-chain", *[names.get(word, word) for word in line.split()], "--db", chain_db)
        assert (ran.code, ran.err) == (0, "")
        return ran.out

    return of_line


def rows(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_status(data: Data, text: Text, ledger: Ledger) -> None:
    found = data("status")
    state = ledger.state
    assert found["chain_id"] == ledger.genesis.chain_id.hex()
    assert (found["height"], found["state_root"]) == (state.height, state.root.hex())
    assert (found["validators"], found["power"]) == (5, str(state.validators().total))
    assert (found["open_tasks"], found["convictions"], found["warnings"]) == (1, 2, [])
    assert ["height", str(state.height)] in rows(text("status"))


def test_blocks(data: Data, text: Text, ledger: Ledger) -> None:
    height = ledger.state.height
    assert [block["height"] for block in data("blocks")] == list(range(height - 19, height + 1))
    assert len(data("blocks --count 999")) == height
    assert [line[0] for line in rows(text("blocks --count 2"))] == ["height", str(height - 1), str(height)]
    assert text("blocks --count 0").strip() == "none"


def test_a_block_by_height_hash_and_place(data: Data, text: Text, ledger: Ledger) -> None:
    block = data("block HEIGHT")
    assert [(tx["kind"], tx["reason"]) for tx in block["transactions"]] == [("Transfer", ""), ("Transfer", "no-funds")]
    assert data(f"block {block['hash']}") == block
    assert data("block latest") == data("block") == data(f"block {ledger.state.height}")
    assert data("block earliest")["height"] == 1
    assert [event["kind"] for event in data("block 15")["events"]] == [e.kind for e in ledger.blocks[14][3].events]
    assert "no-funds" in text("block HEIGHT")
    assert "slashed" in text("block 15")


def test_transactions(data: Data, text: Text, names: dict[str, str]) -> None:
    sent, refused = data("tx TX"), data("tx REFUSED")
    assert (sent["ok"], sent["reason"], sent["place"]) == (True, "", 0)
    assert sent["payload"] == {"to": names["BOB"], "amount": "1"}
    assert (refused["ok"], refused["reason"], refused["place"]) == (False, "no-funds", 1)
    assert sent["height"] == refused["height"] == int(names["HEIGHT"])
    assert ["reason", "no-funds"] in rows(text("tx REFUSED"))
    assert ["ok", "yes"] in rows(text("tx TX"))


def test_accounts(data: Data, text: Text, ledger: Ledger, names: dict[str, str]) -> None:
    account = ledger.state.account(ALICE.account)
    assert data("account ALICE")["balance"] == str(account.balance)
    assert data("account CHEAT")["barred"] is True
    [unbonding] = data("account UNBONDING")["unbonding"]
    assert unbonding["amount"] == "10"
    assert ["10", str(unbonding["release_at"])] in rows(text("account UNBONDING"))
    assert ["balance", str(account.balance)] in rows(text("account ALICE"))


def test_validators(data: Data, text: Text, names: dict[str, str]) -> None:
    found = data("validators")
    assert {line["validator"] for line in found} == {peer_id(key.account) for key in KEYS[:6]}
    assert [line["is_active"] for line in found].count(False) == 1
    equivocator = data("validator TWOFACED")
    assert (equivocator["is_tombstoned"], equivocator["bonded"]) == (True, "0")
    assert equivocator in found
    assert ["is_tombstoned", "yes"] in rows(text("validator TWOFACED"))
    assert len(rows(text("validators"))) == 7


def test_tasks_and_workers(data: Data, text: Text, names: dict[str, str]) -> None:
    [task] = data("tasks")
    assert (task["id"], task["generation"], task["settled"], task["status"]) == (names["TASK"], 1, 8, "running")
    assert data("task TASK") == {**task, "workers": data("workers --task TASK")}
    assert data("workers") == data("workers --task TASK")
    assert data("workers --task UNKNOWN") == []
    [seat] = data("worker CHEAT")["seats"]
    assert (seat["status"], seat["bond"], seat["stage"]) == ("evicted", "0", 0)
    assert data("worker CHEAT")["barred"] is True
    grid = rows(text("task TASK"))[-3:]
    assert [line[0] for line in grid] == ["0", "1", "evicted"]
    assert [line.count("cells") for line in grid] == [1, 2, 0]
    assert names["CHEAT"][-8:] in text("workers")
    assert names["CHEAT"] in text("workers --verbose")


def test_an_audit_from_the_claim_to_the_slash(data: Data, text: Text, names: dict[str, str]) -> None:
    audit = data("audit AUDIT")
    assert (audit["status"], audit["finding"], audit["worker"]) == ("convicted", "fraud", names["CHEAT"])
    assert audit["deviations"] == {"y": 2.0, "gx": 2.0, "gw": 2.0}
    assert audit["thresholds"] == {"y": 2.5e-6, "gx": 2.7e-5, "gw": 3.5e-5}
    assert audit["tolerance"] == [1, 1, 1]
    assert [vote["role"] for vote in audit["votes"]] == ["third", "voter", "voter", "voter", "voter"]
    assert {vote["ballot"] for vote in audit["votes"]} == {"against-worker"}
    assert audit["tally"] == {
        "stake": "4000000",
        "quorum": "2666667",
        "against_worker": "4000000",
        "against_auditor": "0",
    }
    assert [event["kind"] for event in audit["timeline"]] == [
        *("drawn", "committed", "opened", "disputed", "opinion", "ballot", "ballot", "ballot", "ballot"),
        *("convicted", "evicted", "slashed"),
    ]
    said = text("audit AUDIT")
    assert "votes    ✕✕✕✕✕" in said
    assert "gw  ✕  2.00e+00  tolerance 3.50e-05" in said
    assert f"slashed  1000 of …{names['CHEAT'][-8:]}" in said


def test_an_audit_that_passed(data: Data, text: Text, ledger: Ledger) -> None:
    passed = str(ledger.happened("passed")[0]["audit"])
    audit = data(f"audit {passed}")
    assert (audit["status"], audit["finding"], audit["votes"], audit["slashed"]) == ("passed", "match", [], "0")
    assert audit["deviations"] == {"y": 0.0, "gx": 0.0, "gw": 0.0}
    said = text(f"audit {passed}")
    assert "y   ✓  0.00e+00  tolerance 2.50e-06" in said
    assert "votes" not in said


def test_a_claim(data: Data, text: Text, names: dict[str, str]) -> None:
    claim = data("claim CLAIM")
    assert claim["claim"]["task"] == names["TASK"]
    assert (claim["is_void"], claim["is_settled"]) == (True, False)
    assert ["cells", "0", "2"] in rows(text("claim CLAIM"))


def test_evidence(data: Data, text: Text, names: dict[str, str]) -> None:
    verdict, equivocation = data("evidence")
    assert (verdict["kind"], verdict["subject"], verdict["slashed"]) == ("verdict", names["AUDIT"], "1000")
    assert (equivocation["kind"], equivocation["account"]) == ("equivocation", names["TWOFACED"])
    assert data("evidence AUDIT")["audit"] == data("audit AUDIT")
    assert data(f"evidence {verdict['id']}") == data("evidence AUDIT")
    votes = data("evidence EVIDENCE")["votes"]
    assert [vote["kind"] for vote in votes] == ["notarize", "notarize"]
    assert votes[0]["block_hash"] != votes[1]["block_hash"]
    assert {vote["validator"] for vote in votes} == {names["TWOFACED"]}
    assert "votes    ✕✕✕✕✕" in text("evidence AUDIT")
    assert "conflicting votes" in text("evidence EVIDENCE")
    assert [line[1] for line in rows(text("evidence"))] == ["kind", "verdict", "equivocation"]


@pytest.mark.parametrize(
    ("line", "said"), [("certificate 3", "votes  ✓✓✓✓✓✓  6 signatures"), ("votes 3", "finalize  ✓✓✓✓✓✓")]
)
def test_a_certificate_shows_each_validator_of_its_set(data: Data, text: Text, line: str, said: str) -> None:
    certificate = data(line)
    assert certificate["height"] == 3
    assert certificate["block_hash"] == data("block 3")["hash"]
    assert certificate["bitmap"] == [True] * 6
    assert {voter["validator"] for voter in certificate["validators"]} == {peer_id(key.account) for key in KEYS[:6]}
    assert {voter["power"] for voter in certificate["validators"]} == {"1000000"}
    assert len(certificate["signatures"]) == 6
    assert said in text(line)


def test_params_supply_and_genesis(data: Data, text: Text, ledger: Ledger) -> None:
    assert data("params")["history_blocks"] == ledger.genesis.params.history_blocks
    supply = data("supply")
    assert supply["is_conserved"] is True
    assert {name: int(supply[name]) for name in holdings(ledger.state)} == holdings(ledger.state)
    assert int(supply["issued"]) == ledger.genesis.issued
    assert ["is_conserved", "yes"] in rows(text("supply"))
    assert from_json(text("genesis")) == ledger.genesis
    assert from_json(json.dumps(data("genesis"))) == ledger.genesis


def test_nobody_waits_in_a_database(data: Data, text: Text) -> None:
    assert data("mempool") == []
    assert text("mempool") == "none\n"


def test_watch_in_text(text: Text, ledger: Ledger) -> None:
    lines = rows(text("watch"))
    assert [line[1] for line in lines] == ledger.kinds()
    assert rows(text("watch --from 16")) == [line for line in lines if int(line[0]) >= 16]
    [slashed] = rows(text("watch --topics slashed"))
    assert slashed[:2] == ["15", "slashed"]
    assert "amount=1000" in slashed


@pytest.mark.parametrize(("line", "name"), [("block HEIGHT", "header"), ("tx TX", "transaction")])
def test_raw_bytes_hash_to_the_id(data: Data, text: Text, line: str, name: str) -> None:
    raw = bytes.fromhex(text(f"{line} --raw"))
    known = data(line)
    assert digest(name, raw).hex() == known["hash" if name == "header" else "id"]


def test_fields(data: Data, text: Text, names: dict[str, str]) -> None:
    assert text("account CHEAT --field barred") == "true\n"
    assert text("evidence --field kind").split() == ["verdict", "equivocation"]
    assert text("evidence AUDIT --field audit.worker").strip() == names["CHEAT"]
    assert data("tx TX --field payload.amount") == "1"


@pytest.mark.parametrize(
    "line",
    [
        *("block 9999", "block UNKNOWN", "certificate 0", "tx UNKNOWN", "account STRANGER", "validator ALICE"),
        *("task UNKNOWN", "worker STRANGER", "claim UNKNOWN", "audit UNKNOWN", "evidence UNKNOWN"),
    ],
)
def test_what_is_not_on_the_chain(run: Run, chain_db: Path, names: dict[str, str], line: str) -> None:
    ran = run("tdml-chain", *[names.get(word, word) for word in line.split()], "--db", chain_db, "-o", "json")
    message, hint = ran.err.splitlines()
    assert ran.code == 1
    assert message.startswith("error: ")
    assert message.endswith(".")
    assert hint.startswith("hint: ")
    answer = json.loads(ran.out)
    assert (answer["success"], answer["data"], answer["errors"]) == (False, None, [message.removeprefix("error: ")])


@pytest.mark.parametrize(
    "line",
    [
        *("block first", "block 3.5", "block -1", "certificate x", "tx zz", "task ZZ", "claim 1", "audit 0x00"),
        *("account me", f"account {UNKNOWN}", "validator x", "worker x", "workers --task zz", "evidence zz"),
        *("blocks --count -1", f"blocks --count {10**30}", "watch --from -1", "watch --count -1"),
        *("watch --count many", "watch --from 1e3"),
        *("block 3 --field header.colour", "params --raw", "status -o yaml", "account", "tx", "nothing", "db"),
    ],
)
def test_what_makes_no_sense_is_a_matter_of_usage(run: Run, chain_db: Path, line: str) -> None:
    ran = run("tdml-chain", *line.split(), "--db", chain_db)
    message, hint = ran.err.splitlines()
    assert ran.code == 2
    assert message.startswith("error: ")
    assert hint.startswith("hint: ")
    assert ran.out == ""


def test_a_database_that_does_not_check_out(run: Run, chain_db: Path, tmp_path: Path) -> None:
    path = tmp_path / "chain.db"
    path.write_bytes(chain_db.read_bytes())
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE receipts SET reason = '' WHERE reason != ''")
    ran = run("tdml-chain", "db", "check", "--db", path)
    assert ran.code == 1
    assert "the stored receipts differ" in ran.out
    assert ran.err == "error: The database does not check out.\nhint: see the problem above\n"


def test_a_database_that_checks_out(data: Data, text: Text, ledger: Ledger) -> None:
    assert data("db check") == {"from": 1, "ok": True, "height": ledger.state.height, "problem": None}
    assert ["ok", "yes"] in rows(text("db check"))
