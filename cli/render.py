"""Text for people: aligned tables, short names, votes as marks; colour on terminals only."""

import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

_CODES = {"red": "31", "green": "32", "yellow": "33", "dim": "2", "bold": "1"}
_GOOD = frozenset(("passed", "settled", "seated", "running"))
_BAD = frozenset(("disputed", "convicted", "evicted", "slashed", "equivocation", "jailed"))


def is_coloured() -> bool:
    """Whether stdout is a terminal that may be coloured."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def paint(text: str, colour: str) -> str:
    """Return `text` in a colour where that is wanted."""
    return f"\033[{_CODES[colour]}m{text}\033[0m" if is_coloured() else text


def short(value: Any, verbose: bool = False) -> str:
    """Return a value as a cell: long names cut in the middle."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}"
    text = str(value)
    is_name = text.startswith("12D3Koo") or (len(text) == 64 and all(c in "0123456789abcdef" for c in text))
    if verbose or not is_name:
        return text
    return f"…{text[-8:]}" if text.startswith("12D3Koo") else text[:12]


def table(rows: Sequence[dict[str, Any]], columns: Sequence[str], verbose: bool = False) -> str:
    """Return rows as an aligned table with a heading."""
    if not rows:
        return "none"
    cells = [[short(row.get(column), verbose) for column in columns] for row in rows]
    widths = [max(len(column), *(len(row[i]) for row in cells)) for i, column in enumerate(columns)]
    head = "  ".join(column.ljust(width) for column, width in zip(columns, widths, strict=True)).rstrip()
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([paint(head, "dim"), *lines])


def fields(value: dict[str, Any], verbose: bool = False, indent: str = "") -> str:
    """Return an object as aligned names and values; nested ones indented."""
    plain = {k: v for k, v in value.items() if not isinstance(v, (dict, list)) and (verbose or k != "raw")}
    width = max((len(key) for key in plain), default=0)
    lines = [f"{indent}{key.ljust(width)}  {short(item, True)}" for key, item in plain.items()]
    for key, item in value.items():
        if isinstance(item, dict) and item:
            lines += [f"{indent}{key}", fields(item, verbose, indent + "  ")]
        elif isinstance(item, list) and item and isinstance(item[0], dict):
            lines += [f"{indent}{key}", _indented(table(item, columns_of(item), verbose), indent + "  ")]
        elif isinstance(item, list) and item:
            lines.append(f"{indent}{key}  {' '.join(short(one, verbose) for one in item)}")
    return "\n".join(lines)


def columns_of(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Return the keys of rows that hold simple values, in order of first appearance."""
    found: dict[str, None] = {}
    for row in rows:
        found.update(dict.fromkeys(k for k, v in row.items() if not isinstance(v, (dict, list)) and k != "raw"))
    return list(found)


def marks(bitmap: Sequence[bool]) -> str:
    """Return votes as ✓ and ✕."""
    return "".join("✓" if bit else "✕" for bit in bitmap)


def event_line(event: dict[str, Any]) -> str:
    """Return one event of a block in a line."""
    kind = str(event["kind"])
    colour = "green" if kind in _GOOD else "red" if kind in _BAD else "dim" if kind == "block" else "bold"
    details = "  ".join(f"{key}={_detail(value)}" for key, value in event["data"].items())
    return f"{event['height']:>7}  {paint(kind.ljust(12), colour)}  {details}"


def _detail(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(short(item) for item in value)
    return short(value)


def _indented(text: str, indent: str) -> str:
    return "\n".join(indent + line for line in text.splitlines())
