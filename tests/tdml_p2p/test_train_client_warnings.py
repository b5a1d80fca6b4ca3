"""What a training client warns of: stages with one peer, and what could not be written beside a trained model."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
from train_kit import settings

from chain.state import Table
from tdml_p2p.blob_store import DiskFull
from tdml_p2p.swarm.client import SwarmClient
from tdml_p2p.swarm.preparation import prepare
from tdml_p2p.swarm.progress import Progress
from tdml_p2p.swarm.saving import History
from tdml_p2p.swarm.tracing import TraceCollector
from trainer.coordinator_ports import Share, StepDone
from trainer.manifest import TaskManifest


def alone_of(manifest: TaskManifest, *shares: tuple[Share, ...]) -> list[tuple[int, int]]:
    """Return the steps and stages of the warnings that a run of these shares gives after its forming."""
    events: list[dict[str, Any]] = []
    progress = Progress(events.append, History({}, {}))
    progress.begin(manifest, ())
    progress.formed([[share.peer for share in shares[0] if share.stage == stage] for stage in range(2)])
    for step, held in enumerate(shares, 1):
        progress.on_event(StepDone(step, 0, 1.0, 1, 1.0, 0.0, shares=held), 0)
    return [(event["step"], event["stage"]) for event in events if event["event"] == "alone"]


def test_a_stage_with_one_peer_is_warned_about_once(tmp_path: Path) -> None:
    manifest = prepare(settings(tmp_path)).manifest
    one, two = (Share(0, "a", 1, 1.0), Share(1, "b", 1, 1.0)), (Share(0, "c", 1, 1.0),)
    assert alone_of(manifest, one, one) == [(1, 0), (1, 1)]
    assert alone_of(manifest, one + two, one + two, one, one) == [(1, 1), (3, 0)]


def test_what_cannot_be_written_beside_a_trained_model_is_told(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    train = settings(tmp_path)
    client = SwarmClient(cast(Any, SimpleNamespace()), prepare(train), train, events.append)
    trace = cast(TraceCollector, SimpleNamespace(save=lambda path: path.write_text("")))
    client._save_trace(trace, tmp_path / "no folder" / "trace.json")
    assert [event["event"] for event in events] == ["not-saved"]


@pytest.mark.trio
@pytest.mark.parametrize("error", [DiskFull(Path("blobs")), OSError("disk")])
async def test_evidence_that_cannot_be_written_does_not_spoil_a_trained_model(error: Exception, tmp_path: Path) -> None:
    async def collect(*_: object) -> None:
        await trio.lowlevel.checkpoint()
        raise error

    events: list[dict[str, Any]] = []
    train = settings(tmp_path)
    conviction = SimpleNamespace(task=b"", kind=0, subject=bytes(32))
    state = SimpleNamespace(tables={Table.CONVICTIONS: {b"": conviction}})
    peer = SimpleNamespace(engine=SimpleNamespace(state=state), swarm=SimpleNamespace(collect=collect))
    client = SwarmClient(cast(Any, peer), prepare(train), train, events.append)
    await client._save_evidence()
    assert [event["event"] for event in events] == ["not-saved"]
