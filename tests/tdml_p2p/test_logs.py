"""Logs: JSON lines on stderr where there is no terminal, nothing on stdout, libraries kept quiet."""

import json
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import logging, sys, structlog
from tdml_p2p.logs import configure_logs
configure_logs(sys.argv[1])
structlog.get_logger("tdml.test").info("said", peer="x")
structlog.get_logger("tdml.test").debug("whispered")
logging.getLogger("tdml.chain").warning("the chain %s", "waits")
logging.getLogger("libp2p.host").error("a stream ended")
"""


def run(level: str) -> list[dict[str, str]]:
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", PROGRAM, level], cwd=root, capture_output=True, check=True)
    assert done.stdout == b""
    return [json.loads(line) for line in done.stderr.splitlines()]


def test_events_are_json_lines_with_level_and_logger() -> None:
    lines = run("info")
    assert [(line["level"], line["logger"], line["event"]) for line in lines] == [
        ("info", "tdml.test", "said"),
        ("warning", "tdml.chain", "the chain waits"),
    ]
    assert lines[0]["peer"] == "x"
    assert lines[0]["timestamp"].endswith("Z")


def test_the_level_is_the_least_that_is_shown() -> None:
    assert [line["event"] for line in run("warning")] == ["the chain waits"]
    assert "whispered" in [line["event"] for line in run("debug")]
