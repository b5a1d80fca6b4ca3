"""Every cell on several replicas: what most of them have goes on, so that not one step is poisoned."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import msgspec
import pytest
import torch
import trio
from swarm_kit import Kit, in_virtual_time, manifest_of, tied_manifest, trained
from torch import Tensor

from trainer.coordinator import StepFailed
from trainer.coordinator_ports import Outvoted, PeerLeft, RolledBack, SplitTeam, StageEmpty
from trainer.manifest import AuditSettings, TaskManifest, complete
from trainer.messages import Activation, CellDone, Gradient, Message, Partial, Reduced, Summed
from trainer.stage import Backward, CellKey, Forward, StageLike
from trainer.state import StageState
from trainer.transport import Faults


def redundant(manifest: TaskManifest, redundancy: int = 3, replicas: int = 3) -> TaskManifest:
    audit = AuditSettings(redundancy=redundancy)
    return complete(msgspec.structs.replace(manifest, audit=audit, replicas=replicas))


PLAIN = manifest_of(stages=3, steps=3, layers=3)
MANIFEST = redundant(PLAIN)


@lru_cache
def _clean(stages: int, steps: int, layers: int, is_tied: bool) -> tuple[tuple[bytes, ...], list[float]]:
    manifest = tied_manifest(stages, steps) if is_tied else manifest_of(stages, steps, layers=layers)
    kit = Kit(manifest, replicas=1)
    return tuple(state.root for state in trained(kit)), kit.losses


def clean(manifest: TaskManifest = PLAIN) -> tuple[tuple[bytes, ...], list[float]]:
    """What one honest worker a stage makes of the task."""
    return _clean(manifest.stages, manifest.steps, manifest.layers, bool(manifest.tied))


class Cheat:
    """A stage that changes what it hands out; `spoil` takes the cell and one of y, gx, gw by name."""

    def __init__(self, stage: StageLike, spoil: Callable[[CellKey, str, Tensor], Tensor]) -> None:
        self._stage = stage
        self._spoil = spoil
        self.spec = stage.spec
        self.load, self.load_base = stage.load, stage.load_base
        self.drop, self.evaluate = stage.drop, stage.evaluate

    def forward(self, cell: CellKey, x: Tensor, labels: Tensor | None) -> Forward:
        y, boundaries = self._stage.forward(cell, x, labels)
        return Forward(self._spoil(cell, "y", y), boundaries)

    def backward(self, cell: CellKey, gy: Tensor | None) -> Backward:
        gx, gw = self._stage.backward(cell, gy)
        return Backward(self._spoil(cell, "gx", gx), self._spoil(cell, "gw", gw))


def scaling(name: str, by: float = 1.5, cells: tuple[int, ...] | None = None) -> Callable[[StageLike], StageLike]:
    def spoil(cell: CellKey, what: str, tensor: Tensor) -> Tensor:
        return tensor * by if what == name and (cells is None or cell.cell in cells) else tensor

    return lambda stage: Cheat(stage, spoil)


def assert_clean(kit: Kit, manifest: TaskManifest = PLAIN) -> None:
    """The swarm ends with the very bits of the clean run, and had its losses on the way."""
    roots, losses = clean(manifest)
    found = trained(kit)
    assert kit.losses == losses
    assert tuple(state.root for state in found) == roots


def outvoted(kit: Kit) -> set[tuple[int, str]]:
    return {(event.stage, event.peer) for event in kit.events if isinstance(event, Outvoted)}


def test_three_honest_replicas_compute_every_cell_three_times() -> None:
    kit = Kit(MANIFEST, replicas=3)
    assert_clean(kit)
    assert not outvoted(kit)
    cells = sum(len(record.cells) for _, record in kit.records)
    assert cells == 3 * 3 * MANIFEST.steps * MANIFEST.microbatches


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("what", ["y", "gx", "gw"])
def test_a_cheat_is_outvoted_and_not_one_step_is_poisoned(stage: int, what: str) -> None:
    cheat = f"s{stage}r0"
    kit = Kit(MANIFEST, replicas=3, cheats={cheat: scaling(what)})
    assert_clean(kit)
    is_empty = stage == 0 and what == "gx"  # the first stage hands no gradient on
    assert outvoted(kit) == (set() if is_empty else {(stage, cheat)})
    events = [event for event in kit.events if isinstance(event, Outvoted)]
    assert all(event.cells == tuple(range(MANIFEST.microbatches)) for event in events)
    # it takes part in the commit, so that it makes the claim that convicts it
    assert {record.step for peer, record in kit.records if peer == cheat} == {1, 2, 3}


def test_a_cheat_at_every_stage_at_once() -> None:
    cheats = {"s0r1": scaling("y"), "s1r0": scaling("gw", -1.0), "s2r2": scaling("gx", 0.0)}
    kit = Kit(MANIFEST, replicas=3, cheats=cheats)
    assert_clean(kit)
    assert outvoted(kit) == {(0, "s0r1"), (1, "s1r0"), (2, "s2r2")}


def test_without_redundancy_the_same_cheat_poisons_the_run() -> None:
    kit = Kit(PLAIN, replicas=3, cheats={"s1r0": scaling("y")})
    trained(kit)
    assert kit.losses != pytest.approx(clean()[1], rel=1e-5)


def test_a_single_false_cell_is_named() -> None:
    kit = Kit(MANIFEST, replicas=3, cheats={"s1r0": scaling("gw", cells=(2,))})
    assert_clean(kit)
    assert [e.cells for e in kit.events if isinstance(e, Outvoted)] == [(2,)] * MANIFEST.steps


def test_two_cheats_of_five_are_outvoted() -> None:
    kit = Kit(redundant(PLAIN, 5, 5), replicas=5, cheats={"s1r0": scaling("y"), "s1r3": scaling("y")})
    assert_clean(kit)
    assert outvoted(kit) == {(1, "s1r0"), (1, "s1r3")}


def test_not_a_number_from_one_is_outvoted() -> None:
    cheats = {"s0r0": scaling("y", math.nan), "s2r0": scaling("gw", math.nan)}
    kit = Kit(MANIFEST, replicas=3, cheats=cheats)
    assert_clean(kit)
    assert outvoted(kit) == {(0, "s0r0"), (2, "s2r0")}


def test_not_a_number_from_all_stops_the_run() -> None:
    kit = Kit(MANIFEST, replicas=3, cheats=dict.fromkeys(("s1r0", "s1r1", "s1r2"), scaling("y", math.nan)))
    with pytest.RaisesGroup(pytest.RaisesExc(StepFailed, match="step 1, stage 1")):
        trained(kit)


@pytest.mark.parametrize("kind", [Activation, Gradient, Partial])
def test_what_is_altered_on_the_way_is_outvoted_too(kind: type[Message]) -> None:
    kit = Kit(MANIFEST, replicas=3)
    carry = kit.hub.carry

    async def altered(sender: str, to: str, message: Message) -> None:
        """Send zeros, although the client is told the honest digest."""
        if sender == "s1r1" and isinstance(message, kind) and isinstance(message, Activation | Gradient | Partial):
            data = memoryview(bytes(len(message.payload[0].data)))
            payload = (msgspec.structs.replace(message.payload[0], data=data),)
            message = msgspec.structs.replace(message, payload=payload)
        await carry(sender, to, message)

    kit.hub.carry = altered  # type: ignore[method-assign]
    assert_clean(kit)


@pytest.mark.parametrize("is_tied", [False, True])
def test_joint_steps_take_the_majority(is_tied: bool) -> None:
    plain = tied_manifest(stages=2, steps=2) if is_tied else manifest_of(stages=2, steps=2)
    assert plain.is_joint
    assert bool(plain.tied) == is_tied
    kit = Kit(redundant(plain), replicas=3, cheats={"s0r2": scaling("gw"), "s1r0": scaling("gw", 3.0)})
    assert_clean(kit, plain)


def test_two_teams_share_the_cells() -> None:
    kit = Kit(redundant(PLAIN, 3, 6), replicas=6, cheats={"s1r4": scaling("y")})
    trained(kit)
    assert outvoted(kit) == {(1, "s1r4")}
    assert kit.losses == pytest.approx(clean()[1], rel=1e-6)
    assert {len(record.cells) for _, record in kit.records if record.step == 1} == {2}


def test_who_was_outvoted_computes_no_more_while_others_can() -> None:
    plain = manifest_of(stages=1, steps=3)
    kit = Kit(redundant(plain, 3, 4), replicas=4, cheats={"s0r0": scaling("gw")})
    assert_clean(kit, plain)
    assert [record.step for peer, record in kit.records if peer == "s0r0" and record.cells] == [1]


SILENCES: list[tuple[str, str, type[Message], int]] = [
    ("forward", "s0r1", Activation, 3),
    ("backward", "s1r1", Gradient, 3),
    ("done", "s2r1", CellDone, 2),
    ("partial", "s1r1", Partial, 1),
    ("summed", "s1r1", Summed, 1),
    ("reduced", "s1r1", Reduced, 1),
]


@pytest.mark.parametrize(("peer", "of", "after"), [s[1:] for s in SILENCES], ids=[s[0] for s in SILENCES])
def test_a_death_in_any_phase_costs_nothing(peer: str, of: type[Message], after: int) -> None:
    kit = Kit(MANIFEST, replicas=3, faults=Faults().crash(peer, after=after, of=of))
    assert_clean(kit)
    assert [(e.peer, e.why) for e in kit.events if isinstance(e, PeerLeft)] == [(peer, "lost")]


def test_two_silent_replicas_of_five_change_nothing() -> None:
    kit = Kit(redundant(PLAIN, 5, 5), replicas=5, cell_seconds={"s1r0": 1e6, "s1r1": 1e6})
    assert_clean(kit)
    assert not [event for event in kit.events if isinstance(event, StageEmpty)]


def test_two_silent_replicas_of_three_make_the_step_wait_until_one_is_back() -> None:
    faults = Faults().crash("s1r0", after=3, of=Gradient).crash("s1r2", after=4, of=Gradient)
    kit = Kit(MANIFEST, replicas=3, faults=faults)
    found: list[tuple[StageState, ...]] = []

    async def come_back() -> None:
        await trio.sleep(100)
        assert not kit.losses, "one of three went on alone"
        kit.start("s1r2", 1)

    async def run() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(come_back)
            found.append(await kit.train())

    torch.set_num_threads(1)
    in_virtual_time(run)
    assert [event.stage for event in kit.events if isinstance(event, StageEmpty)] == [1]
    assert (tuple(state.root for state in found[0]), kit.losses) == clean()


def test_a_split_team_gives_its_cells_to_another() -> None:
    # three different answers: nobody can tell who is wrong
    cheats = {"s1r0": scaling("y"), "s1r1": scaling("y", 0.5)}
    kit = Kit(redundant(PLAIN, 3, 6), replicas=6, cheats=cheats)
    trained(kit)
    split = [(event.step, event.stage, event.peers) for event in kit.events if isinstance(event, SplitTeam)]
    assert split[0] == (1, 1, ("s1r0", "s1r1", "s1r2"))
    assert kit.losses == pytest.approx(clean()[1], rel=1e-6)


def test_most_of_a_team_in_league_are_not_noticed_here() -> None:
    kit = Kit(MANIFEST, replicas=3, cheats={"s1r0": scaling("y"), "s1r1": scaling("y")})
    trained(kit)
    assert kit.losses != clean()[1]
    assert outvoted(kit) == {(1, "s1r2")}


def test_after_a_conviction_the_two_that_are_left_go_on() -> None:
    kit = Kit(MANIFEST, replicas=3, cheats={"s1r0": scaling("gw")})
    members = kit.governor.members

    def convict() -> None:
        stages = (members.stages[0], members.stages[1][1:], members.stages[2])
        kit.governor.members = replace(members, generation=1, resume_step=1, stages=stages)

    kit.governor.hooks[3] = convict
    found = trained(kit)
    assert [event.resume_step for event in kit.events if isinstance(event, RolledBack)] == [1]
    roots, losses = clean()
    assert tuple(state.root for state in found) == roots
    assert kit.losses == [*losses[:2], *losses[1:]]
