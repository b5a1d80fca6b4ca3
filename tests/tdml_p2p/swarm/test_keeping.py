"""What the client keeps while a stage hangs on one worker, and when it gives a stage up."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import cast

import pytest
import torch
import trio
import trio.testing

from chain.records import WorkerStatus
from tdml_p2p.swarm.governor import ChainGovernor
from tdml_p2p.swarm.keeping import Keeper, has_room_for, until_lost
from tests.trainer.training_samples import small_manifest
from trainer.coordinator import Coordinator
from trainer.coordinator_ports import StepDone
from trainer.state import StageState
from trainer.worker_ports import StateUnavailable


@dataclass
class FakeSwarm:
    """A coordinator and a governor in one: who is there, and how long things take."""

    ready: tuple[tuple[str, ...], ...] = (("a",), ("b",))
    empty_since: float | None = None
    spares: int = 0
    fetch_seconds: float = 1.0
    settled: int = 0
    generation: int = 0
    is_reachable: bool = True
    fetched: list[int] = field(default_factory=list)

    async def fetch_states(self, step: int) -> tuple[StageState, ...]:
        if not self.is_reachable:
            raise StateUnavailable
        self.fetched.append(step)
        await trio.sleep(self.fetch_seconds)
        flat = torch.zeros(2)
        return (StageState(step, flat, flat, flat),)

    @property
    def task(self) -> SimpleNamespace:
        return SimpleNamespace(stages=len(self.ready), settled=self.settled, generation=self.generation, redundancy=1)

    @property
    def workers(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(state=WorkerStatus.SPARE)] * self.spares + [SimpleNamespace(state=WorkerStatus.SEATED)]


def kept_after(
    swarm: FakeSwarm, steps: int, disturb: Callable[[int], None] = lambda _: None, *, has_room: bool = True
) -> Keeper:
    """Return what is kept after so many steps of a second each, of which all but the last five have settled."""
    keepers: list[Keeper] = []

    async def train() -> None:
        keepers.append(Keeper(cast(ChainGovernor, swarm), lambda: has_room))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keepers[0].run, swarm)
            for step in range(1, steps + 1):
                await trio.sleep(1.0)
                swarm.settled = max(0, step - 5)
                disturb(step)
                keepers[0].note(StepDone(step, 0, 1.0, 1, 1.0, 0.0))
            await trio.sleep(5.0)
            nursery.cancel_scope.cancel()

    in_virtual_time(train)
    return keepers[0]


def in_virtual_time(body: Callable[[], Awaitable[object]]) -> None:
    trio.run(body, clock=trio.testing.MockClock(autojump_threshold=0))


def test_a_state_counts_once_it_has_settled_and_fetching_takes_little_of_the_time() -> None:
    swarm = FakeSwarm(fetch_seconds=0.5)
    keeper = kept_after(swarm, 27)
    assert swarm.fetched == [1, 11, 21]
    assert keeper.states[0].step == 21


def test_at_most_one_state_waits_to_settle() -> None:
    swarm = FakeSwarm(fetch_seconds=0.0)
    assert kept_after(swarm, 14).states[0].step == 6
    assert swarm.fetched == [1, 6, 11]


def test_nothing_is_kept_before_anything_has_settled() -> None:
    swarm = FakeSwarm()
    assert not kept_after(swarm, 5).states


def test_a_state_of_an_ended_generation_is_never_kept() -> None:
    swarm = FakeSwarm(fetch_seconds=0.0)

    def roll_back(step: int) -> None:
        swarm.generation = int(step >= 3)

    assert not kept_after(swarm, 9, roll_back).states


PAIRS = (("a", "c"), ("b", "d"))


def test_states_are_kept_while_every_stage_has_two_for_both_may_vanish_together() -> None:
    swarm = FakeSwarm(ready=PAIRS, fetch_seconds=0.21)
    keeper = kept_after(swarm, 27)
    assert swarm.fetched == [1, 12, 23]
    assert keeper.states[0].step == 12

    def bereave(step: int) -> None:
        swarm.ready = (("a",), ("b", "d")) if step > 12 else PAIRS

    swarm = FakeSwarm(ready=PAIRS, fetch_seconds=0.42)
    assert kept_after(swarm, 27, bereave).states[0].step == 22
    assert swarm.fetched == [1, 13, 22]


def test_without_memory_for_two_states_they_are_kept_only_while_a_stage_hangs_on_one_worker() -> None:
    swarm = FakeSwarm(ready=PAIRS, fetch_seconds=0.0)

    def bereave(step: int) -> None:
        swarm.ready = (("a",), ("b", "d")) if step > 6 else PAIRS

    assert kept_after(swarm, 20, bereave, has_room=False).states[0].step == 12
    assert swarm.fetched == [7, 12, 17]


def test_there_is_room_where_the_machine_has_twice_as_much_as_two_states(monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = small_manifest()
    for available, expected in ((48 * manifest.parameters, False), (48 * manifest.parameters + 1, True), (None, True)):
        monkeypatch.setattr("tdml_p2p.swarm.keeping.available_bytes", lambda found=available: found)
        assert has_room_for(manifest) is expected


def test_a_worker_that_gives_nothing_is_asked_again_at_a_later_step() -> None:
    swarm = FakeSwarm(is_reachable=False, fetch_seconds=0.0)

    def heal(step: int) -> None:
        swarm.is_reachable = step >= 9

    assert kept_after(swarm, 20, heal).states[0].step == 14


@pytest.mark.parametrize(
    ("ready", "spares", "is_lost"),
    [((("a",), ()), 1, True), ((("a",), ()), 0, False), ((("a", "c"), ()), 0, True), (((), ()), 1, False)],
)
def test_a_stage_is_given_up_when_enough_others_are_there(
    ready: tuple[tuple[str, ...], ...], spares: int, is_lost: bool
) -> None:
    swarm = FakeSwarm(ready=ready, spares=spares, empty_since=0.0)

    async def wait() -> None:
        with trio.move_on_after(60.0) as scope:
            await until_lost(cast(Coordinator, swarm), cast(ChainGovernor, swarm), clock)
        assert scope.cancelled_caught is not is_lost
        assert not is_lost or 4.0 <= clock() < 5.0

    started = 0.0

    def clock() -> float:
        return trio.current_time() - started

    async def begin() -> None:
        nonlocal started
        started = trio.current_time()
        await wait()

    in_virtual_time(begin)


def test_a_stage_whose_worker_comes_back_is_not_given_up() -> None:
    swarm = FakeSwarm(spares=1)

    async def wait() -> None:
        swarm.empty_since = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(until_lost, swarm, swarm)
            await trio.sleep(3.0)
            swarm.empty_since = None
            await trio.sleep(30.0)
            assert nursery.child_tasks
            nursery.cancel_scope.cancel()

    in_virtual_time(wait)
