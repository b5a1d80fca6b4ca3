"""Longer answers of the inspector as text: blocks, certificates, tasks, audits and evidence."""

from collections.abc import Callable, Sequence
from typing import Any

from cli.render import columns_of, event_line, fields, marks, paint, short, table

Answer = dict[str, Any]
_MARKS = {
    "against-worker": "✕", "against-both": "✕", "data-missing": "✕", "small-deviation": "✕",
    "against-neither": "✓", "against-auditor": "✓", "auditor-misled": "✓",
}  # fmt: skip
_TENSORS = ("y", "gx", "gw")
_STATUS_COLOURS = {
    "passed": "green",
    "convicted": "red",
    "disputed": "red",
    "acquitted": "yellow",
    "faulted": "yellow",
    "withheld": "yellow",
}


def status(data: Answer, verbose: bool) -> str:
    """Return the chain's tip and what to know about its stake."""
    rest = {key: value for key, value in data.items() if key != "warnings"}
    lines = [paint(f"warning: {_message(warning)}", "yellow") for warning in data.get("warnings") or []]
    return "\n".join([fields(rest, verbose), *lines])


def block(data: Answer, verbose: bool) -> str:
    """Return a block, its transactions and its events."""
    head = {key: value for key, value in data.items() if key not in ("transactions", "events")}
    events = [event_line({"height": data["height"], **event}) for event in data.get("events", [])]
    parts = [fields(head, verbose), _section("transactions", _table(data.get("transactions", []), verbose))]
    return "\n".join([*parts, _section("events", "\n".join(events) or "none")])


def certificate(data: Answer, verbose: bool) -> str:
    """Return who signed: ✓ for each validator of the set that did, ✕ for each that did not."""
    hidden = ("bitmap", "signatures", "validators", "signers")
    rest = {key: value for key, value in data.items() if key not in hidden}
    voters = data.get("validators")
    bitmap = [bool(voter["signed"]) for voter in voters] if voters else data["bitmap"]
    lines = [fields(rest, verbose), f"votes  {marks(bitmap)}  {len(data['signatures'])} signatures"]
    if voters:
        lines += [f"  {marks([voter['signed']])} {short(voter['validator'], verbose)}" for voter in voters]
    return "\n".join(lines)


def votes(data: Answer, verbose: bool) -> str:
    """Return who voted, ✓ or ✕ for each validator of the set in its order, with their power."""
    hidden = ("bitmap", "validators", "signers", "signatures", "raw")
    voters = data["validators"]
    kinds = {"finalize": "signed", "notarize": "notarized", "nullify": "nullified"}
    shown = {kind: name for kind, name in kinds.items() if voters and name in voters[0]}
    lines = [fields({key: value for key, value in data.items() if key not in hidden}, verbose)]
    lines += [f"{kind:<8}  {marks([voter[name] for voter in voters])}" for kind, name in shown.items()]
    for voter in voters:
        said = [voter[name] for name in shown.values()]
        lines.append(f"  {marks(said)} {short(voter['validator'], verbose)}  {voter['power']}")
    return "\n".join(lines)


def proven(data: Answer, verbose: bool) -> str:
    """Return in a sentence what a verified proof shows, then the record."""
    what = " ".join(filter(None, (data["kind"], short(data["key"], verbose))))
    if not data["present"]:
        return f"✓ There is no {what} at height {data['height']}."
    return f"✓ This is the {what} at height {data['height']}:\n{fields(data['record'], verbose)}"


def task(data: Answer, verbose: bool) -> str:
    """Return a task and its grid of stages × replicas."""
    workers = data.get("workers", [])
    head = {key: value for key, value in data.items() if key != "workers"}
    return f"{fields(head, verbose)}\n{_section('stages × replicas', grid(workers, int(data['stages']), verbose))}"


def grid(workers: Sequence[Answer], stages: int, verbose: bool) -> str:
    """Return a line for each stage with its workers, then the spare ones and those who are gone."""
    seated = [worker for worker in workers if worker["status"] == "seated"]
    lines = [
        f"{index:>5}  {_seats([worker for worker in seated if worker['stage'] == index], verbose)}"
        for index in range(stages)
    ]
    others = [worker for worker in workers if worker not in seated]
    lines += [f"{worker['status']:>5}  {short(worker['worker'], verbose)}" for worker in others]
    return "\n".join(lines)


def _seats(workers: Sequence[Answer], verbose: bool) -> str:
    cells = [f"{short(worker['worker'], verbose)} {worker['settled_cells']} cells" for worker in workers]
    return "   ".join(cells) or paint("empty", "yellow")


def audit(data: Answer, verbose: bool) -> str:
    """Return the story of an audit: the cell, the deviations, the votes, what came of it."""
    colour = _STATUS_COLOURS.get(data["status"], "bold")
    names = ("generation", "step", "stage") if data.get("is_step") else ("generation", "step", "stage", "cell")
    place = "  ".join(f"{name} {data[name]}" for name in names) + ("  optimiser's step" if data.get("is_step") else "")
    lines = [
        f"audit    {short(data['id'], verbose)}  {paint(data['status'], colour)}",
        data.get("outcome", ""),
        f"task     {short(data['task'], verbose)}  {place}",
        f"worker   {short(data['worker'], verbose)}",
        f"auditor  {short(data['auditor'], verbose)}",
        f"claim    {short(data['claim'], verbose)}",
        _deviations(data),
        _votes(data, verbose),
        *(_conviction(found, verbose) for found in data.get("convictions") or []),
    ]
    if data.get("timeline"):
        lines.append(_section("timeline", "\n".join(event_line(event) for event in data["timeline"])))
    return "\n".join(line for line in lines if line)


def replayed(data: Answer, verbose: bool) -> str:
    """Return what a re-execution on this machine says of a claim, and whether the verdict stands."""
    whole = {name: value for name, value in data["tensors"].items() if name in _TENSORS}
    said = {True: "✓ confirms", False: "✕ contradicts", None: "· decides nothing about"}[data["confirms"]]
    lines = [
        f"audit    {short(data['audit'], verbose)}  {data['status']}",
        f"worker   {short(data['worker'], verbose)}",
        f"inputs   {data['inputs']}",
        _deviations(data, "deviation of the claim from this machine's re-execution"),
        f"step     {data['step'] or 'the claimed state follows from its record'}" if "step" in data else "",
        "whole tensors  " + "  ".join(f"{name} {_number(value)}" for name, value in whole.items()),
        f"machine  torch {data['machine']['torch']}, {data['machine']['cpu']}, kernel {data['machine']['kernel'][:16]}",
        f"{said} the outcome: {data['status']}",
    ]
    return "\n".join(line for line in lines if line)


def _deviations(data: Answer, title: str = "deviation of the claim from the audit") -> str:
    found, limits = data.get("deviations"), data.get("thresholds")
    if not found or not limits:
        return ""
    lines = []
    for name in _TENSORS:
        is_inside = found[name] != "inf" and float(found[name]) <= float(limits[name])
        mark = paint("✓", "green") if is_inside else paint("✕", "red")
        lines.append(f"  {name:<3} {mark} {_number(found[name]):>9}  tolerance {_number(limits[name])}")
    wide = " (a machine of another kernel class than the workers': wide tolerances)" if data.get("other_kernel") else ""
    is_unsteady = max(data.get("tolerance") or [1]) > 1
    own = " (the judge's own results are unsteady: it tolerates more than τ)" if is_unsteady else ""
    return f"{title}: {data.get('finding', '')}{wide}{own}\n" + "\n".join(lines)


def _number(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:.2e}"


def _votes(data: Answer, verbose: bool) -> str:
    votes = data.get("votes") or []
    if not votes:
        return ""
    lines = [f"votes    {bitmap(votes)}  ✕ against the worker, ✓ for it, · not revealed{_tally(data)}"]
    for vote in votes:
        found = vote.get("deviations")
        detail = "  ".join(f"{name} {_number(found[name])}" for name in _TENSORS) if found else ""
        said = vote["ballot"] or ("committed" if vote["committed"] else "silent")
        lines.append(
            f"  {_mark(vote)} {short(vote['peer'], verbose)}  {vote['role']:<5}  {said:<15}  {detail}".rstrip()
        )
    return "\n".join(lines)


def bitmap(votes: Sequence[Answer]) -> str:
    """Return ballots as marks: ✕ against the worker, ✓ for it, · not revealed."""
    return "".join(_mark(vote) for vote in votes)


def _mark(vote: Answer) -> str:
    return _MARKS.get(vote["ballot"] or "", "·")


def _tally(data: Answer) -> str:
    tally = data.get("tally")
    if not tally:
        return ""
    return f"\n  stake {tally['stake']}, against the worker {tally['against_worker']}, quorum {tally['quorum']}"


def _conviction(found: Answer, verbose: bool) -> str:
    return paint(f"slashed  {found['slashed']} of {short(found['account'], verbose)}", "red")


def evidence(data: Answer, verbose: bool) -> str:
    """Return one conviction and what it rests on: an audit, or two votes that contradict each other."""
    head = {key: value for key, value in data.items() if key not in ("audit", "votes", "first", "second")}
    parts = [fields(head, verbose)]
    if data.get("audit"):
        parts.append(_section("evidence", audit(data["audit"], verbose)))
    if data.get("votes"):
        parts.append(_section("conflicting votes", _table(data["votes"], verbose)))
    return "\n".join(parts)


def economics(data: Answer) -> str:
    """Return what each way to cheat gains and loses, and whether all of them lose."""
    columns = ("cheat", "chance", "mean_cells", "cells_for_certainty", "gain", "loss", "profit")
    rows = [{name: str(row[name]) for name in columns} for row in data["cheats"]]
    said = paint("no way to cheat pays more than once", "green")
    if not data["is_sound"]:
        said = paint("a way to cheat pays", "red")
    notes = [f"  {row['cheat']}: {row['note']}" for row in data["cheats"]]
    head = f"bond {data['bond']}, at least {data['least_bond']}: {said}"
    return "\n".join([head, table(rows, columns, False), *notes])


def of_rows(*columns: str) -> Callable[[Any, bool], str]:
    """Return a renderer of rows with these columns, or with all where none is named."""
    return lambda rows, verbose: table(rows, columns or columns_of(rows), verbose)


def _table(rows: Sequence[Answer], verbose: bool) -> str:
    return table(rows, columns_of(rows), verbose)


def _section(title: str, body: str) -> str:
    return "\n".join([paint(title, "bold"), *("  " + line for line in body.splitlines())])


def _message(warning: Any) -> str:
    return str(warning["message"] if isinstance(warning, dict) else warning)
