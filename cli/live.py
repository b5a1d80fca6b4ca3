"""The table of stages × peers and the progress bar that stand below the lines of a run on a terminal."""

import sys
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from statistics import fmean
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

Event = dict[str, Any]
_RECENT_STEPS = 20


@dataclass
class Swarm:
    """Who holds which stage, its share of the last step's cells and speed, and how its audits ended."""

    stages: list[list[str]] = field(default_factory=list)
    gone: dict[str, str] = field(default_factory=dict)
    passed: Counter[str] = field(default_factory=Counter)
    disputed: Counter[str] = field(default_factory=Counter)
    fresh: set[str] = field(default_factory=set)
    shares: dict[str, tuple[float, float]] = field(default_factory=dict)

    def note(self, event: Event) -> None:
        """Take an event of the run into account."""
        match event["event"]:
            case "formed":
                self.stages = [list(peers) for peers in event["stages"]]
                self.gone.clear()
            case "joined":
                self._seat(event["stage"], event["peer"])
            case "step":
                self._share(event.get("shares") or [])
            case "left":
                self.gone.setdefault(event["peer"], "lost")
            case "evicted":
                self.gone[event["peer"]] = "evicted"
            case "chain" if event["kind"] == "passed":
                self.passed[event["data"]["worker"]] += 1
            case "chain" if event["kind"] == "disputed":
                self.disputed[event["data"]["worker"]] += 1
            case "chain" if event["kind"] == "evicted":
                self.gone[event["data"]["worker"]] = "evicted"

    def _seat(self, stage: int, peer: str) -> None:
        self.gone.pop(peer, None)
        self.fresh.add(peer)
        if stage < len(self.stages) and peer not in self.stages[stage]:
            self.stages[stage].append(peer)

    def _share(self, shares: list[dict[str, Any]]) -> None:
        totals: Counter[int] = Counter()
        for share in shares:
            totals[share["stage"]] += share["cells"]
        self.shares = {
            share["peer"]: (share["cells"] / (totals[share["stage"]] or 1), share["cells_per_second"])
            for share in shares
        }
        self.fresh.clear()

    def table(self, name: Callable[[object], str]) -> Table:
        """Return the grid: a row a stage, a column a replica, with share, cells per second and audit marks."""
        grid = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
        for index, peers in enumerate(self.stages):
            grid.add_row(Text(f"stage {index}", style="dim"), *(self._cell(peer, name(peer)) for peer in peers))
        return grid

    def _cell(self, peer: str, name: str) -> Text:
        gone = self.gone.get(peer)
        if gone is not None:
            return Text(f"{name} {gone}", style="red strike" if gone == "evicted" else "dim strike")
        cell = Text(name, style="bold")
        if peer in self.fresh:
            cell.append(" joined", style="green")
        elif peer in self.shares:
            share, speed = self.shares[peer]
            cell.append(f" {share:.0%} {speed:.1f}/s" if share else " idle", style="cyan" if share else "dim")
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
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[eta]}"))
        self._progress = Progress(*columns, console=console, auto_refresh=False)
        self._task = self._progress.add_task("training", total=None, eta="")
        self._seconds: deque[float] = deque(maxlen=_RECENT_STEPS)

    def note(self, event: Event) -> None:
        """Take an event into account and draw anew."""
        self._swarm.note(event)
        match event["event"]:
            case "formed":
                self._progress.update(self._task, total=event.get("steps"))
                self._open()
            case "step":
                self._seconds.append(event["seconds"] + event["waited"])
                self._progress.update(self._task, completed=event["step"], eta=self._eta(event["step"]))
            case "rollback":
                self._progress.update(self._task, completed=event["step"], eta=self._eta(event["step"]))
        if self._live is not None:
            self._live.update(self._draw(), refresh=True)

    def _eta(self, step: int) -> str:
        """Return the time that is left at the pace of the last steps."""
        total = self._progress.tasks[0].total
        if total is None or not self._seconds:
            return ""
        return f"eta {timedelta(seconds=round(max(total - step, 0) * fmean(self._seconds)))}"

    def close(self) -> None:
        """Take the view off the terminal."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _open(self) -> None:
        if self._live is None and self._console.is_terminal:
            # what goes to another place than the terminal must still go there
            is_shared = sys.stderr.isatty()
            self._live = Live(
                self._draw(),
                console=self._console,
                auto_refresh=False,
                transient=True,
                redirect_stderr=is_shared,
            )
            self._live.start()

    def _draw(self) -> Group:
        return Group(self._swarm.table(self._name), self._progress.get_renderable())
