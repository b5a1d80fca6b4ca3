"""A model that one wild step has wrecked: rounding grows there, no honest machine pays for it and no cheat hides in it.

Results with other last bits stand for other kernels, which agree bit for bit on models as small as these.
"""

from collections.abc import Iterator
from functools import cache

import pytest
import torch
from msgspec import structs

from bench.support.recordings import Attack, Recording, Recordings
from chain.keys import peer_id
from chain.params import Params
from chain.records import Audit
from chain.transactions import Reveal
from chain.verdicts import deviations, limits_for
from tdml_p2p.swarm.contradictions import disputed_results, has_false_results
from tdml_p2p.swarm.doubts import SEEDS, tolerance_of, unsteadiness
from tdml_p2p.swarm.reexecution import Execution
from tests.attacks.cells import ATTACKS, inputs_of, result_of, sketch_of
from tests.attacks.kit import MICROBATCHES, Character, Place, RealSwarm, place_of, recordings, swarm_of
from trainer.compare import Spread
from trainer.spread import shaken_cell, spread_of
from trainer.stage import CellKey, CellResult, execute

RATE = 2.0
LIMITS = limits_for(Params())
HERE, THERE = "wrecked", "wrecked, other kernels"
GROWN = "wrecked, gw x 2"
MACHINES = {HERE: 0, THERE: 100}
"""The honest machines, by the seed of the last bits that tell them apart."""


def wrecked(seed: int) -> Attack:
    """Return what a cell gives on weights after a step at a wild learning rate, with other last bits."""

    def attack(recorded: Recordings, one: Recording) -> CellResult:
        weights = one.weights - RATE * one.honest.gw.sign()
        if not seed:
            return recorded.execute(one, weights)
        back = one.labels if one.gy is None else one.gy
        assert back is not None
        weights, x, back = shaken_cell(weights, one.x, back, seed)
        stage = recorded._stage(one.stage, False)
        stage.load(weights)
        labels, gy = (back, None) if one.gy is None else (None, back)
        return execute(stage, x, labels, gy, CellKey(0, one.step, one.cell))

    return attack


def grown(recorded: Recordings, one: Recording) -> CellResult:
    """Send twice the weight gradient."""
    result = wrecked(0)(recorded, one)
    return result._replace(gw=result.gw * 2)


def looks(said: str) -> list[str]:
    """Return the names of a machine's second looks at its cells."""
    return [f"{said} again {seed}" for seed in SEEDS]


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let these results be known by their names."""
    monkeypatch.setitem(ATTACKS, GROWN, grown)
    for name, first in MACHINES.items():
        monkeypatch.setitem(ATTACKS, name, wrecked(first))
        for look, seed in zip(looks(name), SEEDS, strict=True):
            monkeypatch.setitem(ATTACKS, look, wrecked(first + seed))
    yield
    for kept in (result_of, sketch_of):
        kept.cache_clear()


class WreckedSwarm(RealSwarm):
    """A swarm on a wrecked model, whose judges know their spread unless they are told not to look."""

    is_looking = True

    def found(self, reveal: Reveal, account: bytes, audit: Audit, said: str) -> Reveal:
        """Return a reveal with what this peer finds behind the opened trace, and what it tolerates."""
        told, place = super().found(reveal, account, audit, said), place_of(audit)
        if not self.is_looking or place.cell == MICROBATCHES:
            return told
        assert audit.opening is not None
        again = [sketch_of(look, place.stage, place.number, audit.key) for look in looks(said)]
        times = unsteadiness(reveal.shared, again, LIMITS)
        tolerance = tolerance_of(times, [deviations(audit.opening.sketch, reveal.shared)], LIMITS)
        assert tolerance is not None, "this wreck can be judged"
        return structs.replace(told, tolerance=tolerance)

    def _look(self, audit: Audit, said: str, shown: Place) -> tuple[bool, bool]:
        contradicts, misses = super()._look(audit, said, shown)
        if not self.is_looking or not contradicts or shown.cell == MICROBATCHES:
            return contradicts, misses
        assert audit.opening is not None
        own = result_of(said, shown.stage, shown.number)
        execution = Execution(inputs_of(shown.stage, shown.number), own)
        given = self.served(shown, disputed_results(execution, audit.opening.trace))
        return has_false_results(execution, given, LIMITS, own_spread(said, shown.stage, shown.number)), misses


@cache
def own_spread(said: str, stage: int, number: int) -> Spread:
    """Return what a machine's own results of a cell differ by."""
    others = [result_of(look, stage, number) for look in looks(said)]
    return spread_of(result_of(said, stage, number), others)


def swarm_on_a_wreck(run: str, *, is_looking: bool = True) -> tuple[WreckedSwarm, bytes]:
    """Return a swarm of equal machines on a wrecked model, and a worker whose machine is the only one of its kind."""
    plain = swarm_of(run, 3000)
    swarm = WreckedSwarm(plain.ledger, plain.client, plain.task)
    swarm.is_looking = is_looking
    for account in swarm.state.validators().powers:
        swarm.characters[account] = Character(kernel=HERE)
    odd = swarm.seated(2)[0]
    swarm.characters[odd] = Character(kernel=HERE, attack=THERE, judges=elsewhere)
    return swarm, odd


def elsewhere(_: RealSwarm, audit: Audit, __: int) -> str:
    """Find what other kernels make of a cell; an optimiser's step is exact on every machine."""
    return HERE if audit.cell == MICROBATCHES else THERE


def test_without_second_looks_the_odd_one_out_is_convicted() -> None:
    swarm, odd = swarm_on_a_wreck("blind", is_looking=False)
    for _ in range(40):
        swarm.work(1)
    assert peer_id(odd) in {event["worker"] for event in swarm.ledger.happened("disputed")}
    assert {event["worker"] for event in swarm.ledger.happened("slashed")} == {peer_id(odd)}


def test_the_odd_one_out_is_neither_charged_nor_convicted_nor_unpaid() -> None:
    for run in range(2):
        swarm, _ = swarm_on_a_wreck(f"looking {run}")
        for _ in range(40):
            swarm.work(1)
        assert len(swarm.ledger.happened("passed")) > 100
        assert not {"evicted", "slashed", "charged", "faulted", "withheld", "undecided"} & set(swarm.ledger.kinds())


def test_a_cheat_that_uses_the_wreck_is_convicted() -> None:
    for run in range(2):
        swarm, odd = swarm_on_a_wreck(f"cheated {run}")
        cheat = swarm.seated(2)[1]
        swarm.characters[cheat] = Character(kernel=HERE, attack=GROWN, opens=HERE)
        assert cheat != odd
        for _ in range(60):
            swarm.work(1)
        assert {event["worker"] for event in swarm.ledger.happened("slashed")} == {peer_id(cheat)}
        assert not {"charged"} & set(swarm.ledger.kinds())


def test_honest_machines_differ_on_the_wreck_by_more_than_is_allowed_elsewhere() -> None:
    cells = range(len(recordings().cells[2]))
    apart = [deviations(*(sketch_of(name, 2, cell, bytes(32)) for name in MACHINES))[1] for cell in cells]
    assert max(apart) > 10 * LIMITS.tau[1]
    assert torch.isfinite(result_of(HERE, 2, 0).gw).all()
