"""Workers that leave, die, come back and join at random moments, the only one of a stage too: nothing is lost.

Members change in the middle of a step here; `test_swarm_chaos` has one safe replica a stage. Wider than CI:
`TDML_SEEDS=0:500 pytest tests/trainer/test_swarm_comings.py`.
"""

import os
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial

import msgspec
import pytest
import trio
from swarm_kit import CLIENT, PATIENCE, Kit, assert_same_model, in_virtual_time, manifest_of, tied_manifest, trained

from trainer.coordinator_ports import Members, Outvoted, PeerJoined, PeerLeft, SplitTeam
from trainer.coordinator_repair import StageLost
from trainer.manifest import AuditSettings, TaskManifest, complete
from trainer.messages import Partial, Repeat, Reroute
from trainer.payloads import Reason
from trainer.state import StageState
from trainer.transport import Faults

SHAPES = {
    "plain 2": manifest_of(stages=2, steps=5, layers=3),
    "plain 3": manifest_of(stages=3, steps=5, layers=3),
    "tied 2": tied_manifest(stages=2, steps=5),
    "tied 3": tied_manifest(stages=3, steps=5),
}
SEEDS = range(*map(int, os.environ.get("TDML_SEEDS", "0:40").split(":")))
PACES = (0.05, 0.1, 0.2, 0.4)
LONG = 60.0
"""Seconds that no run takes whose workers are only exchanged, one by one."""


@lru_cache
def undisturbed(shape: str) -> tuple[StageState, ...]:
    return trained(Kit(SHAPES[shape]))


@dataclass
class Company:
    """A swarm, and the dice that decide who leaves it and when."""

    kit: Kit
    dice: random.Random
    told: list[tuple[float, str, str]] = field(default_factory=list)

    async def live(self, deaths: float = 0.0, cuts: float = 0.0) -> None:
        """Let up to four things happen, of which a share are deaths and a share are links that break."""
        for number in range(self.dice.choice((1, 2, 3, 4))):
            await trio.sleep(self.dice.uniform(0.05, 3.0))
            stage = self.dice.randrange(len(self.kit.governor.members.stages))
            kind = self.dice.random()
            if kind < deaths:
                await self.die(stage, self.dice.choice((0.0, 0.2, 1.5)))
            elif kind < deaths + cuts:
                await self.cut(stage, self.dice.choice((0.2, 2.0)))
            else:
                await self.leave(stage, f"n{number}", self.dice.choice((0.0, 0.0, 0.3, 2.0)))

    async def leave(self, stage: int, newcomer: str, late: float) -> None:
        """Give the seat of a worker that goes on computing to a newcomer, which starts somewhat later."""
        seats = list(self.kit.governor.members.stages)
        gone = self.dice.choice(seats[stage])
        self.told.append((trio.current_time(), "left", gone))
        seats[stage] = (*(peer for peer in seats[stage] if peer != gone), newcomer)
        self.kit.governor.members = Members(0, 0, tuple(seats))
        await trio.sleep(late)
        self.kit.cell_seconds[newcomer] = self.dice.choice(PACES)
        self.kit.start(newcomer, stage)

    async def die(self, stage: int, away: float) -> None:
        """Kill a worker beside which another one takes part, and start it again with nothing in memory."""
        seated = self.kit.governor.members.stages[stage]
        dead = self.dice.choice(seated)
        others = set(self.kit.coordinator.ready[stage]) - {dead}
        if not any(self.kit.hub.has(peer) for peer in others) or not self.kit.hub.has(dead):
            return
        self.told.append((trio.current_time(), "died", dead))
        self.kit.hub.crash(dead)
        await trio.sleep(away)
        self.kit.start(dead, stage)

    async def cut(self, stage: int, away: float) -> None:
        """Break the link between a worker and the client, or another worker, for a while."""
        seats = self.kit.governor.members.stages
        one = self.dice.choice(seats[stage])
        other = self.dice.choice([CLIENT, *(peer for peers in seats for peer in peers if peer != one)])
        if not (self.kit.hub.has(one) and self.kit.hub.has(other)):
            return
        self.told.append((trio.current_time(), "cut", f"{one} {other}"))
        self.kit.hub.cut(one, other)
        await trio.sleep(away)
        self.kit.faults.mend(one, other)


def ended(company: Company, happenings: Callable[[], Awaitable[None]]) -> tuple[StageState, ...]:
    """Return the states that a company's run ends with; it must end."""
    states: list[tuple[StageState, ...]] = []

    async def train() -> None:
        with trio.fail_after(3600):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(happenings)
                states.append(await company.kit.train())
                nursery.cancel_scope.cancel()

    in_virtual_time(train)
    company.kit.check_exactly_once()
    return states[0]


def company_of(seed: int, shape: str, manifest: TaskManifest | None = None) -> Company:
    dice = random.Random(f"{shape} {seed}")
    quick = replace(PATIENCE, tick=0.25, floor=dice.choice((1.0, 3.0)))
    replicas = dice.choice((1, 1, 2) if manifest is None else (3, 3, 4))
    kit = Kit(manifest or SHAPES[shape], replicas=replicas, faults=Faults(), patience=quick)
    kit.cell_seconds = {peer: dice.choice(PACES) for stage in kit.governor.members.stages for peer in stage}
    return Company(kit, dice)


@pytest.mark.parametrize("seed", SEEDS)
def test_whoever_leaves_and_joins_the_model_is_the_same_and_nobody_honest_is_left_out(seed: int) -> None:
    shape = list(SHAPES)[seed % len(SHAPES)]
    company = company_of(seed, shape)
    assert_same_model(ended(company, company.live), undisturbed(shape))
    events = company.kit.events
    assert {event.why for event in events if isinstance(event, PeerLeft)} <= {"unseated"}, company.told
    joined = Counter(event.peer for event in events if isinstance(event, PeerJoined))
    assert max(joined.values()) == 1, (joined, company.told)
    assert company.kit.seconds < LONG, company.told


@pytest.mark.parametrize("seed", SEEDS)
def test_whoever_dies_and_comes_back_meanwhile_the_model_is_the_same(seed: int) -> None:
    shape = list(SHAPES)[seed % len(SHAPES)]
    company = company_of(seed, shape)
    assert_same_model(ended(company, partial(company.live, deaths=0.5)), undisturbed(shape))
    assert company.kit.seconds < LONG, company.told


@pytest.mark.parametrize("seed", SEEDS)
def test_whatever_links_break_meanwhile_the_model_is_the_same(seed: int) -> None:
    shape = list(SHAPES)[seed % len(SHAPES)]
    company = company_of(seed, shape)
    assert_same_model(ended(company, partial(company.live, deaths=0.2, cuts=0.4)), undisturbed(shape))
    assert company.kit.seconds < 2 * LONG, company.told  # a broken link between two workers is found by waiting


@pytest.mark.parametrize("seed", SEEDS[::4])
def test_teams_whose_members_come_and_go_do_not_differ(seed: int) -> None:
    shape = list(SHAPES)[seed // 4 % len(SHAPES)]
    manifest = msgspec.structs.replace(SHAPES[shape], audit=AuditSettings(redundancy=3), replicas=3, cuts=())
    company = company_of(seed, shape, complete(manifest))
    assert_same_model(ended(company, partial(company.live, deaths=0.3)), undisturbed(shape))
    assert not [event for event in company.kit.events if isinstance(event, Outvoted | SplitTeam)], company.told
    assert company.kit.seconds < LONG, company.told


@pytest.mark.parametrize("tenths", range(4, 20, 3))
def test_what_a_worker_finishes_after_it_lost_its_seat_does_not_count(tenths: int) -> None:
    company = company_of(0, "tied 2")
    kit = company.kit = Kit(SHAPES["tied 2"], replicas=1, patience=replace(PATIENCE, tick=0.05))
    kit.cell_seconds = dict.fromkeys(("s0r0", "s1r0"), 0.1)

    async def late() -> None:
        await trio.sleep(tenths / 10)
        await company.leave(0, "n0", late=5.0)

    assert_same_model(ended(company, late), undisturbed("tied 2"))
    assert company.told[0][1:] == ("left", "s0r0")
    assert kit.coordinator.refused[Reason.WRONG_SENDER]


def test_newcomers_in_all_seats_of_a_stage_are_given_the_state_by_those_who_left() -> None:
    company = company_of(0, "plain 2")
    kit = company.kit = Kit(SHAPES["plain 2"], replicas=2, patience=replace(PATIENCE, tick=0.25))

    async def exchanged() -> None:
        await trio.sleep(0.05)
        kit.governor.members = Members(0, 0, (("s0r0", "s0r1"), ("s1r0", "n0")))
        await trio.sleep(0.3)
        kit.governor.members = Members(0, 0, (("s0r0", "s0r1"), ("n0", "n1")))
        for newcomer in ("n0", "n1"):
            kit.start(newcomer, 1)

    assert_same_model(ended(company, exchanged), undisturbed("plain 2"))
    assert kit.seconds < LONG


def cut_for_good(kit: Kit, *links: tuple[str, str]) -> Callable[[], Awaitable[None]]:
    """Return what breaks links in the first step and never mends them."""

    async def cut() -> None:
        await trio.sleep(0.05)
        for link in links:
            kit.hub.cut(*link)

    return cut


@pytest.mark.parametrize("shape", ["plain 2", "tied 2"])
def test_a_link_between_only_workers_that_stays_broken_ends_the_run_by_name(shape: str) -> None:
    company = company_of(0, shape)
    patience = replace(PATIENCE, tick=0.25, floor=1.0, first=2.0, empty=60.0)
    kit = company.kit = Kit(SHAPES[shape], replicas=1, patience=patience)
    with pytest.raises(ExceptionGroup) as failure:
        ended(company, cut_for_good(kit, ("s0r0", "s1r0")))
    assert failure.group_contains(StageLost)
    assert kit.seconds < 4 * 60.0
    assert len([m for _, _, m in kit.hub.log if isinstance(m, Reroute | Repeat)]) < 1000


@pytest.mark.parametrize("links", [[("s0r0", "s1r0")], [("s0r0", "s1r0"), ("s0r0", "s1r1")]], ids=["one", "both"])
@pytest.mark.parametrize("dies", ["", "s1r1"])
def test_there_is_a_way_around_links_that_stay_broken(links: list[tuple[str, str]], dies: str) -> None:
    """Also where a stage computes again whose neighbours have reduced: what it lacks are inputs then, not sums."""
    company = company_of(0, "plain 2")
    kit = company.kit = Kit(SHAPES["plain 2"], replicas=2, faults=Faults(), patience=replace(PATIENCE, tick=0.25))
    if dies:
        kit.faults.crash(dies, after=1, of=Partial, before=True)
    assert_same_model(ended(company, cut_for_good(kit, *links)), undisturbed("plain 2"))
    assert kit.seconds < LONG
