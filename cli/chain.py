"""`tdml-chain`: the inspector of a chain, on a running peer or on a database file."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter

from cli import render
from cli.common import default_home, run_app
from cli.sources import DaemonSource, DatabaseSource, Source
from tdml_p2p.errors import USAGE, UserError

app = App(name="tdml-chain", help="Inspect a TDML chain: on a running peer (--home) or a database (--db).")
db_app = App(name="db", help="The database itself.")
app.command(db_app)


@Parameter(name="*")
@dataclass(frozen=True)
class Common:
    """Options of every command."""

    home: Annotated[Path | None, Parameter(help="Home folder of a running peer.", env_var="TDML_HOME")] = None
    db: Annotated[Path | None, Parameter(help="A chain.db to read without a peer.")] = None
    output: Annotated[Literal["text", "json"], Parameter(name=["--output", "-o"], help="text or json.")] = "text"
    field: Annotated[str, Parameter(help="Print only this field.")] = ""
    raw: Annotated[bool, Parameter(negative="", help="Print the bytes (hex) whose hash is the id.")] = False
    verbose: Annotated[bool, Parameter(negative="", help="Print names in full.")] = False


_PLAIN = Common()


def _source(common: Common) -> Source:
    if common.db is not None:
        return DatabaseSource(common.db)
    return DaemonSource(common.home or default_home())


def _show(common: Common, query: str, arguments: dict[str, str], text: Callable[[Any], str]) -> None:
    try:
        data = _source(common).ask(query, arguments)
        if common.raw:
            data = _pick(data, "raw")
        elif common.field:
            data = _pick(data, common.field)
    except UserError as error:
        if common.output == "json":
            print(json.dumps(_envelope(None, [error.message])))
        raise
    if common.output == "json":
        print(json.dumps(_envelope(data, [])))
    elif common.raw or common.field:
        print(data if isinstance(data, str) else json.dumps(data))
    else:
        print(text(data))


def _envelope(data: Any, errors: list[str]) -> dict[str, Any]:
    return {"schema_version": 1, "success": not errors, "data": data, "errors": errors, "warnings": []}


def _pick(data: Any, name: str) -> Any:
    if isinstance(data, dict) and name in data:
        return data[name]
    raise UserError(f"The answer has no field {name!r}.", "leave --field out to see all fields", USAGE)


def _rows(common: Common, *columns: str) -> Callable[[Any], str]:
    return lambda data: render.table(data, columns or render.columns_of(data), common.verbose)


def _fields(common: Common) -> Callable[[Any], str]:
    return lambda data: render.fields(data, common.verbose)


@app.command
def status(common: Common = _PLAIN) -> None:
    """The chain's tip, stake and work in progress."""
    _show(common, "status", {}, _fields(common))


@app.command
def blocks(*, count: int = 20, common: Common = _PLAIN) -> None:
    """The newest blocks."""
    columns = ("height", "hash", "proposer", "view", "transactions", "signatures", "bytes")
    _show(common, "blocks", {"count": str(count)}, _rows(common, *columns))


@app.command
def block(ref: str = "latest", common: Common = _PLAIN) -> None:
    """One block: a height, a hash, `latest` or `earliest`."""
    _show(common, "block", {"id": ref}, _fields(common))


@app.command
def tx(identity: str, common: Common = _PLAIN) -> None:
    """One transaction and its receipt."""
    _show(common, "tx", {"id": identity}, _fields(common))


@app.command
def account(identity: str, common: Common = _PLAIN) -> None:
    """Balance, stake and nonce of an account."""
    _show(common, "account", {"id": identity}, _fields(common))


@app.command
def validators(common: Common = _PLAIN) -> None:
    """All registered validators."""
    _show(common, "validators", {}, _rows(common))


@app.command
def validator(identity: str, common: Common = _PLAIN) -> None:
    """One validator."""
    _show(common, "validator", {"id": identity}, _fields(common))


@app.command
def tasks(common: Common = _PLAIN) -> None:
    """All tasks."""
    columns = ("id", "status", "client", "stages", "replicas", "steps", "settled", "generation", "escrow")
    _show(common, "tasks", {}, _rows(common, *columns))


@app.command
def task(identity: str, common: Common = _PLAIN) -> None:
    """One task and its workers."""
    _show(common, "task", {"id": identity}, _fields(common))


@app.command
def workers(*, task: str = "", common: Common = _PLAIN) -> None:
    """Workers of one task, or of all."""
    columns = ("task", "worker", "stage", "status", "bond", "withheld", "earned", "settled_cells", "lease_until")
    _show(common, "workers", {"task": task} if task else {}, _rows(common, *columns))


@app.command
def worker(identity: str, common: Common = _PLAIN) -> None:
    """The seats of one worker."""
    _show(common, "worker", {"id": identity}, _fields(common))


@app.command
def claim(identity: str, common: Common = _PLAIN) -> None:
    """One claim."""
    _show(common, "claim", {"id": identity}, _fields(common))


@app.command
def audit(identity: str, common: Common = _PLAIN) -> None:
    """One audit: what was claimed, what others computed, who voted how."""
    _show(common, "audit", {"id": identity}, _fields(common))


@app.command
def evidence(identity: str = "", common: Common = _PLAIN) -> None:
    """All convictions, or one with its evidence."""
    if identity:
        _show(common, "evidence", {"id": identity}, _fields(common))
    else:
        columns = ("subject", "kind", "account", "task", "height", "slashed")
        _show(common, "evidence", {}, _rows(common, *columns))


@app.command
def certificate(ref: str = "latest", common: Common = _PLAIN) -> None:
    """The finalization of a block: who signed."""

    def text(data: Any) -> str:
        rest = {key: value for key, value in data.items() if key not in ("bitmap", "signatures")}
        return f"{render.fields(rest, common.verbose)}\nvotes  {render.marks(data['bitmap'])}"

    _show(common, "certificate", {"id": ref}, text)


@app.command
def params(common: Common = _PLAIN) -> None:
    """The network's parameters."""
    _show(common, "params", {}, _fields(common))


@app.command
def supply(common: Common = _PLAIN) -> None:
    """Where all base units are."""
    _show(common, "supply", {}, _fields(common))


@app.command
def mempool(common: Common = _PLAIN) -> None:
    """Transactions waiting at the peer."""
    _show(common, "mempool", {}, _rows(common))


@app.command
def genesis(common: Common = _PLAIN) -> None:
    """The genesis of the network."""
    _show(common, "genesis", {}, lambda data: json.dumps(data, indent=2))


@app.command
def watch(
    *,
    topics: str = "",
    from_: Annotated[int, Parameter(name="--from")] = 0,
    count: int = 0,
    common: Common = _PLAIN,
) -> None:
    """Follow the events of final blocks; --topics is a comma-separated list of kinds."""
    arguments = {"topics": topics, "from": str(from_ or ""), "count": str(count or "")}
    for event in _source(common).watch({key: value for key, value in arguments.items() if value}):
        print(json.dumps(event) if common.output == "json" else render.event_line(event), flush=True)


@db_app.command
def check(common: Common = _PLAIN) -> None:
    """Execute the chain again from its genesis and compare every hash, root and certificate."""
    _show(common, "db-check", {}, _fields(common))
    if _source(common).ask("db-check", {})["ok"] is not True:
        raise UserError("The database does not check out.", "see the problem above")


def main() -> None:
    """Run `tdml-chain`."""
    try:
        sys.exit(run_app(app))
    except BrokenPipeError:
        # the reader has gone; Python would complain once more when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


if __name__ == "__main__":
    main()
