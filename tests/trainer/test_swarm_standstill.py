"""Workers that are connected and do not get on, or lack memory: the run goes on or ends by name, and never hangs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import trio
from msgspec.structs import replace
from swarm_kit import Kit, assert_same_model, in_virtual_time, manifest_of, trained

from trainer import messages as m
from trainer.coordinator import StageFull, StageLost
from trainer.coordinator_ports import Members, StepDone, patience_for
from trainer.footprint import footprint
from trainer.payloads import Reason, TensorPayload, unpack
from trainer.worker_ports import Compute, T
from trainer.worker_seat import Seat
from trainer.worker_step import StepWork

MANIFEST = manifest_of(stages=2, steps=4)


def ended(kit: Kit, expected: type[Exception]) -> float:
    """Return after how many seconds a run ended with this error."""
    with pytest.RaisesGroup(pytest.RaisesExc(expected)):
        trained(kit)
    return kit.seconds


def mute_from(kit: Kit, step: int, *peers: str) -> None:
    """Let workers stand still from a step on, their links open."""
    kit.governor.hooks[step] = lambda: kit.cell_seconds.update(dict.fromkeys(peers, 1e7))


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_stage_all_of_whose_workers_fall_silent_ends_the_run_by_name(replicas: int) -> None:
    kit = Kit(MANIFEST, replicas=replicas)
    mute_from(kit, 3, *(f"s0r{replica}" for replica in range(replicas)))
    assert kit.patience.empty < ended(kit, StageLost) < kit.patience.empty + 100


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_stage_that_stands_still_counts_as_empty_after_a_second_deadline(replicas: int) -> None:
    kit = Kit(MANIFEST, replicas=replicas)
    mute_from(kit, 3, *(f"s0r{replica}" for replica in range(replicas)))
    seen: list[tuple[float, tuple[tuple[str, ...], ...]]] = []

    async def watch() -> None:
        while kit.coordinator.empty_since is None:
            await trio.sleep(0.5)
        seen.append((trio.current_time(), kit.coordinator.ready))

    async def both() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            await kit.train()

    with pytest.raises(ExceptionGroup):
        in_virtual_time(both)
    (at, ready), *_ = seen
    assert at < (25 if replicas == 1 else 90)
    assert ready == ((), tuple(f"s1r{replica}" for replica in range(replicas)))


def test_a_frozen_only_worker_in_the_reduction_counts_as_empty() -> None:
    kit = Kit(MANIFEST, replicas=1)
    hub_carry = kit.hub.carry
    since: list[float] = []

    async def carry(sender: str, to: str, message: m.Message) -> None:
        if isinstance(message, m.Reduce) and message.step == 2 and to == "s0r0":
            return  # as if it had been stopped just before
        await hub_carry(sender, to, message)

    kit.hub.carry = carry  # type: ignore[method-assign]

    async def watch() -> None:
        while kit.coordinator.empty_since is None:
            await trio.sleep(0.5)
        since.append(trio.current_time())
        kit.hub.carry = hub_carry  # type: ignore[method-assign]

    async def both() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            await kit.train()
            assert kit.coordinator.empty_since is None
            nursery.cancel_scope.cancel()

    in_virtual_time(both)
    assert since[0] < 120
    assert [event.step for event in kit.events if isinstance(event, StepDone)] == [1, 2, 3, 4]


def test_an_only_worker_that_becomes_much_slower_is_waited_for_and_learnt() -> None:
    kit = Kit(MANIFEST, replicas=1)
    kit.governor.hooks[3] = lambda: kit.cell_seconds.update(s0r0=25.0)
    trained(kit)
    speeds = [share.speed for event in kit.events if isinstance(event, StepDone) for share in event.shares]
    assert min(speeds) < 1 / 20


def always_full(kit: Kit, peer: str, after: int) -> Compute:
    """Return a compute that has no memory left after so many pieces of work."""
    plain, count = kit.compute(peer), 0

    async def compute(work: Callable[[], T], /) -> T:
        nonlocal count
        count += 1
        if count > after:
            await trio.sleep(0.01)
            raise MemoryError
        return await plain(work)

    return compute


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_a_stage_whose_workers_all_lack_memory_ends_the_run_by_name(replicas: int) -> None:
    kit = Kit(MANIFEST, replicas=replicas)
    for replica in range(replicas):
        kit.computes[f"s0r{replica}"] = always_full(kit, f"s0r{replica}", 4)
    assert kit.patience.join < ended(kit, StageFull) < 2 * kit.patience.first


PAIR = replace(MANIFEST, replicas=2)
EVERYBODY = (("s0r0", "s0r1"), ("s1r0", "s1r1"))


def bereft(after: float, then: Callable[[Kit], None]) -> Kit:
    """Return a swarm whose first stage holds a step together; one of it dies in the third; `then` comes later."""
    kit = Kit(PAIR, replicas=2, memory_limits=dict.fromkeys(EVERYBODY[0], footprint(PAIR, 0).step))

    async def change() -> None:
        await trio.sleep(after)
        then(kit)

    def die() -> None:
        assert kit.nursery is not None
        kit.hub.faults.crash("s0r1", after=1, of=m.CellDone, before=True)
        kit.nursery.start_soon(change)

    kit.governor.hooks[3] = die
    return kit


def unseat(kit: Kit, *others: str) -> None:
    """Let the chain take the dead worker's seat away, and give others one."""
    kit.governor.members = Members(0, 0, (("s0r0", *others), EVERYBODY[1]))
    for peer in others:
        kit.memory_limits[peer] = footprint(PAIR, 0).step
        kit.start(peer, 0)


@pytest.mark.parametrize("after", [5.0, 90.0])
def test_a_survivor_too_small_for_all_cells_waits_for_the_replica_that_comes_back(after: float) -> None:
    kit = bereft(after, lambda kit: kit.start("s0r1", 0))
    assert_same_model(trained(kit), trained(Kit(PAIR)))
    assert [event.step for event in kit.events if isinstance(event, StepDone)] == [1, 2, 3, 4]
    assert Reason.MEMORY_FULL in kit.workers["s0r0"].refused
    assert kit.seconds < after + 2 * kit.patience.join


def test_a_survivor_too_small_for_all_cells_waits_for_a_spare() -> None:
    kit = bereft(60.0, lambda kit: unseat(kit, "spare"))
    assert_same_model(trained(kit), trained(Kit(PAIR)))
    assert "spare" in {peer for peer, record in kit.records if record.cells}


def test_a_survivor_too_small_for_all_cells_ends_the_run_by_name_once_nobody_can_come() -> None:
    kit = bereft(100.0, lambda kit: unseat(kit))
    assert 100 <= ended(kit, StageFull) < 130


def test_a_fast_replica_takes_no_more_than_it_has_memory_for_and_the_slow_one_does_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limit = footprint(PAIR, 0).step
    kit = Kit(PAIR, memory_limits=dict.fromkeys(EVERYBODY[0], limit), cell_seconds={"s0r1": 0.5})
    held: list[int] = []
    computed = Seat.computed

    def weighed(seat: Seat, work: StepWork, *results: Any) -> None:
        computed(seat, work, *results)
        if work.spec.index == 0:
            held.append(work.nbytes)

    monkeypatch.setattr(Seat, "computed", weighed)
    assert_same_model(trained(kit), trained(Kit(PAIR)))
    assert max(held) <= limit
    assert Reason.MEMORY_FULL in kit.workers["s0r0"].refused
    assert {len(record.cells) for peer, record in kit.records if peer == "s0r1"} == {2}
    assert kit.seconds < 5 * PAIR.steps


def test_a_full_stage_counts_as_empty_and_its_neighbours_are_asked_again_with_pauses() -> None:
    kit = bereft(1e6, lambda _: None)
    seen: list[tuple[float, int]] = []

    async def watch() -> None:
        while kit.coordinator.empty_since is None:
            await trio.sleep(0.5)
        assert kit.coordinator.ready == ((), ("s1r0", "s1r1"))
        seen.append((trio.current_time(), len(kit.hub.log)))
        await trio.sleep(80)
        seen.append((trio.current_time(), len(kit.hub.log)))

    async def both() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            await kit.train()

    with pytest.RaisesGroup(pytest.RaisesExc(StageFull), flatten_subgroups=True):
        in_virtual_time(both)
    (at, before), (_, later) = seen
    assert at < 60
    assert later - before < 80 / kit.patience.floor * 40


@pytest.mark.parametrize("is_frozen", [False, True], ids=["dead", "frozen"])
def test_a_dead_replica_that_keeps_its_seat_delays_the_end_of_a_full_stage_by_little(is_frozen: bool) -> None:
    kit = bereft(2.0, lambda kit: kit.hub.join("s0r1") if is_frozen else None)
    assert kit.patience.join < ended(kit, StageFull) < 7 * kit.patience.join


def test_a_frozen_replica_that_is_asked_again_does_not_hide_that_its_stage_has_lost_the_other() -> None:
    kit = Kit(MANIFEST, replicas=2)
    seats, since = kit.governor.members, list[float]()
    kit.governor.members = Members(0, 0, (("s0r0",), seats.stages[1]))

    def freeze() -> None:
        kit.governor.members = seats
        kit.hub.join("s0r1")  # takes what it is sent and never answers

    async def die() -> None:
        await trio.sleep(kit.patience.join / 4)
        kit.hub.crash("s0r0")
        died = trio.current_time()
        while kit.coordinator.empty_since is None:
            await trio.sleep(0.5)
        since.append(trio.current_time() - died)
        kit.start("s0r0", 0)

    def begin() -> None:
        assert kit.nursery is not None
        kit.nursery.start_soon(die)

    kit.governor.hooks |= {2: freeze, 3: begin}
    with pytest.RaisesGroup(pytest.RaisesExc(StageLost)):
        trained(kit)
    assert since[0] < 2 * kit.patience.tick


def test_the_last_deadline_grows_with_the_model() -> None:
    assert patience_for(10**6, 1024).empty == 600
    assert patience_for(10**9, 2048).empty > 10_000


@pytest.mark.parametrize("at", [3, 9, 14, 21])
@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory")], ids=["python", "torch"])
@pytest.mark.parametrize("replicas", [1, 2])
def test_lack_of_memory_for_what_comes_in_is_a_fault(
    at: int, error: Exception, replicas: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, thrown = 0, False

    def scarce(payload: tuple[TensorPayload, ...]) -> torch.Tensor:
        nonlocal count, thrown
        count += 1
        if count == at:
            thrown = True
            raise error
        return unpack(payload)

    monkeypatch.setattr("trainer.worker_intake.unpack", scarce)
    kit = Kit(MANIFEST, replicas=replicas)
    states = trained(kit)
    monkeypatch.undo()
    assert_same_model(states, trained(Kit(MANIFEST, replicas=replicas)))
    reasons = {message.reason for _, _, message in kit.hub.log if isinstance(message, m.Fault)}
    assert thrown
    assert reasons
    assert reasons <= {Reason.MEMORY_FULL, Reason.NO_STATE}
