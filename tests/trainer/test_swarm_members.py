"""Evictions, newcomers, disagreement and intruders."""

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
import trio
from swarm_kit import CLIENT, Kit, assert_same_model, manifest_of, tied_manifest, trained

from trainer import messages as m
from trainer import payloads
from trainer.coordinator import StageLost
from trainer.coordinator_ports import (
    Members,
    PeerJoined,
    PeerLeft,
    RolledBack,
    StageEmpty,
    StepDone,
    SwarmEvent,
)
from trainer.joint import check_tied
from trainer.payloads import Reason
from trainer.state import StageState
from trainer.transport import Faults
from trainer.worker_ports import Compute, T

MANIFEST = manifest_of(stages=2, steps=6)
FULL = (("s0r0", "s0r1"), ("s1r0", "s1r1"))


@lru_cache
def undisturbed() -> tuple[StageState, ...]:
    return trained(Kit(MANIFEST))


def of_kind(kit: Kit, kind: type[SwarmEvent]) -> list[SwarmEvent]:
    return [event for event in kit.events if isinstance(event, kind)]


def steps_of(kit: Kit) -> list[tuple[int, int]]:
    return [(e.generation, e.step) for e in kit.events if isinstance(e, StepDone)]


def test_an_eviction_rolls_back_and_replays_without_the_cheat() -> None:
    kit = Kit(MANIFEST)

    def evict() -> None:
        kit.governor.members = Members(1, 2, (("s0r0", "s0r1"), ("s1r0",)))

    kit.governor.hooks[5] = evict
    assert_same_model(trained(kit), undisturbed())
    assert steps_of(kit) == [(0, 1), (0, 2), (0, 3), (0, 4), (1, 3), (1, 4), (1, 5), (1, 6)]
    assert of_kind(kit, RolledBack) == [RolledBack(1, 2)]
    assert {r.generation for peer, r in kit.records if peer == "s1r1"} == {0}


def test_a_rollback_of_ends_that_share_a_tensor_leaves_them_equal() -> None:
    manifest = tied_manifest(stages=2, steps=6)
    expected = trained(Kit(manifest))
    kit = Kit(manifest)

    def evict() -> None:
        kit.governor.members = Members(1, 2, (("s0r0", "s0r1"), ("s1r0",)))

    kit.governor.hooks[5] = evict
    found = trained(kit)
    assert_same_model(found, expected)
    check_tied(manifest, found)
    assert steps_of(kit)[3:5] == [(0, 4), (1, 3)]


def test_an_eviction_in_the_middle_of_a_step_ends_it_at_once() -> None:
    kit = Kit(MANIFEST, cell_seconds={"s1r1": 5.0})

    def evict_soon() -> None:
        async def evict() -> None:
            await trio.sleep(1.0)
            kit.governor.members = Members(1, 2, (("s0r0", "s0r1"), ("s1r0",)))

        assert kit.nursery is not None
        kit.nursery.start_soon(evict)

    kit.governor.hooks[4] = evict_soon
    assert_same_model(trained(kit), undisturbed())
    assert steps_of(kit) == [(0, 1), (0, 2), (0, 3), (1, 3), (1, 4), (1, 5), (1, 6)]


def test_a_verdict_after_the_last_step_still_counts() -> None:
    kit = Kit(MANIFEST)

    def evict() -> None:
        kit.governor.members = Members(1, 4, (("s0r1",), FULL[1]))

    kit.governor.hooks[7] = evict
    assert_same_model(trained(kit), undisturbed())
    assert steps_of(kit)[-2:] == [(1, 5), (1, 6)]


def test_a_newcomer_takes_part_from_the_next_step_on() -> None:
    kit = Kit(MANIFEST)
    kit.governor.members = Members(0, 0, (("s0r0",), FULL[1]))

    def arrive() -> None:
        kit.governor.members = Members(0, 0, FULL)
        kit.start("s0r1", 0)

    kit.governor.hooks[3] = arrive
    assert_same_model(trained(kit), undisturbed())
    assert PeerJoined(3, 0, "s0r1") in kit.events
    assert [(r.step, len(r.cells)) for peer, r in kit.records if peer == "s0r1"] == [
        (3, 0),
        (4, 2),
        (5, 2),
        (6, 2),
    ]


def test_a_newcomer_who_gets_no_state_is_tried_again_with_growing_pauses() -> None:
    kit = Kit(manifest_of(stages=2, steps=12))
    kit.governor.members = Members(0, 0, (("s0r0",), FULL[1]))
    kit.unreachable = {"s0r0"}

    def arrive() -> None:
        kit.governor.members = Members(0, 0, FULL)
        kit.start("s0r1", 0)

    kit.governor.hooks[2] = arrive
    kit.governor.hooks[8] = kit.unreachable.clear
    trained(kit)
    asked = [message.step for _, to, message in kit.hub.log if to == "s0r1" and isinstance(message, m.Prepare)]
    assert asked == [1, 2, 4, 8]
    assert [e.step for e in kit.events if isinstance(e, PeerJoined) and e.peer == "s0r1"] == [9]


def test_a_newcomer_who_is_silent_does_not_hold_up_the_run() -> None:
    kit = Kit(MANIFEST)
    kit.governor.members = Members(0, 0, (("s0r0",), FULL[1]))

    def arrive() -> None:
        kit.governor.members = Members(0, 0, FULL)
        kit.hub.join("s0r1")

    kit.governor.hooks[2] = arrive
    assert_same_model(trained(kit), undisturbed())
    assert sum(event.seconds > 15 for event in kit.events if isinstance(event, StepDone)) == 3


def test_an_empty_stage_is_refilled_by_a_newcomer() -> None:
    kit = Kit(MANIFEST, replicas=1, faults=Faults().crash("s1r0", after=2, of=m.CellDone))

    def arrive_later(event: SwarmEvent) -> None:
        kit.events.append(event)
        if isinstance(event, StageEmpty):
            kit.governor.members = Members(0, 0, (("s0r0",), ("s1r9",)))
            kit.start("s1r9", 1)

    kit.report = arrive_later
    assert_same_model(trained(kit), undisturbed())
    assert of_kind(kit, StageEmpty) == [StageEmpty(1, 1)]


@pytest.mark.parametrize("stage", [0, 1])
def test_the_last_worker_of_a_stage_hands_its_state_over_and_leaves(stage: int) -> None:
    kit = Kit(MANIFEST, replicas=1)
    seats = [("s0r0",), ("s1r0",)]

    def leave() -> None:
        seats[stage] = ("new",)
        kit.governor.members = Members(0, 0, tuple(seats))
        kit.start("new", stage)

    kit.governor.hooks[4] = leave
    assert_same_model(trained(kit), undisturbed())
    assert PeerJoined(4, stage, "new") in kit.events
    assert of_kind(kit, PeerLeft) == [PeerLeft(4, stage, f"s{stage}r0", "unseated")]
    assert len(steps_of(kit)) == MANIFEST.steps


def perturbed(kit: Kit, peer: str) -> Compute:
    """Return a compute that spoils the peer's third optimiser step."""
    plain = kit.compute(peer)
    count = 0

    async def compute(work: Callable[[], T], /) -> T:
        nonlocal count
        result = await plain(work)
        if isinstance(result, StageState) and result.step == 3 and not count:
            count += 1
            result.weights.add_(1.0)
            vars(result).pop("manifest")
        return result

    return compute


def test_a_replica_with_another_root_is_left_out_and_resyncs() -> None:
    kit = Kit(MANIFEST, replicas=3)
    kit.computes["s0r1"] = perturbed(kit, "s0r1")
    assert_same_model(trained(kit), undisturbed())
    assert of_kind(kit, PeerLeft) == [PeerLeft(4, 0, "s0r1", Reason.STATE_MISMATCH)]
    assert PeerJoined(4, 0, "s0r1") in kit.events
    assert kit.workers["s0r1"].states[-1].root == kit.workers["s0r0"].states[-1].root


def intruded(kit: Kit) -> None:
    """Let a stranger and a member of the wrong place send what they must not."""
    x = payloads.pack(torch.zeros(MANIFEST.batch, MANIFEST.sequence, MANIFEST.hidden))
    flat = payloads.pack(torch.zeros(3))
    for sender in ("stranger", "s1r1"):
        kit.hub.inject(sender, "s0r0", m.Prepare(9, 0, 0, b"", ()))
        kit.hub.inject(sender, "s0r0", m.Commit(0, 2))
        kit.hub.inject(sender, "s0r0", m.Finish())
        kit.hub.inject(sender, "s1r0", m.Activation(0, 2, 0, 0, x))
        kit.hub.inject(sender, "s1r0", m.Gradient(0, 2, 0, 1, x))
        kit.hub.inject(sender, "s1r0", m.Partial(0, 2, 1, 1, flat))
        kit.hub.inject(sender, CLIENT, m.CellDone(0, 2, 0, 0, 0.0, 0.0))
        kit.hub.inject(sender, CLIENT, m.Reduced(0, 2, 1, bytes(32)))
        kit.hub.inject(sender, CLIENT, m.Ready(0, 1, bytes(32)))
        kit.hub.inject(sender, CLIENT, m.Fault(0, 2, Reason.PEER_UNREACHABLE, ("nobody",)))
        kit.hub.inject(sender, CLIENT, m.Activation(0, 2, 0, 0, x))


def test_intruders_are_refused_and_change_nothing() -> None:
    kit = Kit(MANIFEST)
    kit.governor.hooks[2] = lambda: intruded(kit)
    assert_same_model(trained(kit), undisturbed())
    assert kit.workers["s0r0"].refused == {Reason.WRONG_SENDER: 6}
    assert kit.coordinator.refused[Reason.UNEXPECTED] == 2
    assert not of_kind(kit, PeerLeft)


def answered_wrongly(kit: Kit) -> None:
    """Let members answer too late, for another generation, for no cell, and for cells of others."""
    kit.hub.inject("s1r1", CLIENT, m.CellDone(0, 2, 0, 1, 0.0, 0.0))
    kit.hub.inject("s1r1", CLIENT, m.NotFinite(0, 2, 0, 1, "output"))
    kit.hub.inject("s1r1", CLIENT, m.Reduced(0, 2, 1, bytes(32)))
    kit.hub.inject("s1r1", CLIENT, m.CellDone(7, 4, 0, 1, 0.0, 0.0))
    for cell in (*range(MANIFEST.microbatches), MANIFEST.microbatches, 1000):
        kit.hub.inject("s1r1", CLIENT, m.CellDone(0, 4, cell, 0, 0.0, 0.0))
        kit.hub.inject("s1r1", CLIENT, m.Passed(0, 4, cell, 0))


def test_answers_that_are_late_or_for_other_cells_are_refused_by_name_and_change_nothing() -> None:
    kit = Kit(MANIFEST)
    carry, done = kit.hub.carry, []

    async def carry_on(sender: str, to: str, message: m.Message) -> None:
        if isinstance(message, m.Passed) and message.step == 4 and not done:
            done.append(answered_wrongly(kit))
        await carry(sender, to, message)

    kit.hub.carry = carry_on  # type: ignore[method-assign]
    assert_same_model(trained(kit), undisturbed())
    assert done
    assert kit.coordinator.refused[Reason.STALE_STEP] == 4
    assert kit.coordinator.refused[Reason.WRONG_SENDER] == 2 * MANIFEST.microbatches
    assert kit.coordinator.refused[Reason.UNKNOWN_CELL] == 4
    assert not of_kind(kit, PeerLeft)


def test_every_message_twice_is_once() -> None:
    kit = Kit(MANIFEST)
    carry = kit.hub.carry

    async def carry_twice(sender: str, to: str, message: m.Message) -> None:
        await carry(sender, to, message)
        if not isinstance(message, m.Prepare | m.Finish):
            await carry(sender, to, message)

    kit.hub.carry = carry_twice  # type: ignore[method-assign]
    assert_same_model(trained(kit), undisturbed())
    assert not of_kind(kit, PeerLeft)


def test_the_run_ends_by_name_when_a_member_list_is_empty() -> None:
    kit = Kit(MANIFEST)
    kit.governor.members = Members(0, 0, ((), FULL[1]))
    with pytest.raises(ExceptionGroup) as failure:
        trained(kit)
    assert failure.group_contains(StageLost)


@pytest.mark.parametrize("replicas", [1, 3])
def test_events_tell_every_step_once(replicas: int) -> None:
    kit = Kit(MANIFEST, replicas=replicas)
    trained(kit)
    assert steps_of(kit) == [(0, step) for step in range(1, 7)]
    assert all(e.tokens == MANIFEST.tokens_per_step for e in kit.events if isinstance(e, StepDone))


def failing(kit: Kit, peer: str, error: Exception, at: int) -> Compute:
    """Return a compute whose `at`-th piece of work fails."""
    plain = kit.compute(peer)
    count = 0

    async def compute(work: Callable[[], T], /) -> T:
        nonlocal count
        count += 1
        if count == at:
            raise error
        return await plain(work)

    return compute


TORCH_FULL = "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory"


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError(TORCH_FULL)], ids=["python", "torch"])
@pytest.mark.parametrize("at", [1, 2, 3, 6, 7, 8])
@pytest.mark.parametrize("replicas", [1, 2])
def test_lack_of_memory_at_any_moment_is_a_fault_that_the_worker_survives(
    error: Exception, at: int, replicas: int
) -> None:
    kit = Kit(MANIFEST, replicas=replicas)
    peer = f"s0r{replicas - 1}"
    kit.computes[peer] = failing(kit, peer, error, at)
    assert_same_model(trained(kit), undisturbed())
    assert peer in {peer for peer, record in kit.records if record.step == MANIFEST.steps}
    faults = [message.reason for sender, _, message in kit.hub.log if isinstance(message, m.Fault)]
    assert set(faults) <= {Reason.MEMORY_FULL, Reason.NO_STATE}
    assert faults
    # an only worker that gave its state up is asked again after the floor of all deadlines
    longest = 10 if replicas > 1 else kit.patience.floor + 1
    assert max(event.seconds for event in kit.events if isinstance(event, StepDone)) < longest


@pytest.mark.parametrize("at", range(1, 9))
def test_a_cell_that_goes_away_and_back_while_it_is_computed_is_done_again(at: int) -> None:
    """Its tensors are let go meanwhile: what comes out of the computation is half a cell."""
    kit = Kit(MANIFEST, replicas=1)
    plain, count = kit.compute("s0r0"), 0

    async def compute(work: Callable[[], T], /) -> T:
        nonlocal count
        count += 1
        if count == at:
            for cell in range(MANIFEST.microbatches):
                for peer in ("elsewhere", "s0r0"):
                    kit.hub.inject(CLIENT, "s0r0", m.Reroute(0, 1, cell, 0, peer))
        return await plain(work)

    kit.computes["s0r0"] = compute
    assert_same_model(trained(kit), undisturbed())
    assert len(steps_of(kit)) == MANIFEST.steps
