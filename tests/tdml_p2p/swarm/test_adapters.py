"""Audits of adapters: the auditor fetches the frozen weights by hash, agrees to the bit, and finds who cheats."""

import gc
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio

from chain.params import Params
from chain.verdicts import deviations, is_fraud, is_match, limits_for
from tdml_p2p.demo.faults import ATTACKS, faulty_factory
from tdml_p2p.swarm.base import BaseShelf
from tdml_p2p.swarm.inputs import Wanted
from tdml_p2p.swarm.material import Unavailable
from tdml_p2p.swarm.reexecution import results_of
from tests.tdml_p2p.swarm.session_kit import CLIENT, TASK, Run, inline
from tests.tdml_p2p.swarm.test_session import KEY, cells, opening, reexecuted, trained
from tests.trainer.lora_samples import adapted
from trainer.adapted_run import FrozenModel
from trainer.adapters import LoraWish
from trainer.base_weights import stage_base
from trainer.stage import build_stage

LIMITS = limits_for(Params())
MANIFEST, BASE = adapted("llama", LoraWish(4, dropout=0.1), steps=3)
FROZEN = FrozenModel(Path("base"), BASE)


@pytest.fixture(scope="module")
def run() -> Run:
    """Two stages of two replicas, three steps, nobody cheats."""
    return trained(manifest=MANIFEST, replicas=2, frozen=FROZEN)


def test_re_execution_by_a_stranger_agrees_to_the_bit(run: Run) -> None:
    for peer, wanted in cells(run):
        if wanted.step != 3:
            continue
        execution, opened = reexecuted(run, wanted), opening(run, peer, wanted)
        assert results_of(execution) == (opened.trace.y, opened.trace.gx, opened.trace.gw)
        assert execution.sketch(KEY) == opened.sketch
        assert execution.result.gw.numel() == MANIFEST.trained_layout(MANIFEST.stage(wanted.stage)).total


@pytest.mark.parametrize("attack", sorted(ATTACKS))
def test_re_execution_finds_the_cheat_and_nobody_else(attack: str) -> None:
    run = trained(manifest=MANIFEST, factories={(0, 0): faulty_factory(attack, 2)}, frozen=FROZEN)
    for stage, (peer,) in enumerate(run.stages):
        for step in (1, 3):
            wanted = Wanted(TASK, 0, step, stage, 1)
            found = deviations(opening(run, peer, wanted).sketch, reexecuted(run, wanted).sketch(KEY))
            is_false = (stage, step) == (0, 3)
            assert (is_fraud(found, LIMITS), is_match(found, LIMITS)) == (
                is_false,
                not is_false,
            )


def test_false_frozen_weights_are_unavailable(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    wanted = Wanted(TASK, 0, 1, 1, 0)
    false = BASE.places[3].address
    blob = run.feed.blob

    def lying(address: bytes) -> memoryview | None:
        data = blob(address)
        return memoryview(bytes(len(data))) if data is not None and address == false else data

    monkeypatch.setattr(run.feed, "blob", lying)
    with pytest.raises(Unavailable, match="not the one that is named"):
        reexecuted(run, wanted)
    monkeypatch.setattr(run.feed, "blob", lambda address: None if address == false else blob(address))
    with pytest.raises(Unavailable, match="nobody has it"):
        reexecuted(run, wanted)


async def test_frozen_weights_are_fetched_once_shared_served_and_forgotten() -> None:
    asked: list[bytes] = []

    async def fetch(address: bytes, holders: Sequence[str]) -> memoryview:
        await trio.lowlevel.checkpoint()
        assert holders == (CLIENT,)
        asked.append(address)
        data = BASE.blob(address)
        assert data is not None
        return data

    shelf = BaseShelf(fetch, inline)
    first = await shelf.get(MANIFEST, 1, (CLIENT,))
    stage = build_stage(MANIFEST, 1)
    stage.load_base(first)
    assert await shelf.get(MANIFEST, 1, ()) is first
    wanted = stage_base(BASE, MANIFEST, 1)
    assert asked == [place.address for place in wanted.places]
    assert bytes(first.weights.numpy().data) == bytes(wanted.weights.numpy().data)
    address = wanted.places[0].address
    assert shelf.blob(address) == BASE.blob(address)
    assert shelf.blob(bytes(32)) is None
    del first
    gc.collect()
    assert shelf.blob(address) is not None  # the stage holds it
    del stage
    gc.collect()
    assert shelf.blob(address) is None
