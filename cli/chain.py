"""`tdml-chain`: the inspector of a chain, on a running peer or on a database file."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from cyclopts.config import Env
from cyclopts.validators import Number

from cli import render, render_chain
from cli.common import default_home, exit_with, new_app, run_app
from cli.economics import Economics, worth
from cli.node import NodeSource
from cli.output import Format, show
from cli.sources import DaemonSource, DatabaseSource, Source
from cli.verification import TRUSTING_HOURS, verified
from tdml_p2p.errors import UserError

app = new_app("tdml-chain", "Inspect a TDML chain: on a running peer (--home) or in a database file (--db).")
app.config = (Env("TDML_", command=False),)
db_app = new_app("db", "The database itself.")
app.command(db_app)

_COUNTABLE = Number(gte=0)
_PROVEN = {"supply": "chain", "conviction": "evidence"}
"""Kinds of proofs by other names."""
Renderer = Callable[[Any, bool], str]
Id = Annotated[str, Parameter(name="id", help="Its id, in hexadecimal.")]
Peer = Annotated[str, Parameter(name="peer", help="A peer id.")]
Ref = Annotated[str, Parameter(name="ref", help="A height, a hash, latest or earliest.")]


@Parameter(name="*")
@dataclass(frozen=True)
class Common:
    """Options of every command."""

    home: Annotated[Path | None, Parameter(help="Home folder of a running peer.")] = None
    db: Annotated[Path | None, Parameter(help="A chain.db to read without a peer.")] = None
    node: Annotated[str, Parameter(help="Multiaddr or invite line of a remote peer.")] = ""
    trust: Annotated[str, Parameter(help="HEIGHT:HASH of a block that you trust, from somebody you trust.")] = ""
    height: Annotated[
        int, Parameter(help="The state as it was after this block; the newest when 0.", validator=_COUNTABLE)
    ] = 0
    output: Annotated[Format, Parameter(name=["--output", "-o"], help="text or json.")] = "text"
    field: Annotated[str, Parameter(help="Print only this part, such as header.view.")] = ""
    raw: Annotated[bool, Parameter(negative="", help="Print the bytes, in hexadecimal, whose hash is the id.")] = False
    verbose: Annotated[bool, Parameter(negative="", help="Print names in full.")] = False


_PLAIN = Common()
_NO_ECONOMICS = Economics()


def _source(common: Common) -> Source:
    if common.node:
        return NodeSource(common.node, common.trust)
    if common.db is not None:
        return DatabaseSource(common.db)
    return DaemonSource(common.home or default_home())


def _show(common: Common, query: str, arguments: dict[str, str], text: Renderer) -> Any:
    at = {"height": str(common.height)} if common.height else {}
    return show(
        lambda: _source(common).ask(query, arguments | at),
        common.output,
        "raw" if common.raw else common.field,
        lambda data: _text(common, text, data),
    )


def _text(common: Common, text: Renderer, data: Any) -> str:
    try:
        return text(data, common.verbose)
    except (KeyError, TypeError, ValueError, AttributeError):
        if not common.node:
            raise
        raise UserError("The peer gave an answer that makes no sense.", "ask another peer") from None


@app.command
def status(*, common: Common = _PLAIN) -> None:
    """The chain's tip, stake and work in progress."""
    _show(common, "status", {}, render_chain.status)


@app.command
def blocks(*, count: int = 20, common: Common = _PLAIN) -> None:
    """The newest blocks."""
    columns = ("height", "hash", "proposer", "view", "transactions", "signatures", "bytes")
    _show(common, "blocks", {"count": str(count)}, render_chain.of_rows(*columns))


@app.command
def block(ref: Ref = "latest", *, common: Common = _PLAIN) -> None:
    """One block, with its transactions and events."""
    _show(common, "block", {"id": ref}, render_chain.block)


@app.command
def tx(identity: Id, *, common: Common = _PLAIN) -> None:
    """One transaction and what became of it."""
    _show(common, "tx", {"id": identity}, render.fields)


@app.command
def account(peer: Peer, *, common: Common = _PLAIN) -> None:
    """Balance, stake and nonce of an account."""
    _show(common, "account", {"id": peer}, render.fields)


@app.command
def validators(*, common: Common = _PLAIN) -> None:
    """All registered validators."""
    _show(common, "validators", {}, render_chain.of_rows())


@app.command
def validator(peer: Peer, *, common: Common = _PLAIN) -> None:
    """One validator."""
    _show(common, "validator", {"id": peer}, render.fields)


@app.command
def tasks(*, common: Common = _PLAIN) -> None:
    """All tasks."""
    columns = ("id", "status", "client", "stages", "replicas", "steps", "settled", "generation", "escrow")
    _show(common, "tasks", {}, render_chain.of_rows(*columns))


@app.command
def task(identity: Id, *, common: Common = _PLAIN) -> None:
    """One task and its workers, stage by stage."""
    _show(common, "task", {"id": identity}, render_chain.task)


@app.command
def workers(*, task: str = "", common: Common = _PLAIN) -> None:
    """Workers of one task (--task ID), or of all."""
    columns = ("task", "worker", "stage", "status", "bond", "withheld", "earned", "settled_cells", "lease_until")
    _show(common, "workers", {"task": task} if task else {}, render_chain.of_rows(*columns))


@app.command
def worker(peer: Peer, *, common: Common = _PLAIN) -> None:
    """The seats of one worker."""
    _show(common, "worker", {"id": peer}, render.fields)


@app.command
def claim(identity: Id, *, common: Common = _PLAIN) -> None:
    """One claim: the cells that a worker computed in a step, and the root that it committed to."""
    _show(common, "claim", {"id": identity}, render.fields)


@app.command
def audit(
    identity: Id,
    *,
    replay: Annotated[
        bool, Parameter(negative="", help="Execute the cell again on this machine and compare it with the claim.")
    ] = False,
    common: Common = _PLAIN,
) -> None:
    """One audit: what was claimed, what others computed, who voted how, what came of it."""
    if replay:
        told = show(
            lambda: _source(common).replay(identity),
            common.output,
            common.field,
            lambda data: render_chain.replayed(data, common.verbose),
        )
        if told["confirms"] is False:
            raise UserError("The re-execution here contradicts what came of this audit.", "see the deviations above")
        return
    _show(common, "audit", {"id": identity}, render_chain.audit)


@app.command
def evidence(identity: Id = "", *, common: Common = _PLAIN) -> None:
    """All convictions, or one with what it rests on."""
    columns = ("subject", "kind", "account", "task", "height", "slashed", "id")
    if identity:
        _show(common, "evidence", {"id": identity}, render_chain.evidence)
    else:
        _show(common, "evidence", {}, render_chain.of_rows(*columns))


@app.command
def votes(ref: Ref = "latest", *, common: Common = _PLAIN) -> None:
    """Who voted for a height; on a running peer also for the next one, which is under decision."""
    _show(common, "votes", {"id": ref}, render_chain.votes)


@app.command
def certificate(ref: Ref = "latest", *, common: Common = _PLAIN) -> None:
    """The finalization of a block: who signed and who did not."""
    _show(common, "certificate", {"id": ref}, render_chain.certificate)


@app.command
def params(*, economics: Economics = _NO_ECONOMICS, common: Common = _PLAIN) -> None:
    """The network's parameters; with --economics what each way to cheat is worth under a task's terms."""
    if not economics.shown:
        _show(common, "params", {}, render.fields)
        return
    show(
        lambda: worth(_source(common).ask("params", {}), economics),
        common.output,
        common.field,
        render_chain.economics,
    )


@app.command
def supply(*, common: Common = _PLAIN) -> None:
    """Where all base units are."""
    _show(common, "supply", {}, render.fields)


@app.command
def mempool(*, common: Common = _PLAIN) -> None:
    """Transactions waiting at the peer."""
    _show(common, "mempool", {}, render_chain.of_rows())


@app.command
def genesis(*, common: Common = _PLAIN) -> None:
    """The genesis of the network."""
    _show(common, "genesis", {}, lambda data, _: json.dumps(data, indent=2))


@app.command
def proof(
    kind: Annotated[str, Parameter(help="account, validator, task, worker, claim, audit, evidence, params or supply.")],
    key: Annotated[str, Parameter(help="A peer id, an id, TASK:PEER for a worker; none for params and supply.")] = "",
    *,
    from_: Annotated[
        int,
        Parameter(name="--from", help="The height that the verifier trusts; the newest when 0.", validator=_COUNTABLE),
    ] = 0,
    common: Common = _PLAIN,
) -> None:
    """What the chain's state holds, or that it holds nothing, as a file that anybody can verify."""
    arguments = {"kind": _PROVEN.get(kind, kind), "id": key} | ({"from": str(from_)} if from_ else {})
    _show(common, "proof", arguments, lambda data, _: json.dumps(data, indent=1))


@app.command
def verify(
    file: Annotated[Path, Parameter(help="What tdml-chain proof wrote.")],
    *,
    trusting_hours: Annotated[
        float, Parameter(help="How long after its block a trusted set of validators is believed.", validator=_COUNTABLE)
    ] = TRUSTING_HOURS,
    common: Common = _PLAIN,
) -> None:
    """Verify a proof file offline against --trust HEIGHT:HASH: no peer and no database is asked."""
    show(
        lambda: verified(file, common.trust, trusting_hours),
        common.output,
        common.field,
        lambda data: render_chain.proven(data, common.verbose),
    )


@app.command
def watch(
    *,
    topics: Annotated[str, Parameter(help="Kinds of events, separated by commas; all when empty.")] = "",
    from_: Annotated[
        int, Parameter(name="--from", help="First height; 0 starts with what comes next.", validator=_COUNTABLE)
    ] = 0,
    count: Annotated[int, Parameter(help="End after so many events; 0 never ends.", validator=_COUNTABLE)] = 0,
    common: Common = _PLAIN,
) -> None:
    """Follow the events of final blocks as they come."""
    arguments = {"topics": topics, "from": str(from_ or ""), "count": str(count or "")}
    for event in _source(common).watch({key: value for key, value in arguments.items() if value}):
        print(json.dumps(event) if common.output == "json" else render.event_line(event), flush=True)


@db_app.command
def check(*, common: Common = _PLAIN) -> None:
    """Execute the chain again from its genesis and compare every hash, root and certificate."""
    if _show(common, "db-check", {}, render.fields)["ok"] is not True:
        raise UserError("The database does not check out.", "see the problem above")


def main() -> None:
    """Run `tdml-chain`."""
    exit_with(lambda: run_app(app))


if __name__ == "__main__":
    main()
