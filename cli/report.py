"""What long-running commands print: JSON lines for scripts, dense lines and a progress bar for people."""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from cli.render import short

Event = dict[str, Any]


def json_report(event: Event) -> None:
    """Print an event as one JSON line with its time."""
    print(json.dumps({"event": event["event"], "time": round(time.time(), 3), **event}), flush=True)


class TextReport:
    """Prints events for a person; on a terminal with a progress bar below."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        self._names: dict[str, str] = {}
        self._progress: Progress | None = None
        self._task: Any = None
        self._handlers: dict[str, Callable[[Event], None]] = {
            "ready": self._ready,
            "peer": self._peer,
            "network": self._network,
            "posted": self._posted,
            "formed": self._formed,
            "step": self._step,
            "chain": self._chain,
            "evicted": self._evicted,
            "saved": self._saved,
            "done": self._done,
            "result": self._result,
        }

    def __call__(self, event: Event) -> None:
        """Print one event."""
        self._handlers.get(str(event["event"]), self._other)(event)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _print(self, text: object, style: str = "") -> None:
        self._console.print(text, style=style or None, soft_wrap=True)

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
        self._print(f"posted  task {short(event['task'])}")

    def _formed(self, event: Event) -> None:
        table = Table("stage", "replicas", title="swarm", title_justify="left")
        for index, peers in enumerate(event["stages"]):
            table.add_row(str(index), "  ".join(self._name(peer) for peer in peers))
        self._print(table)
        if self._console.is_terminal and event.get("steps"):
            columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._progress = Progress(*columns, console=self._console, transient=True)
            self._task = self._progress.add_task("training", total=event["steps"])
            self._progress.start()

    def _step(self, event: Event) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=event["step"])
        self._print(
            f"step {event['step']:>5}  loss {event['loss']:.4f}  {event['tokens_per_second']:>7,.0f} tok/s"
            f"  {event['seconds']:.2f} s  {event['bytes_sent'] / 1e6:.1f} MB"
            f"  audits {event['audits']}  faults {event['faults']}"
        )

    def _chain(self, event: Event) -> None:
        self._names.update(event.get("names") or {})
        data, kind = event["data"], str(event["kind"])
        if kind in ("drawn", "passed", "settled", "void"):
            return
        details = "  ".join(f"{key} {self._detail(value)}" for key, value in data.items() if key != "task")
        style = "bold red" if kind in ("disputed", "convicted", "evicted", "slashed") else "cyan"
        self._print(f"  block {event['height']:>4}  {kind:<10} {details}", style)

    def _detail(self, value: object) -> str:
        if isinstance(value, list):
            return "/".join(self._detail(item) for item in value)
        return self._name(value) if isinstance(value, str) else short(value)

    def _evicted(self, event: Event) -> None:
        text = f"evicted {self._name(event['peer'])} at step {event['step']}: {event['reason']}"
        self._print(f"{text}, evidence {short(event['evidence'])}", "bold red")

    def _saved(self, event: Event) -> None:
        self._print(f"saved   step {event['step']} in {event['out']}", "green")

    def _done(self, event: Event) -> None:
        self.close()
        self._print(f"done    {event['steps']} steps, loss {event['loss']:.4f}, model in {event['out']}", "green")

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
        self._print(f"chain   tdml-chain evidence --db {event['out']}/chain.db")

    def _other(self, event: Event) -> None:
        details = "  ".join(
            f"{key} {self._detail(value)}"
            for key, value in event.items()
            if key not in ("event", "names", "time") and value != ""
        )
        self._print(f"{event['event']:<9}{details}", "yellow")


def reporter(is_json: bool) -> Callable[[Event], None]:
    """Return the reporter of a command."""
    if is_json:
        return json_report
    if not sys.stdout.isatty():
        return TextReport(Console(highlight=False, width=160))
    return TextReport()
