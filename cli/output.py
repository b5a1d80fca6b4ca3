"""Answers on stdout: text for people, an envelope of JSON for scripts, one field, or raw bytes."""

import json
from collections.abc import Callable
from typing import Any, Literal

from tdml_p2p.errors import USAGE, UserError

Format = Literal["text", "json"]


def envelope(data: Any, errors: list[str], warnings: list[str] | None = None) -> dict[str, Any]:
    """Return an answer as scripts may rely on it."""
    return {
        "schema_version": 1,
        "success": not errors,
        "data": data,
        "errors": errors,
        "warnings": warnings or [],
    }


def show(ask: Callable[[], Any], output: Format, field: str, text: Callable[[Any], str]) -> Any:
    """Print what `ask` returns and return it; `field` is a dotted path to a part of it."""
    try:
        answer = ask()
        part = pick(answer, field) if field else answer
    except UserError as error:
        if output == "json":
            print(json.dumps(envelope(None, [error.message])))
        raise
    if output == "json":
        print(json.dumps(envelope(part, [], _warnings(answer)), ensure_ascii=False))
    elif field:
        print("\n".join(_line(one) for one in (part if isinstance(part, list) else [part])))
    else:
        print(text(answer))
    return answer


def pick(data: Any, path: str) -> Any:
    """Return a part of an answer: `header.view` of an object, of every row where there are rows."""
    for name in path.split("."):
        data = [_get(row, name, path) for row in data] if isinstance(data, list) else _get(data, name, path)
    return data


def _get(data: Any, name: str, path: str) -> Any:
    if isinstance(data, dict) and name in data:
        return data[name]
    known = ", ".join(data) if isinstance(data, dict) else "none here"
    raise UserError(f"The answer has no field {path!r}.", f"fields: {known}", USAGE)


def _line(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _warnings(answer: Any) -> list[str]:
    found = answer.get("warnings") if isinstance(answer, dict) else None
    return [str(one) for one in found] if isinstance(found, list) else []
