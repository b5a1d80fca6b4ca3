"""Training with compressed links: audits see the bytes that were received, replicas agree, the loss hardly moves."""

from functools import cache

import msgspec
import pytest
import torch
import trio.testing

from tdml_p2p.swarm.envelope import is_proven
from tdml_p2p.swarm.inputs import Inputs, Wanted, expected_messages, merge
from tdml_p2p.swarm.reexecution import Reexecutor, results_of
from tests.tdml_p2p.swarm.session_kit import TASK, Run, inline, without_threads
from tests.trainer.swarm_kit import Kit, batches_of, manifest_of
from trainer.content import address_of
from trainer.coordinator_ports import StepDone
from trainer.local import train_locally
from trainer.manifest import TaskManifest
from trainer.messages import encode_header
from trainer.worker_step import CellRecord

CODECS = ("bf16", "int8")


def manifest(compression: str, steps: int = 3, stages: int = 3) -> TaskManifest:
    return msgspec.structs.replace(manifest_of(stages=stages, steps=steps, layers=3), compression=compression)


@pytest.mark.parametrize("compression", CODECS)
async def test_an_auditor_computes_what_the_worker_did(
    compression: str, autojump_clock: trio.testing.MockClock
) -> None:
    run = Run(manifest(compression))
    await run.train()
    for stage, (worker,) in enumerate(run.stages):
        kept = run.sessions[worker].book.cell(0, 2, 1)
        assert kept is not None
        with without_threads():
            execution = await Reexecutor(run.fetch, run.ask, inline).run(run.cell(Wanted(TASK, 0, 2, stage, 1)))
            assert results_of(execution) == (kept.trace.y, kept.trace.gx, kept.trace.gw)
        assert (execution.inputs.x.address, execution.inputs.gy.address) == (kept.trace.x, kept.trace.gy)


@pytest.mark.parametrize("compression", CODECS)
async def test_neighbours_are_a_second_source_of_the_very_bytes(
    compression: str, autojump_clock: trio.testing.MockClock
) -> None:
    run = Run(manifest(compression))
    await run.train()
    wanted = Wanted(TASK, 0, 2, 1, 1)
    own = run.describe(run.stages[1][0], wanted)
    before, after = run.describe(run.stages[0][0], wanted), run.describe(run.stages[2][0], wanted)
    assert own is not None
    assert before is not None
    assert after is not None
    merged = merge([before, after])
    assert isinstance(merged, Inputs)
    assert merge([own]) == merged
    x, _ = expected_messages(wanted, run.manifest)
    proof = (merged.x.address, merged.x.signature)
    assert is_proven(TASK, merged.x.sender, encode_header(x), proof)
    sender = run.sessions[run.stages[0][0]]
    sent = sender.blob(merged.x.address)
    assert sent is not None
    assert address_of(sent) == merged.x.address
    assert x.payload[0].nbytes == len(sent)  # type: ignore[union-attr]
    sender.book.forget(3, 0)
    assert sender.book.blob(merged.x.address) is None


@cache
def losses_alone() -> list[float]:
    plain = manifest("none", steps=12)
    losses: list[float] = []
    train_locally(plain, batches_of(plain), 12, lambda step: losses.append(step.loss))
    return losses


@pytest.mark.parametrize("compression", [*CODECS, "none"])
async def test_replicas_agree_and_the_loss_stays_near(compression: str, autojump_clock: trio.testing.MockClock) -> None:
    kit = Kit(manifest(compression, steps=12), replicas=2)
    await kit.train()
    assert [type(event).__name__ for event in kit.events if "Left" in type(event).__name__] == []
    losses = [event.loss for event in kit.events if isinstance(event, StepDone)]
    tolerance = 0.0 if compression == "none" else 2e-3
    assert losses == pytest.approx(losses_alone(), rel=1e-6 + tolerance)
    is_changed = losses != pytest.approx(losses_alone(), rel=1e-6)
    assert is_changed is (compression != "none")


@pytest.mark.parametrize("compression", CODECS)
async def test_cells_are_computed_on_what_was_decoded(compression: str, autojump_clock: trio.testing.MockClock) -> None:
    kit = Kit(manifest(compression, steps=1), replicas=1)
    await kit.train()
    cells: dict[tuple[str, int], CellRecord] = {
        (peer, cell.cell): cell for peer, record in kit.records for cell in record.cells
    }
    for index in range(kit.manifest.microbatches):
        first, middle = cells["s0r0", index], cells["s1r0", index]
        assert middle.x_sent is not None
        assert first.x_sent is None
        assert not torch.equal(first.y, middle.x)
        assert float((first.y - middle.x).abs().max() / first.y.abs().max()) < 1e-2
