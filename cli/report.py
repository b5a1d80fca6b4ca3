"""What long-running commands print: JSON lines for scripts, dense lines for people."""

import json
import math
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

from rich.console import Console
from rich.text import Text

from cli.live import LiveView, Swarm
from cli.render import short

Event = dict[str, Any]
_QUIET = frozenset(("drawn", "passed", "settled", "void", "committed", "opened", "claimed", "block"))
_ALARMS = frozenset(("disputed", "convicted", "evicted", "slashed", "equivocation"))
_BALLOTS = {
    "against-worker": "✕", "against-both": "✕", "data-missing": "✕", "small-deviation": "✕",
    "against-auditor": "✓", "against-neither": "✓", "auditor-misled": "✓",
}  # fmt: skip
_WIDTH = 160


class Reporter(Protocol):
    """Takes the events of a run."""

    def __call__(self, event: Event) -> None:
        """Report one event."""

    def close(self) -> None:
        """Leave the terminal as it was."""


class JsonReport:
    """Prints events as JSON lines, each with its time."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock

    def __call__(self, event: Event) -> None:
        """Print one event."""
        line = {"event": event["event"], "time": round(self._clock(), 3), **event}
        print(json.dumps(_finite(line), ensure_ascii=False, allow_nan=False), flush=True)

    def close(self) -> None:
        """Leave the terminal as it was."""


class TextReport:
    """Prints events for a person; on a terminal with the swarm and a progress bar below."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        self._names: dict[str, str] = {}
        self._convicted: list[str] = []
        self._ballots: dict[str, str] = {}
        self._live = LiveView(self._console, self._name)
        self._handlers: dict[str, Callable[[Event], None]] = {
            "ready": self._ready,
            "peer": self._peer,
            "network": self._network,
            "posted": self._posted,
            "formed": self._formed,
            "step": self._step,
            "chain": self._chain,
            "validation": self._validation,
            "rerouted": self._rerouted,
            "left": self._left,
            "outvoted": self._outvoted,
            "split": self._split,
            "suspicious": self._suspicious,
            "joined": self._joined,
            "waiting": self._waiting,
            "moved": self._moved,
            "abandoned": self._abandoned,
            "alone": self._alone,
            "rollback": self._rollback,
            "evicted": self._evicted,
            "saved": self._saved,
            "done": self._done,
            "result": self._result,
        }

    def __call__(self, event: Event) -> None:
        """Print one event."""
        self._handlers.get(str(event["event"]), self._other)(event)
        self._live.note(event)

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._live.close()

    def _print(self, text: str, style: str = "") -> None:
        self._console.print(Text(text, style), soft_wrap=True)

    def _name(self, peer: object) -> str:
        return self._names.get(str(peer), short(peer))

    def _ready(self, event: Event) -> None:
        self._print(f"peer    {event['peer']}", "bold")
        self._print(f"invite  {event['invite']}")
        if event.get("status_url"):
            self._print(f"status  {event['status_url']}")
        self._print(f"height  {event['height']}")

    def _peer(self, event: Event) -> None:
        self._names[str(event["peer"])] = str(event["name"])
        self._print(f"{event['name']:<8}{short(event['peer'])}  {event['role']}")

    def _network(self, event: Event) -> None:
        self._print(f"network of {event['peers']} peers ready after {event['seconds']:.1f} s", "green")

    def _posted(self, event: Event) -> None:
        self._print(f"posted  task {short(event['task'])}{' (resumed)' if event.get('resumed') else ''}")

    def _formed(self, event: Event) -> None:
        swarm = Swarm()
        swarm.note(event)
        self._console.print(swarm.table(self._name))

    def _step(self, event: Event) -> None:
        self._print(
            f"step {event['step']:>5}  loss {_loss(event):.4f}  {event['tokens_per_second']:>7,.0f} tok/s"
            f"  {event['seconds']:.2f} s  {event['bytes_sent'] / 1e6:.1f} MB"
            f"  audits {event['audits']}  faults {event['faults']}"
            + (f"  peers {sum(share['cells'] > 0 for share in event['shares'])}" if event.get("shares") else "")
        )

    def _validation(self, event: Event) -> None:
        if event["loss"] is None:
            self._print(f"step {event['step']:>5}  not validated: {event['reason']}", "yellow")
        else:
            self._print(f"step {event['step']:>5}  validation loss {_loss(event):.4f}", "bold")

    def _rerouted(self, event: Event) -> None:
        cells = ", ".join(str(cell) for cell in event["cells"])
        name = self._name(event["peer"])
        self._print(
            f"rerouted step {event['step']}: stage {event['stage']} cells {cells} from {name} to other replicas,"
            f" {event['reason']}",
            "yellow",
        )

    def _outvoted(self, event: Event) -> None:
        cells = ", ".join(str(cell) for cell in event["cells"])
        self._print(
            f"outvoted step {event['step']}: {self._name(event['peer'])} of stage {event['stage']} had other results"
            f" of cells {cells} than most of its team; theirs went on, and all that it claims is audited",
            "yellow",
        )

    def _suspicious(self, event: Event) -> None:
        self._print(
            f"odd     {self._name(event['peer'])} of stage {event['stage']} in step {event['step']}: {event['reason']};"
            " that proves nothing, all that it claims is audited for a while",
            "yellow",
        )

    def _split(self, event: Event) -> None:
        names = ", ".join(self._name(peer) for peer in event["peers"])
        self._print(
            f"split   {names} of stage {event['stage']} have no majority in step {event['step']}: it begins again"
            " with others; peers of one machine type and `--threads` agree bit for bit",
            "yellow",
        )

    def _left(self, event: Event) -> None:
        self._print(
            f"lost    {self._name(event['peer'])} of stage {event['stage']} in step {event['step']}: {event['reason']}",
            "red",
        )

    def _joined(self, event: Event) -> None:
        self._print(f"joined  {self._name(event['peer'])} in stage {event['stage']} for step {event['step']}", "green")

    def _waiting(self, event: Event) -> None:
        self._print(f"waiting step {event['step']}: nobody holds stage {event['stage']}, a peer must join", "red")

    def _moved(self, event: Event) -> None:
        self._print(f"moved   a stage lost its last peer: a new task goes on after step {event['step']}", "yellow")

    def _abandoned(self, event: Event) -> None:
        self._print(f"closed  task {short(event['task'])}, which a killed run had left open", "yellow")

    def _alone(self, event: Event) -> None:
        self._print(f"alone   {self._name(event['peer'])} is the only peer of stage {event['stage']} now", "yellow")

    def _chain(self, event: Event) -> None:
        self._names.update(event.get("names") or {})
        data, kind = event["data"], str(event["kind"])
        if kind in _QUIET:
            return
        hidden = {"task", "audit", "evidence"} if "audit" in data or "evidence" in data else {"task"}
        details = "  ".join(f"{key} {self._detail(value)}" for key, value in data.items() if key not in hidden)
        style = "bold red" if kind in _ALARMS else "cyan"
        self._print(f"  block {event['height']:>4}  {kind:<10} {self._audit(kind, data)}{details}", style)

    def _audit(self, kind: str, data: dict[str, Any]) -> str:
        """Return which audit an event is about and, as ballots come in, the votes so far."""
        audit = str(data.get("audit") or data.get("evidence") or "")
        if kind == "ballot":
            self._ballots[audit] = self._ballots.get(audit, "") + _BALLOTS.get(str(data["ballot"]), "·")
        votes = f"  votes {self._ballots[audit]}" if kind in ("ballot", "convicted", "acquitted") else ""
        return f"audit {short(audit)[:8]}{votes}  " if audit else ""

    def _detail(self, value: object) -> str:
        if isinstance(value, list):
            return "/".join(self._detail(item) for item in value)
        return self._name(value) if isinstance(value, str) else short(value)

    def _rollback(self, event: Event) -> None:
        self._print(f"back to step {event['step']}, the newest all of whose audits passed", "yellow")

    def _evicted(self, event: Event) -> None:
        text = f"evicted {self._name(event['peer'])} at step {event['step']}: {event['reason']}"
        self._print(f"{text}, evidence {short(event['evidence'])}", "bold red")
        if event["reason"] != "silent":  # of what was not claimed there is nothing to replay
            self._convicted.append(str(event["evidence"]))

    def _saved(self, event: Event) -> None:
        self._print(f"saved   step {event['step']} in {event['out']}", "green")

    def _done(self, event: Event) -> None:
        self.close()
        self._print(f"done    {event['steps']} steps, loss {_loss(event):.4f}, model in {event['out']}", "green")

    def _result(self, event: Event) -> None:
        self.close()
        evicted = ", ".join(self._name(peer) for peer in event["evicted"]) or "nobody"
        expected = ", ".join(self._name(peer) for peer in event["expected"]) or "nobody"
        style = "bold green" if event["ok"] else "bold red"
        self._print(f"loss {event['loss_first']:.3f} → {event['loss_last']:.3f}  audits {event['audits']}", style)
        self._print(f"evicted {evicted}; the cheat is {expected}", style)
        parts = "  ".join(f"{name} {seconds:.0f} s" for name, seconds in event["seconds"].items())
        self._print(f"time    {parts}")
        self._print(f"model   {event['out']}   (try: tdml-peer generate --model {event['out']} --prompt 'def ')")
        for audit in self._convicted[:1]:
            self._print(f"replay  tdml-chain audit {audit} --replay --db {event['out']}/chain.db")
        self._print(f"chain   tdml-chain evidence --db {event['out']}/chain.db")

    def _other(self, event: Event) -> None:
        details = "  ".join(
            f"{key} {self._detail(value)}"
            for key, value in event.items()
            if key not in ("event", "names", "time") and value != ""
        )
        self._print(f"{event['event']:<8} {details}", "yellow")


def reporter(is_json: bool) -> Reporter:
    """Return the reporter of a command."""
    if is_json:
        return JsonReport()
    if not sys.stdout.isatty():
        return TextReport(Console(highlight=False, width=_WIDTH))
    return TextReport()


def _loss(event: Event) -> float:
    """Return a loss; the JSON lines of another process say null for one that is not a number."""
    return math.nan if event["loss"] is None else float(event["loss"])


def _finite(value: Any) -> Any:
    """Return a JSON value without NaN and infinity, which JSON has no numbers for."""
    match value:
        case float() if not math.isfinite(value):
            return None
        case dict():
            return {key: _finite(item) for key, item in value.items()}
        case list() | tuple():
            return [_finite(item) for item in value]
        case _:
            return value
