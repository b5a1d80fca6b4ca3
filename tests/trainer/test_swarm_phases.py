"""Death, pause and arrival at every phase of a step, in several shapes and at random moments: the same model."""

import random
from collections.abc import Callable
from functools import lru_cache

import msgspec
import pytest
import trio
from swarm_kit import Kit, assert_same_model, manifest_of, tied_manifest, trained

from trainer.coordinator_ports import Members, PeerJoined, PeerLeft, StepDone
from trainer.joint import check_tied
from trainer.messages import (
    Activation,
    Apply,
    CellDone,
    Commit,
    Gradient,
    Message,
    OpenStep,
    Partial,
    Passed,
    Reduced,
    Summed,
    Tied,
)
from trainer.state import StageState
from trainer.transport import Faults
from trainer.worker_ports import T

STEPS, MICROBATCHES = 4, 4
SHAPES = ((2, "plain"), (4, "clipped"), (2, "tied"), (4, "tied"))
PHASES: dict[str, tuple[type[Message], ...]] = {
    "forward": (Activation, Passed),
    "backward": (Gradient, CellDone),
    "reduction": (Partial,),
    "optimiser": (Reduced,),
}
JOINT: tuple[type[Message], ...] = (Tied, Summed, Apply)


def name_of(shape: object) -> str:
    return "{}x2 {}".format(*shape) if isinstance(shape, tuple) else ""


@lru_cache
def undisturbed(stages: int, kind: str) -> tuple[tuple[StageState, ...], list[float]]:
    kit = kit_of(stages, kind, replicas=1)
    return trained(kit), kit.losses


def kit_of(stages: int, kind: str, faults: Faults | None = None, replicas: int = 2) -> Kit:
    """Return a swarm whose gradients are clipped at every step, or not at all."""
    base = tied_manifest(stages, STEPS, MICROBATCHES)
    if kind != "tied":
        base = manifest_of(stages, STEPS, MICROBATCHES, layers=4)
    optimizer = msgspec.structs.replace(base.optimizer, clip=0.0 if kind == "plain" else 0.05)
    return Kit(msgspec.structs.replace(base, optimizer=optimizer), replicas, faults or Faults())


def kind_of(kit: Kit) -> str:
    return "tied" if kit.manifest.tied else "clipped" if kit.manifest.optimizer.clip else "plain"


def assert_undisturbed(kit: Kit) -> None:
    states, losses = undisturbed(kit.manifest.stages, kind_of(kit))
    found = trained(kit)
    assert_same_model(found, states)
    check_tied(kit.manifest, found)
    assert kit.losses == pytest.approx(losses, rel=1e-5)
    assert [event.step for event in kit.events if isinstance(event, StepDone)] == list(range(1, STEPS + 1))


def victim(dice: random.Random, stages: int, kind: type[Message]) -> str:
    """Return a worker that sends messages of this kind."""
    first, last = int(kind is Gradient), stages - int(kind in (Activation, Passed))
    return f"s{dice.randrange(first, last)}r{dice.randrange(2)}"


@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("seed", range(3))
def test_a_death_in_any_phase_of_any_step(shape: tuple[int, str], phase: str, seed: int) -> None:
    dice = random.Random(f"{shape} {phase} {seed}")
    kind = dice.choice(PHASES[phase])
    peer = victim(dice, shape[0], kind)
    a_step = 1 if kind in (Partial, Reduced) else MICROBATCHES // 2
    moment = dice.randint(1, a_step * (STEPS - 1))
    kit = kit_of(*shape, Faults().crash(peer, after=moment, of=kind, before=dice.random() < 0.5))
    assert_undisturbed(kit)
    assert [event.peer for event in kit.events if isinstance(event, PeerLeft)] == [peer]


@pytest.mark.parametrize("shape", SHAPES[1:], ids=name_of)
@pytest.mark.parametrize("kind", JOINT, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("seed", range(3))
def test_a_death_while_the_stages_wait_for_each_other(shape: tuple[int, str], kind: type[Message], seed: int) -> None:
    dice = random.Random(f"{shape} {kind.__name__} {seed}")
    if kind is Tied and shape[1] != "tied":
        kind = Summed
    peer = f"s{dice.choice((0, shape[0] - 1))}r{dice.randrange(2)}"
    a_step = 2 if kind is Tied else 1
    faults = Faults().crash(peer, after=dice.randint(1, a_step * STEPS - 1), of=kind, before=dice.random() < 0.5)
    kit = kit_of(*shape, faults)
    if kind is Apply:
        crash_on_hearing(kit, peer, Apply, dice.randint(2, STEPS - 1))
    assert_undisturbed(kit)
    assert [event.peer for event in kit.events if isinstance(event, PeerLeft)] == [peer]


@pytest.mark.parametrize("stage", [0, 1])
def test_a_stage_that_loses_all_who_have_its_sum_is_done_again_by_a_newcomer(stage: int) -> None:
    kit = kit_of(2, "tied")
    seats = [*kit.governor.members.stages]
    seats[stage] = (*seats[stage], f"s{stage}r2")
    carry = kit.hub.carry

    async def carry_until(sender: str, to: str, message: Message) -> None:
        await carry(sender, to, message)
        if to == f"s{stage}r1" and isinstance(message, Apply) and message.step == 1:
            kit.start(f"s{stage}r2", stage)
            kit.governor.members = Members(0, 0, tuple(seats))
            for peer in seats[stage][:2]:
                kit.hub.crash(peer)

    kit.hub.carry = carry_until  # type: ignore[method-assign]
    assert_undisturbed(kit)
    assert [event.peer for event in kit.events if isinstance(event, PeerLeft)] == [*seats[stage][:2]]


@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
@pytest.mark.parametrize("kind", [Commit, OpenStep])
@pytest.mark.parametrize("seed", range(2))
def test_a_death_on_hearing_of_the_commit_or_of_the_next_step(
    shape: tuple[int, str], kind: type[Message], seed: int
) -> None:
    dice = random.Random(f"{shape} {kind} {seed}")
    kit, peer = kit_of(*shape), victim(dice, shape[0], Partial)
    crash_on_hearing(kit, peer, kind, dice.randint(2, STEPS - 1))
    assert_undisturbed(kit)
    assert [event.peer for event in kit.events if isinstance(event, PeerLeft)] == [peer]


def crash_on_hearing(kit: Kit, peer: str, kind: type[Message], step: int) -> None:
    """Kill a worker as soon as it is told something of a step."""
    carry = kit.hub.carry

    async def carry_until(sender: str, to: str, message: Message) -> None:
        await carry(sender, to, message)
        if to == peer and isinstance(message, kind) and message.step == step:  # type: ignore[attr-defined]
            kit.hub.crash(peer)

    kit.hub.carry = carry_until  # type: ignore[method-assign]


def paused(kit: Kit, peer: str, start: float, seconds: float) -> None:
    """Have a worker neither compute, send nor hear anything from `start` on, for some seconds."""
    carry, plain = kit.hub.carry, kit.compute(peer)

    async def wake() -> None:
        if start <= trio.current_time() - began < start + seconds:
            await trio.sleep_until(began + start + seconds)

    async def carry_late(sender: str, to: str, message: Message) -> None:
        if peer in (sender, to):
            await wake()
        await carry(sender, to, message)

    async def compute_late(work: Callable[[], T], /) -> T:
        await wake()
        result = await plain(work)
        await wake()
        return result

    began = 0.0
    kit.hub.carry = carry_late  # type: ignore[method-assign]
    kit.computes[peer] = compute_late

    def begin() -> None:
        nonlocal began
        began = trio.current_time()

    kit.governor.hooks[1] = begin


@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("seconds", [10.0, 45.0])
def test_a_peer_that_is_paused_and_comes_back(shape: tuple[int, str], seed: int, seconds: float) -> None:
    dice = random.Random(f"{shape} {seed}")
    kit = kit_of(*shape)
    paused(kit, victim(dice, shape[0], Partial), dice.uniform(0.01, 0.4), seconds)
    assert_undisturbed(kit)


@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
@pytest.mark.parametrize("seed", range(2))
def test_a_joiner_in_the_middle_of_a_step(shape: tuple[int, str], seed: int) -> None:
    dice = random.Random(f"{shape} {seed}")
    kit, peer = kit_of(*shape), victim(dice, shape[0], Partial)
    full = kit.governor.members
    kit.governor.members = Members(0, 0, tuple(tuple(p for p in stage if p != peer) for stage in full.stages))

    async def arrive() -> None:
        await trio.sleep(dice.uniform(0.0, 0.1))
        kit.start(peer, int(peer[1]))
        kit.governor.members = full

    def soon() -> None:
        assert kit.nursery is not None
        kit.nursery.start_soon(arrive)

    kit.governor.hooks[dice.randint(2, 3)] = soon
    assert_undisturbed(kit)
    assert peer in [event.peer for event in kit.events if isinstance(event, PeerJoined)]
