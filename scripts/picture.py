"""Draws what `tdml-peer demo --json` printed, shortened, as an SVG: `picture.py EVENTS.jsonl PICTURE.svg`."""

import io
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console

from cli.report import TextReport

WIDTH = 124
_STEPS = 5
_SHOWN = {"disputed": 2, "opinion": 1, "ballot": 4, "convicted": 1, "evicted": 1, "slashed": 1}


def shortened(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return every fifth step and the first few of each kind of chain event; the verdict's audit goes first."""
    verdict = next((e["data"]["audit"] for e in events if e.get("kind") == "convicted"), None)
    seen: Counter[str] = Counter()
    kept = []
    for event in events:
        kind = str(event.get("kind", ""))
        if event["event"] == "step" and event["step"] % _STEPS:
            continue
        if event["event"] == "joined":
            continue
        if event["event"] == "chain":
            is_other = kind in ("opinion", "ballot") and event["data"].get("audit") != verdict
            if is_other or seen[kind] >= _SHOWN.get(kind, 0):
                continue
            seen[kind] += 1
        kept.append(event)
    return kept


def main(source: Path, target: Path) -> None:
    """Draw `source` into `target`."""
    console = Console(record=True, width=WIDTH, highlight=False, file=io.StringIO())
    report = TextReport(console)
    console.print("$ make demo", style="bold")
    for event in shortened([json.loads(line) for line in source.read_text().splitlines()]):
        report(event | {"out": "demo-out"} if "out" in event else event)
    report.close()
    # Pictures load nothing from elsewhere.
    plain = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    target.write_text(console.export_svg(title="tdml-peer demo", code_format=plain))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
