"""The status of a daemon as text: what an owner wants to know first, warnings last."""

from typing import Any

from cli.render import paint, short, table

Answer = dict[str, Any]
_TABLES = (
    ("seats", "seats", ("task", "stage", "bond", "settled_cells", "lease_until")),
    (
        "latest audits",
        "recent_audits",
        ("audit", "status", "step", "stage", "cell", "worker", "auditor", "off", "votes"),
    ),
    ("evictions", "evictions", ("peer", "step", "reason", "slashed", "height", "evidence")),
)


def status(data: Answer) -> str:
    """Return a peer's status: a dozen lines, then its seats, the latest audits and evictions, and warnings."""
    finality, reach = data.get("finality") or {}, data.get("reachability") or {}
    lines = [
        _line("peer", data["peer"], data.get("name")),
        _line("invite", data.get("invite")),
        _line("page", data.get("status_url")),
        _line("chain", short(data.get("chain_id")), data.get("network"), data.get("syncing") and "syncing"),
        _line("height", data["height"], _finality(finality)),
        _line("peers", len(data.get("peers", [])), _reachability(reach)),
        _line("role", _role(data)),
        _line("balance", data.get("balance"), f"bonded {data['bonded']}", f"earned {data['earnings']}"),
    ]
    if any((data.get("audits") or {}).values()):
        lines.insert(-1, _line("audits", *(f"{count} {name}" for name, count in data["audits"].items() if count)))
    lines += [_table(title, data.get(name) or [], columns) for title, name, columns in _TABLES]
    lines += [f"declined task {short(one['task'])}: {one['reason']}" for one in data.get("declined") or []]
    for warning in data.get("warnings") or []:
        lines.append(paint(f"warning: {warning['message']}", "yellow"))
        lines += [f"  hint: {warning['hint']}"] if warning.get("hint") else []
    return "\n".join(line for line in lines if line)


def _table(title: str, rows: list[Answer], columns: tuple[str, ...]) -> str:
    return "\n  ".join([title, *table(rows, columns).splitlines()]) if rows else ""


def _line(name: str, *values: object) -> str:
    found = [str(value) for value in values if value not in (None, "", False)]
    return f"{name.ljust(8)} {'  '.join(found)}" if found else ""


def _finality(finality: Answer) -> str:
    p50, p99, age = (finality.get(name) for name in ("p50", "p99", "block_age"))
    parts = [f"final after {p50:.2f} s (p99 {p99:.2f} s)" if p50 is not None and p99 is not None else ""]
    parts.append(f"last block {age:.0f} s ago" if age is not None else "")
    return "  ".join(part for part in parts if part)


def _reachability(reach: Answer) -> str:
    return "  ".join(str(reach[name]) for name in ("verdict", "detail") if reach.get(name))


def _role(data: Answer) -> str:
    role = "validator" if data.get("is_validator") else "not a validator"
    return f"{role}, {len(data.get('validators', []))} in the set"
