"""What a training run tells its user: one event after the other, the metrics and the losses so far."""

from collections import Counter
from typing import TYPE_CHECKING, Any

from tdml_p2p.swarm.saving import History
from trainer.coordinator_ports import (
    NotValidated,
    Outvoted,
    PeerJoined,
    PeerLeft,
    Rerouted,
    RolledBack,
    SplitTeam,
    StageEmpty,
    StepDone,
    Suspicious,
    SwarmEvent,
)
from trainer.errors import CheckpointError
from trainer.metrics import MetricsLog
from trainer.optimizer import learning_rate

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from chain.engine import ChainEngine
    from trainer.manifest import TaskManifest

_ENDED = ("passed", "convicted", "acquitted", "faulted", "undecided", "withheld", "absent")


class Progress:
    """Turns what happens in a run, over all its tasks, into events for `report` and lines of the metrics."""

    def __init__(self, report: "Callable[[dict[str, Any]], None]", history: History) -> None:
        self._report = report
        self.history = history
        self.has_stepped = False
        self._logs: tuple[MetricsLog, ...] = ()
        self._counts: Counter[str] = Counter()
        self._alone: frozenset[int] = frozenset()
        self._manifest: TaskManifest | None = None

    def begin(self, manifest: "TaskManifest", folders: "tuple[Path, ...]") -> None:
        """Go on with this task; its metrics go to a file in each of the folders."""
        self._manifest = manifest
        self._logs = tuple(MetricsLog(folder / "metrics.jsonl") for folder in folders)

    @property
    def manifest(self) -> "TaskManifest":
        """The manifest of the task that runs."""
        assert self._manifest is not None  # `begin` comes first
        return self._manifest

    def on_event(self, event: SwarmEvent, bytes_sent: int) -> None:
        """Report an event of the coordinator, when this many bytes of tensors have been sent."""
        match event:
            case StepDone():
                self._on_step(event, bytes_sent)
            case Rerouted():
                self._report(
                    {
                        "event": "rerouted",
                        "step": self.of_training(event.step),
                        "stage": event.stage,
                        "peer": event.peer,
                        "cells": list(event.cells),
                        "reason": event.why,
                    }
                )
            case RolledBack():
                step = self.of_training(event.resume_step)
                self._report({"event": "rollback", "generation": event.generation, "step": step})
            case PeerLeft():
                self._report_peer("left", event, event.why)
            case PeerJoined():
                self._report_peer("joined", event, "")
            case Suspicious():
                self._report_peer("suspicious", event, event.why)
            case NotValidated():
                step = self.of_training(event.step)
                self._report({"event": "validation", "step": step, "loss": None, "reason": "a worker was lost"})
            case StageEmpty():
                self._report({"event": "waiting", "step": self.of_training(event.step), "stage": event.stage})
            case Outvoted():
                self._counts["outvoted"] += len(event.cells)
                cells = list(event.cells)
                step = self.of_training(event.step)
                self._report(
                    {"event": "outvoted", "step": step, "stage": event.stage, "peer": event.peer, "cells": cells}
                )
            case SplitTeam():
                step, peers = self.of_training(event.step), list(event.peers)
                self._report({"event": "split", "step": step, "stage": event.stage, "peers": peers})

    def of_training(self, step: int) -> int:
        """Return which step of the whole training a step of this task is."""
        return self.manifest.start + step

    def _report_peer(self, name: str, event: PeerLeft | PeerJoined | Suspicious, why: str) -> None:
        step = self.of_training(event.step)
        self._report({"event": name, "step": step, "stage": event.stage, "peer": event.peer, "reason": why})

    def _on_step(self, event: StepDone, bytes_sent: int) -> None:
        step = self.of_training(event.step)
        self.history.losses[step], self.has_stepped = event.loss, True
        manifest = self.manifest
        line: dict[str, Any] = {
            "loss": event.loss,
            "learning_rate": learning_rate(manifest.optimizer, step, manifest.total_steps),
            "tokens_per_second": event.tokens / max(event.seconds, 1e-9),
            "seconds": event.seconds,
            "waited": event.waited,
            "bytes_sent": bytes_sent,
            "audits": sum(self._counts[kind] for kind in _ENDED),
            "faults": self._counts["disputed"],
            "generation": event.generation,
        }
        if manifest.audit.redundancy > 1:
            line["outvoted"] = self._counts["outvoted"]
        if event.validation is not None:
            self.history.validation[step] = line["validation_loss"] = event.validation
        self._log(step, line)
        shares = [
            {"stage": share.stage, "peer": share.peer, "cells": share.cells, "cells_per_second": share.speed}
            for share in event.shares
        ]
        self._report({"event": "step", "step": step, **line, "shares": shares})
        if event.validation is not None:
            self._report({"event": "validation", "step": step, "loss": event.validation, "reason": ""})
        self._warn_of_lonely(event)

    def formed(self, stages: "Sequence[Sequence[str]]") -> None:
        """Report who holds the stages, and each seated one that depends on a single peer from the start."""
        manifest = self.manifest
        self._report({"event": "formed", "stages": [list(peers) for peers in stages], "steps": manifest.total_steps})
        alone = [stage for stage in manifest.seated if len(stages[stage]) == 1]
        for stage in alone:
            step = self.of_training(1)
            self._report({"event": "alone", "step": step, "stage": stage, "peer": stages[stage][0]})
        self._alone = frozenset(alone)

    def _warn_of_lonely(self, event: StepDone) -> None:
        """Say once when a stage comes to depend on one worker."""
        held = Counter(share.stage for share in event.shares if share.stage in self.manifest.seated)
        alone = frozenset(stage for stage, count in held.items() if count == 1)
        for share in event.shares:
            if share.stage in alone - self._alone:
                step = self.of_training(event.step)
                self._report({"event": "alone", "step": step, "stage": share.stage, "peer": share.peer})
        self._alone = alone

    def _log(self, step: int, line: dict[str, Any]) -> None:
        for metrics in self._logs:
            try:
                metrics.append(step, line)
            except CheckpointError as error:
                self._report({"event": "not-saved", "reason": error.sentence, "hint": error.hint})

    async def follow(self, engine: "ChainEngine", task: str) -> None:
        """Count the task's audits and report evictions, as final blocks bring them."""
        async with engine.subscribe() as blocks:
            async for committed in blocks:
                for event in committed.events:
                    if event.data.get("task") != task:
                        continue
                    self._counts[event.kind] += 1
                    if event.kind == "evicted":
                        self._report_eviction(event.data)

    def _report_eviction(self, data: dict[str, Any]) -> None:
        self._report(
            {
                "event": "evicted",
                "peer": data["worker"],
                "task": data["task"],
                "step": self.of_training(data["step"]),
                "reason": data["reason"],
                "evidence": data["evidence"],
            }
        )
