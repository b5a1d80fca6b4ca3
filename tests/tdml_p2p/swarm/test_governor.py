"""The governor tells the coordinator what final blocks say of seats, settled steps and generations."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import cast

import msgspec
import pytest
import trio
import trio.testing

from chain.engine import ChainEngine
from chain.keys import PrivateKey, peer_id
from chain.records import Task, TaskStatus, Worker, WorkerStatus
from tdml_p2p.swarm.governor import ChainGovernor, TaskEnded
from trainer.coordinator_ports import Members, Settled

TASK = bytes(range(32))
KEYS = [PrivateKey(bytes([number + 1]) * 32) for number in range(5)]


class FakeChain:
    """An engine whose final blocks tests make: `task` and `workers` are its state."""

    def __init__(self) -> None:
        self.record: Task | None = Task(
            id=TASK,
            client=KEYS[4].account,
            manifest=bytes(32),
            stages=2,
            replicas=2,
            steps=20,
            microbatches=4,
            price=1,
            escrow=1,
            worker_bond=1,
            audit_rate=100,
            depth=3,
            posted_at=1,
            deadline=1000,
            status=1,
        )
        self.seats = [seat(0, 0), seat(1, 0), seat(2, 1)]
        self._send, self._receive = trio.open_memory_channel[None](100)

    @property
    def state(self) -> "FakeChain":
        return self

    def task(self, task: bytes) -> Task | None:
        assert task == TASK
        return self.record

    def workers(self, task: bytes) -> list[Worker]:
        assert task == TASK
        return self.seats

    @asynccontextmanager
    async def subscribe(self) -> AsyncIterator[trio.MemoryReceiveChannel[None]]:
        yield self._receive

    async def block(self, **changes: object) -> None:
        """Make a final block that changes the task."""
        assert self.record is not None
        self.record = msgspec.structs.replace(self.record, **changes)
        self._send.send_nowait(None)
        await trio.testing.wait_all_tasks_blocked()


def seat(number: int, stage: int, status: WorkerStatus = WorkerStatus.SEATED) -> Worker:
    return Worker(
        task=TASK,
        account=KEYS[number].account,
        kernel=bytes(32),
        applied_at=1,
        lease_until=100,
        stage=stage,
        status=tuple(WorkerStatus).index(status),
    )


def names(*numbers: int) -> tuple[str, ...]:
    return tuple(sorted(peer_id(KEYS[number].account) for number in numbers))


def governor_of(chain: FakeChain, resume: tuple[int, int] | None = None) -> ChainGovernor:
    return ChainGovernor(cast(ChainEngine, chain), TASK, resume)


class Waiting:
    """A call of the governor that is under way."""

    def __init__(self) -> None:
        self.members: Members | None = None
        self.is_ended = False

    async def run(self, call: Callable[[int], Awaitable[Members]], step: int) -> None:
        try:
            self.members = await call(step)
        except TaskEnded:
            self.is_ended = True


@asynccontextmanager
async def waiting(chain: FakeChain, name: str, step: int) -> AsyncIterator[Waiting]:
    """Call the governor's `admit` or `settled` and yield once it is answered or waits."""
    governor, call = governor_of(chain), Waiting()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(governor.run)
        nursery.start_soon(call.run, getattr(governor, name), step)
        await trio.testing.wait_all_tasks_blocked()
        yield call
        nursery.cancel_scope.cancel()


CLOSED = tuple(TaskStatus).index(TaskStatus.CLOSED)


def test_members_are_those_seated_now_by_stage() -> None:
    chain = FakeChain()
    governor = governor_of(chain)
    assert governor.current() == Members(0, 0, (names(0, 1), names(2)))
    chain.seats = [seat(1, 0), seat(0, 0, WorkerStatus.EVICTED), seat(2, 1, WorkerStatus.LEFT), seat(3, 1)]
    assert governor.current().stages == (names(1), names(3))


def test_spares_are_no_members() -> None:
    chain = FakeChain()
    chain.seats = [seat(0, 0), seat(3, -1, WorkerStatus.SPARE), seat(2, -1)]
    assert governor_of(chain).current().stages == (names(0), ())


async def test_training_resumes_after_the_settled_step() -> None:
    chain = FakeChain()
    await chain.block(settled=7, generation=2)
    assert governor_of(chain).current() == Members(2, 7, (names(0, 1), names(2)))


async def test_what_has_settled_is_told_of_every_member() -> None:
    chain = FakeChain()
    chain.seats[0] = msgspec.structs.replace(chain.seats[0], settled_cells=12)
    await chain.block(settled=7)
    cells = {names(0)[0]: 12, names(1)[0]: 0, names(2)[0]: 0}
    assert governor_of(chain, resume=(0, 9)).current().settled == Settled(7, cells)


async def test_a_given_point_to_resume_at_counts_for_its_generation_only() -> None:
    chain = FakeChain()
    governor = governor_of(chain, resume=(0, 9))
    await chain.block(settled=7)
    assert governor.current().resume_step == 9
    await chain.block(generation=1)
    assert governor.current().resume_step == 7


async def test_a_step_is_admitted_once_it_fits_into_the_ring() -> None:
    chain = FakeChain()
    async with waiting(chain, "admit", 3) as call:
        assert call.members is not None
    async with waiting(chain, "admit", 5) as call:
        assert call.members is None
        await chain.block(settled=1)
        assert call.members is None
        await chain.block(settled=2)
        assert call.members == Members(0, 2, (names(0, 1), names(2)))


async def test_an_eviction_while_waiting_shows_in_the_members_admitted() -> None:
    chain = FakeChain()
    async with waiting(chain, "admit", 4) as call:
        chain.seats[0] = seat(0, 0, WorkerStatus.EVICTED)
        await chain.block()
        assert call.members is None
        await chain.block(settled=1)
        assert call.members is not None
        assert call.members.stages == (names(1), names(2))


@pytest.mark.parametrize("name", ["admit", "settled"])
async def test_a_rollback_ends_the_wait(name: str) -> None:
    chain = FakeChain()
    async with waiting(chain, name, 9) as call:
        assert call.members is None
        await chain.block(generation=1)
        assert call.members is not None
        assert call.members.generation == 1


async def test_settled_waits_for_the_step() -> None:
    chain = FakeChain()
    async with waiting(chain, "settled", 2) as call:
        await chain.block(settled=1)
        assert call.members is None
        await chain.block(settled=2)
        assert call.members is not None


@pytest.mark.parametrize("name", ["admit", "settled"])
async def test_a_closed_task_ends_the_wait(name: str) -> None:
    chain = FakeChain()
    async with waiting(chain, name, 9) as call:
        await chain.block(status=CLOSED)
        assert call.is_ended


async def test_a_step_that_settled_before_the_task_was_closed_is_settled() -> None:
    chain = FakeChain()
    async with waiting(chain, "settled", 9) as call:
        await chain.block(settled=9, status=CLOSED)
        assert call.members is not None


async def test_a_task_that_is_gone_is_named() -> None:
    chain = FakeChain()
    chain.record = None
    with pytest.raises(TaskEnded, match="no longer"):
        governor_of(chain).current()
