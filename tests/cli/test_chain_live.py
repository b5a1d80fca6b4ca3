"""`tdml-chain` on a running peer: the peer's own control interface answers as the database does."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from chain_kit import ALICE, BOB, inspected
from control_kit import FakeDaemon, Ran, Run

from chain.transactions import Transaction, Transfer
from tests.chain.ledger_kit import Ledger

LINES = [
    *("status", "blocks --count 5", "block HEIGHT", "tx TX", "tx REFUSED", "account UNBONDING", "validators"),
    *("validator TWOFACED", "tasks", "task TASK", "workers --task TASK", "worker CHEAT", "claim CLAIM"),
    *("audit AUDIT", "evidence", "evidence AUDIT", "evidence EVIDENCE", "certificate latest", "params", "supply"),
    *("genesis", "db check", "tx TX --field payload.to", "block 3 --raw"),
]


async def commanded(run: Run, *words: Any) -> Ran:
    return await trio.to_thread.run_sync(partial(run, "tdml-chain", *words))


async def test_a_peer_answers_as_its_database_does(
    run: Run, chain_db: Path, names: dict[str, str], tmp_path: Path
) -> None:
    async with inspected(tmp_path, chain_db):
        for line in LINES:
            words = [names.get(word, word) for word in line.split()]
            for form in ("text", "json"):
                live = await commanded(run, *words, "--home", tmp_path, "-o", form)
                stored = await commanded(run, *words, "--db", chain_db, "-o", form)
                assert live == stored
                assert (live.code, live.err) == (0, "")


@pytest.mark.parametrize(
    ("line", "code"),
    [("block 9999", 1), ("tx UNKNOWN", 1), ("block zz", 2), ("account zz", 2), ("blocks --count -1", 2)],
)
async def test_a_peer_refuses_as_its_database_does(
    run: Run, chain_db: Path, names: dict[str, str], tmp_path: Path, line: str, code: int
) -> None:
    words = [names.get(word, word) for word in line.split()]
    async with inspected(tmp_path, chain_db):
        live = await commanded(run, *words, "--home", tmp_path, "-o", "json")
    assert live == await commanded(run, *words, "--db", chain_db, "-o", "json")
    assert live.code == code


async def test_waiting_transactions(run: Run, ledger: Ledger, chain_db: Path, tmp_path: Path) -> None:
    waiting: Transaction = ledger.sign(ALICE, Transfer(BOB.account, 7))
    async with inspected(tmp_path, chain_db, (waiting,)):
        found = json.loads((await commanded(run, "mempool", "--home", tmp_path, "-o", "json")).out)["data"]
        text = (await commanded(run, "mempool", "--home", tmp_path)).out
    assert [(line["id"], line["kind"]) for line in found] == [(waiting.tx_id.hex(), "Transfer")]
    assert waiting.tx_id.hex()[:12] in text


async def test_watch_streams_blocks_and_their_events(run: Run, ledger: Ledger, chain_db: Path, tmp_path: Path) -> None:
    events = [
        (height, event.kind, event.data)
        for height, (*_, executed) in enumerate(ledger.blocks, 1)
        for event in executed.events
        if event.kind in ("evicted", "slashed")
    ]
    async with inspected(tmp_path, chain_db):
        watch = partial(commanded, run, "watch", "--home", tmp_path, "--from", 1)
        chosen = await watch("--topics", "evicted,slashed", "--count", len(events), "-o", "json")
        text = await watch("--topics", "block", "--count", 3)
        ended = await watch("--topics", "slashed", "--count", 9)
        blocks = [json.loads(line) for line in (await watch("--count", 2, "-o", "json")).out.splitlines()]
    assert [(line["height"], line["kind"], line["data"]) for line in map(json.loads, chosen.out.splitlines())] == events
    assert [line.split()[:2] for line in text.out.splitlines()] == [[str(height), "block"] for height in (1, 2, 3)]
    assert blocks[0]["kind"] == "block"
    assert blocks[0].keys() == {"height", "time", "kind", "data"}
    assert ended.code == 3
    assert "has stopped" in ended.err


def test_a_stopped_peer(run: Run, tmp_path: Path) -> None:
    for words in (("status",), ("watch",), ("db", "check")):
        ran = run("tdml-chain", *words, "--home", tmp_path)
        assert (ran.code, ran.out) == (3, "")
        assert ran.err.splitlines() == [
            f"error: No peer answers at {tmp_path} (nothing listens there).",
            "hint: start one with `tdml-peer start`, or name its folder with --home",
        ]


@pytest.mark.parametrize("body", [b"", b"<html>", b'{"height":', b"\xff\xfe"])
def test_an_answer_that_is_none(run: Run, daemon: FakeDaemon, body: bytes) -> None:
    for status in (200, 500):
        daemon.reply("/chain/params", body, status)
        ran = run("tdml-chain", "params", "--home", daemon.home)
        assert (ran.code, ran.out) == (1, "")
        assert ran.err == "error: The peer gave an answer that cannot be read.\nhint: see its log\n"


@pytest.mark.parametrize("body", [b"[1", b'{"height": 1, "kind": "block", "data": {}}\n<html>\n'])
def test_a_stream_that_breaks_into_nonsense(run: Run, daemon: FakeDaemon, body: bytes) -> None:
    daemon.reply("/chain/watch?", body)
    ran = run("tdml-chain", "watch", "--home", daemon.home)
    assert ran.code == 1
    assert "cannot be read" in ran.err


REPLAYED = {
    "audit": "ab" * 32,
    "worker": "12D3KooWworker",
    "status": "convicted",
    "inputs": "signed by their senders",
    "deviations": {"y": 2.0, "gx": 0.0, "gw": "inf"},
    "thresholds": {"y": 2.5e-6, "gx": 2.7e-5, "gw": 3.5e-5},
    "finding": "fraud",
    "tensors": {"y": 2.0, "gx": 0.0, "gw": "not available", "false": True},
    "machine": {"torch": "2.13.0", "cpu": "AVX2", "kernel": "cd" * 32},
}


@pytest.mark.parametrize(("confirms", "code"), [(True, 0), (None, 0), (False, 1)])
def test_a_peer_replays_an_audit(run: Run, daemon: FakeDaemon, confirms: bool | None, code: int) -> None:
    daemon.reply(f"/replays/{REPLAYED['audit']}", {**REPLAYED, "confirms": confirms})
    found = run("tdml-chain", "audit", REPLAYED["audit"], "--replay", "--home", daemon.home)
    assert daemon.requests == [("POST", f"/replays/{REPLAYED['audit']}", {})]
    assert found.code == code
    assert "signed by their senders" in found.out
    assert "kernel cdcdcdcd" in found.out
    assert ("contradicts" in found.err) is (confirms is False)


@pytest.mark.parametrize("tolerance", [[1, 1, 1], [1, 40, 1]])
def test_a_tolerance_is_told(run: Run, daemon: FakeDaemon, tolerance: list[int]) -> None:
    daemon.reply(f"/replays/{REPLAYED['audit']}", {**REPLAYED, "confirms": True, "tolerance": tolerance})
    found = run("tdml-chain", "audit", REPLAYED["audit"], "--replay", "--home", daemon.home)
    assert ("own results are unsteady" in found.out) is (max(tolerance) > 1)


def test_a_replay_without_its_material_says_so(run: Run, chain_db: Path, names: dict[str, str]) -> None:
    found = run("tdml-chain", "audit", names["AUDIT"], "--replay", "--db", chain_db)
    assert found.code == 1
    assert "manifest cannot be had" in found.err
    assert run("tdml-chain", "audit", "ab" * 32, "--replay", "--db", chain_db).code == 1
    assert run("tdml-chain", "audit", "ab", "--replay", "--node", "/ip4/127.0.0.1/tcp/1/p2p/x").code == 2
