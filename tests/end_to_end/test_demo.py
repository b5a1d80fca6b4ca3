"""The demonstration from end to end: the loss falls, the cheat is evicted and slashed, and the evidence is there."""

import json
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import trio
from processes_kit import PATIENCE, commands
from rich.console import Console

from cli.report import TextReport
from tdml_p2p.demo.processes import child

PYTHON = (sys.executable, "-m")


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for the demonstration's own, with the short name that sockets need."""
    with tempfile.TemporaryDirectory(prefix="t") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)


def assert_empty(scratch: Path) -> None:
    """Check that nothing of ours is left; torch keeps a cache of its own there."""
    assert not list(scratch.glob("tdml-*"))


def run(*arguments: str, seconds: float = 60) -> str:
    ended = subprocess.run([*PYTHON, *arguments], capture_output=True, text=True, timeout=seconds, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:] + ended.stdout[-2000:]
    return ended.stdout


def last_command(events: list[dict[str, Any]]) -> str:
    """Return the last command that the report tells people to type."""
    printed = StringIO()
    report = TextReport(Console(file=printed, width=160))
    for event in events:
        report(event)
    report.close()
    return re.findall(r"tdml-chain .*", printed.getvalue())[-1]


@pytest.mark.slow
def test_the_demonstration_ends_as_it_says(tmp_path: Path, scratch: Path) -> None:
    out = tmp_path / "demo"
    lines = run("cli.peer", "demo", "--steps", "16", "--out", str(out), "--json", seconds=600).splitlines()
    events: list[dict[str, Any]] = [json.loads(line) for line in lines]
    kinds = {event["kind"] for event in events if event["event"] == "chain"}
    assert {"seated", "drawn", "passed", "disputed", "opinion", "ballot", "convicted", "evicted", "slashed"} <= kinds
    result = events[-1]
    assert result["event"] == "result"
    assert result["ok"] is True
    assert result["loss_last"] < result["loss_first"] - 0.5
    assert len(result["evicted"]) == 1
    assert result["evicted"] == result["expected"]
    assert max(event["step"] for event in events if event["event"] == "step") == 16
    assert not [line for line in commands() if str(tmp_path) in line or str(scratch) in line]
    assert_empty(scratch)
    database = ("--db", str(out / "chain.db"), "-o", "json")
    assert json.loads(run("cli.chain", "db", "check", *database))["data"]["ok"] is True
    assert last_command(events) == f"tdml-chain evidence --db {out}/chain.db"
    assert result["evicted"][0] in run("cli.chain", *last_command(events).split()[1:], "--verbose")
    [conviction] = json.loads(run("cli.chain", "evidence", *database))["data"]
    audit = json.loads(run("cli.chain", "audit", conviction["subject"], *database))["data"]
    assert audit["worker"] == result["evicted"][0]
    replayed = json.loads(run("cli.chain", "audit", conviction["subject"], "--replay", *database))["data"]
    assert replayed["confirms"] is True
    assert (replayed["finding"], replayed["inputs"]) == ("fraud", "signed by their senders")
    assert max(value for name, value in replayed["tensors"].items() if name != "false") > 0.5
    asked = ("generate", "--model", str(out), "--prompt", "def ", "--tokens", "8")
    assert json.loads(run("cli.peer", *asked, "--json")) == {
        "prompt": "def ",
        "text": run("cli.peer", *asked).removesuffix("\n"),
    }


@pytest.mark.slow
@pytest.mark.trio
async def test_an_interrupted_demonstration_takes_everything_with_it(tmp_path: Path, scratch: Path) -> None:
    out = tmp_path / "demo"
    arguments = ["demo", "--out", str(out), "--json"]
    async with child("demo", "cli.peer", arguments, tmp_path / "log.txt") as running:
        await running.expect("network", PATIENCE)
        assert len([line for line in commands() if str(scratch) in line]) >= 6
        running.process.send_signal(signal.SIGINT)
        with trio.fail_after(PATIENCE):
            await running.drain()
            assert await running.process.wait() != 0
    assert "Traceback" not in running.log.read_text()
    assert not [line for line in commands() if str(scratch) in line]
    assert_empty(scratch)
    assert (out / "logs").exists()
