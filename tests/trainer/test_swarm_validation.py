"""Validating between steps: what it measures, that it changes nothing, and that a death costs only itself."""

from functools import lru_cache

import numpy as np
import pytest
import torch
import trio
from swarm_kit import CLIENT, Kit, assert_same_model, batches_of, manifest_of, trained

from trainer.coordinator_ports import Members, NotValidated, StepDone
from trainer.data import validation_of
from trainer.local import train_locally, whole
from trainer.messages import Message, Probe, Probed, Relay
from trainer.payloads import MessageError, Reason, pack
from trainer.stage import build_stage
from trainer.state import StageState
from trainer.transport import Faults, Received
from trainer.worker_ports import WorkerConfig
from trainer.worker_probe import Probes

MANIFEST = manifest_of(stages=2, steps=4)


@lru_cache
def unmeasured() -> tuple[tuple[StageState, ...], list[float]]:
    kit = Kit(MANIFEST)
    return trained(kit), kit.losses


def measured(kit: Kit) -> dict[int, float | None]:
    return {event.step: event.validation for event in kit.events if isinstance(event, StepDone)}


def assert_unchanged(kit: Kit) -> None:
    states, losses = unmeasured()
    assert_same_model(trained(kit), states)
    assert kit.losses == pytest.approx(losses, rel=1e-5)


def reference(steps: int) -> float:
    """Return the loss that one process measures after so many steps."""
    uncut = whole(MANIFEST)
    stage = build_stage(uncut, 0)
    stage.load(train_locally(MANIFEST, batches_of(MANIFEST), steps).weights)
    kept = validation_of((np.arange(200) * 7 % 61).astype(np.int32), MANIFEST)
    return float(np.mean([float(stage.evaluate(*kept.batch(index)).mean()) for index in range(kept.count)]))


def test_every_so_many_steps_and_at_the_end_the_new_state_is_measured_and_training_stays_bit_equal() -> None:
    kit = Kit(manifest_of(stages=2, steps=4), replicas=2, eval_every=3)
    states = trained(kit)
    assert [state.root for state in states] == [state.root for state in unmeasured()[0]]
    assert kit.losses == unmeasured()[1]
    found = measured(kit)
    assert [step for step, loss in found.items() if loss is not None] == [3, 4]
    assert found[3] == pytest.approx(reference(3), rel=1e-5)
    assert found[4] == pytest.approx(reference(4), rel=1e-5)
    cells = [cell.cell for _, record in kit.records for cell in record.cells]
    assert len(cells) == 4 * 2 * MANIFEST.microbatches


def test_a_model_in_one_stage_is_measured_too() -> None:
    kit = Kit(manifest_of(stages=1), replicas=1, eval_every=4)
    trained(kit)
    assert measured(kit)[4] == pytest.approx(reference(4), rel=1e-5)


@pytest.mark.parametrize(
    ("peer", "of", "before"),
    [("s0r1", Relay, True), ("s0r1", Relay, False), ("s1r1", Probed, True), ("s1r0", Probed, False)],
)
def test_a_worker_that_dies_while_it_measures_costs_only_the_measure(
    peer: str, of: type[Message], before: bool
) -> None:
    kit = Kit(MANIFEST, faults=Faults().crash(peer, after=1, of=of, before=before), eval_every=2)
    times: list[float] = []
    kit.report = lambda event: (kit.events.append(event), times.append(trio.current_time()))[0]
    assert_unchanged(kit)
    assert times[-1] - times[0] < kit.patience.first / 2
    found = measured(kit)
    assert found[4] == pytest.approx(reference(4), rel=1e-5)
    assert [event.step for event in kit.events if isinstance(event, NotValidated)] == [2] * (found[2] is None)
    if before:
        assert found[2] is None


def test_no_more_is_under_way_than_keeps_every_stage_busy() -> None:
    kit = Kit(manifest_of(stages=2, steps=2, microbatches=10), replicas=1, eval_every=2)
    under_way, most = set(), 0
    post, take = kit.coordinator._state.post, kit.coordinator._swarm.take

    def posted(to: str, message: Message) -> None:
        nonlocal most
        if isinstance(message, Probe):
            under_way.add(message.cell)
            most = max(most, len(under_way))
        post(to, message)

    def taken(received: Received) -> None:
        if isinstance(received.message, Probed):
            under_way.discard(received.message.cell)
        take(received)

    kit.coordinator._state.post, kit.coordinator._swarm.take = posted, taken  # type: ignore[method-assign]
    trained(kit)
    assert measured(kit)[2] is not None
    assert (most, under_way) == (3, set())


def test_a_worker_that_cannot_measure_says_so_at_once() -> None:
    kit = Kit(MANIFEST, replicas=1, eval_every=2)
    original = kit.start

    def start(peer: str, stage: int) -> None:
        original(peer, stage)
        if peer == "s0r0":
            kit.workers[peer]._computer._stage.evaluate = fails  # type: ignore[method-assign]

    def fails(x: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        raise RuntimeError("out of memory")

    kit.start = start  # type: ignore[method-assign]
    assert_unchanged(kit)
    assert [event.step for event in kit.events if isinstance(event, NotValidated)] == [2, 4]


def test_an_eviction_while_measuring_keeps_the_step_that_was_committed() -> None:
    kit = Kit(MANIFEST, replicas=2, eval_every=2)
    seen: list[int] = []

    def evict(received: Received) -> None:
        if isinstance(received.message, Probed) and not seen:
            seen.append(received.message.step)
            kit.governor.members = Members(1, 1, kit.governor.members.stages)

    take = kit.coordinator._swarm.take
    kit.coordinator._swarm.take = lambda received: (evict(received), take(received))[1]  # type: ignore[method-assign]
    assert_unchanged_after_rollback(kit)
    assert seen == [2]


def assert_unchanged_after_rollback(kit: Kit) -> None:
    assert_same_model(trained(kit), unmeasured()[0])
    assert [event.step for event in kit.events if isinstance(event, StepDone)] == [1, 2, 2, 3, 4]


TOKENS = pack(torch.zeros(2, 8, dtype=torch.int32))
HIDDEN = pack(torch.zeros(2, 8, 16))


@pytest.mark.parametrize(
    ("stage", "sender", "message", "reason"),
    [
        (0, "s1r0", Probe(0, 5, 0, ("me", "s1r0"), (*TOKENS, *TOKENS)), Reason.WRONG_SENDER),
        (0, CLIENT, Probe(0, 5, 0, ("other", "me"), (*TOKENS, *TOKENS)), Reason.UNKNOWN_CELL),
        (0, CLIENT, Probe(0, 5, 0, ("me",), (*TOKENS, *TOKENS)), Reason.UNKNOWN_CELL),
        (0, CLIENT, Probe(0, 7, 0, ("me", "s1r0"), (*TOKENS, *TOKENS)), Reason.STALE_STEP),
        (0, CLIENT, Probe(0, 4, 0, ("me", "s1r0"), (*TOKENS, *TOKENS)), Reason.STALE_STEP),
        (0, CLIENT, Probe(1, 5, 0, ("me", "s1r0"), (*TOKENS, *TOKENS)), Reason.STALE_STEP),
        (1, CLIENT, Probe(0, 5, 0, ("s0r0", "me"), (*TOKENS, *TOKENS)), Reason.WRONG_STAGE),
        (1, "stranger", Relay(0, 5, 0, 0, ("s0r0", "me"), (*HIDDEN, *TOKENS)), Reason.WRONG_SENDER),
        (1, "s0r0", Relay(0, 5, 0, 1, ("s0r0", "me"), (*HIDDEN, *TOKENS)), Reason.WRONG_STAGE),
        (1, "s0r0", Relay(0, 5, 0, 0, ("s0r0", "me"), (*pack(torch.zeros(2, 80, 16)), *TOKENS)), Reason.MEMORY_FULL),
    ],
)
def test_probes_that_do_not_fit_are_refused(stage: int, sender: str, message: Probe | Relay, reason: Reason) -> None:
    probes = Probes(WorkerConfig(CLIENT, build_stage(MANIFEST, stage), MANIFEST, 8, early_limit=4096), "me")
    with pytest.raises(MessageError) as caught:
        probes.take(Received(sender, message), message, 0, 5)
    assert caught.value.reason is reason


def test_a_probe_waits_for_the_commit_that_it_follows_and_is_dropped_after_the_next() -> None:
    probes = Probes(WorkerConfig(CLIENT, build_stage(MANIFEST, 0), MANIFEST, 8), "me")
    first, other = (Probe(0, 6, cell, ("me", "s1r0"), (*TOKENS, *TOKENS)) for cell in (1, 0))
    for message in (first, other):
        probes.take(Received(CLIENT, message), message, 0, 5)
    with pytest.raises(MessageError) as caught:
        probes.take(Received(CLIENT, first), first, 0, 5)
    assert caught.value.reason is Reason.DUPLICATE
    assert probes.next(0, 5) is None
    due = probes.next(0, 6)
    assert due is not None
    assert due.message is other
    assert probes.next(0, 7) is None
    assert probes.next(0, 6) is None
