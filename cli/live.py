"""The table of stages × peers and the progress bar that stand below the lines of a run on a terminal."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

Event = dict[str, Any]
_GONE = ("evicted", "left")


@dataclass
class Swarm:
    """Who holds which stage, and how the audits of each peer ended."""

    stages: list[list[str]] = field(default_factory=list)
    gone: dict[str, str] = field(default_factory=dict)
    passed: Counter[str] = field(default_factory=Counter)
    disputed: Counter[str] = field(default_factory=Counter)

    def note(self, event: Event) -> None:
        """Take an event of the run into account."""
        match event["event"]:
            case "formed":
                self.stages = [list(peers) for peers in event["stages"]]
                self.gone.clear()
            case "joined":
                self._seat(event["stage"], event["peer"])
            case "left" | "evicted":
                self.gone[event["peer"]] = event["event"]
            case "chain" if event["kind"] == "passed":
                self.passed[event["data"]["worker"]] += 1
            case "chain" if event["kind"] == "disputed":
                self.disputed[event["data"]["worker"]] += 1
            case "chain" if event["kind"] == "evicted":
                self.gone[event["data"]["worker"]] = "evicted"

    def _seat(self, stage: int, peer: str) -> None:
        self.gone.pop(peer, None)
        if stage < len(self.stages) and peer not in self.stages[stage]:
            self.stages[stage].append(peer)

    def table(self, name: Callable[[object], str]) -> Table:
        """Return the grid: a row a stage, a column a replica, with audit marks."""
        grid = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
        for index, peers in enumerate(self.stages):
            grid.add_row(Text(f"stage {index}", style="dim"), *(self._cell(peer, name(peer)) for peer in peers))
        return grid

    def _cell(self, peer: str, name: str) -> Text:
        gone = self.gone.get(peer)
        if gone in _GONE:
            return Text(f"{name} {gone}", style="red strike" if gone == "evicted" else "dim strike")
        cell = Text(name, style="bold")
        if self.passed[peer]:
            cell.append(f" ✓{self.passed[peer]}", style="green")
        if self.disputed[peer]:
            cell.append(f" ✕{self.disputed[peer]}", style="red")
        return cell


class LiveView:
    """Keeps the grid and the bar at the bottom of a terminal; drawn when an event comes, by no thread of its own."""

    def __init__(self, console: Console, name: Callable[[object], str]) -> None:
        self._console = console
        self._name = name
        self._swarm = Swarm()
        self._live: Live | None = None
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console, auto_refresh=False)
        self._task = self._progress.add_task("training", total=None)

    def note(self, event: Event) -> None:
        """Take an event into account and draw anew."""
        self._swarm.note(event)
        match event["event"]:
            case "formed":
                self._progress.update(self._task, total=event.get("steps"))
                self._open()
            case "step":
                self._progress.update(self._task, completed=event["step"])
        if self._live is not None:
            self._live.update(self._draw(), refresh=True)

    def close(self) -> None:
        """Take the view off the terminal."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _open(self) -> None:
        if self._live is None and self._console.is_terminal:
            self._live = Live(self._draw(), console=self._console, auto_refresh=False, transient=True)
            self._live.start()

    def _draw(self) -> Group:
        return Group(self._swarm.table(self._name), self._progress.get_renderable())
