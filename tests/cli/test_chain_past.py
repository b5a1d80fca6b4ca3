"""`tdml-chain votes`, and `--height` on what is asked about the state."""

import json
from pathlib import Path
from typing import Any

import pytest
from chain_kit import ALICE, STRANGER
from control_kit import Run

from chain.blocks import ValidatorSet, Vote, VoteKind
from chain.keys import peer_id
from chain.queries import answer, open_reader
from chain.query_votes import Deciding
from cli.render_chain import votes
from tests.chain.ledger_kit import KEYS, Ledger

NAME = peer_id(ALICE.account)


@pytest.fixture
def ask(run: Run, chain_db: Path) -> Any:
    """Return the data that a command prints about the database as JSON."""

    def of_command(*words: object) -> Any:
        ran = run("tdml-chain", *words, "--db", chain_db, "-o", "json")
        assert (ran.code, ran.err) == (0, "")
        return json.loads(ran.out)["data"]

    return of_command


def test_votes_of_a_final_height(run: Run, ask: Any, chain_db: Path) -> None:
    told = ask("votes", 2)
    assert (told["height"], told["status"]) == (2, "final")
    signed = [voter for voter in told["validators"] if voter["signed"]]
    assert told["signed_power"] == str(sum(int(voter["power"]) for voter in signed))
    assert int(told["quorum"]) <= int(told["signed_power"]) <= int(told["power"])
    assert told["bitmap"] == [voter["signed"] for voter in told["validators"]]
    text = run("tdml-chain", "votes", 2, "--db", chain_db).out
    assert f"finalize  {''.join('✕✓'[signed] for signed in told['bitmap'])}" in text
    assert run("tdml-chain", "votes", 10**6, "--db", chain_db).code == 1


def test_votes_of_the_height_under_decision(chain_db: Path) -> None:
    reader = open_reader(chain_db)
    height = reader.state.height + 1
    validators = ValidatorSet.of((key.account, 10 + i) for i, key in enumerate(KEYS[:4]))
    said = [(VoteKind.NOTARIZE, 0), (VoteKind.NOTARIZE, 1), (VoteKind.NULLIFY, 2), (VoteKind.FINALIZE, 1)]
    heard = tuple(
        Vote(
            kind, b"c" * 32, height, 3, bytes(32) if kind == VoteKind.NULLIFY else b"b" * 32, KEYS[i].account, b"s" * 64
        )
        for kind, i in said
    )
    reader.deciding = lambda: Deciding(height, 3, KEYS[1].account, validators, heard)
    told = answer(reader, "votes", {"id": str(height)})
    by_name = {voter["validator"]: voter for voter in told["validators"]}
    assert (told["status"], told["view"], told["leader"]) == ("under-decision", 3, peer_id(KEYS[1].account))
    assert (told["power"], told["quorum"], told["signed_power"]) == ("46", "31", "11")
    assert [by_name[peer_id(key.account)]["notarized"] for key in KEYS[:4]] == [True, True, False, False]
    assert [by_name[peer_id(key.account)]["nullified"] for key in KEYS[:4]] == [False, False, True, False]
    assert [by_name[peer_id(key.account)]["signed"] for key in KEYS[:4]] == [False, True, False, False]
    text = votes(told, False)
    assert {"finalize", "notarize", "nullify"} <= {line.split()[0] for line in text.splitlines()}
    assert answer(reader, "votes", {"id": str(height - 1)})["status"] == "final"


@pytest.mark.parametrize("back", [0, 1, 5])
def test_an_account_at_an_older_height(ask: Any, ledger: Ledger, back: int) -> None:
    height = ledger.state.height - back
    told = ask("account", NAME, "--height", height)
    proven = ask("proof", "account", NAME, "--height", height)
    assert proven["height"] == height
    assert proven["record"]["balance"] == told["balance"]
    assert ask("status", "--height", height)["height"] == height
    assert ask("status", "--height", height)["hash"] == ask("block", height)["hash"]
    assert ask("supply", "--height", height)["is_conserved"] is True


def test_what_came_later_is_not_in_an_older_state(run: Run, ask: Any, chain_db: Path, names: dict[str, str]) -> None:
    audit = ask("audit", names["AUDIT"])
    drawn = audit["drawn_at"]
    assert run("tdml-chain", "audit", names["AUDIT"], "--height", drawn - 1, "--db", chain_db).code == 1
    then = ask("audit", names["AUDIT"], "--height", drawn)
    assert then["status"] == "drawn"
    assert all(event["height"] <= drawn for event in then["timeline"])
    assert ask("evidence", "--height", drawn) == []


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("block", "2", "--height", "2"), 2, "does not depend on a height"),
        (("account", NAME, "--height", "1000000"), 1, "is not kept"),
        (("account", NAME, "--height", "-1"), 2, "height"),
        (("account", STRANGER, "--height", "3"), 1, "never used"),
    ],
)
def test_heights_that_make_no_sense(run: Run, chain_db: Path, words: tuple[str, ...], code: int, said: str) -> None:
    ran = run("tdml-chain", *words, "--db", chain_db)
    assert ran.code == code
    assert said in ran.err
