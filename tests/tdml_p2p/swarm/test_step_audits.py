"""Optimiser's steps executed again by a peer outside the stage: exact where all are honest, attributed where not."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import cast

import msgspec
import pytest
import trio
import trio.testing

from chain.keys import PrivateKey
from chain.transactions import Opening
from tdml_p2p.swarm.envelope import statement
from tdml_p2p.swarm.inputs import Descriptor, InputsRefused, Wanted
from tdml_p2p.swarm.material import Buffer, Unavailable
from tdml_p2p.swarm.reexecution import Cell, Claimed, Execution, Reexecutor
from tdml_p2p.swarm.step_audits import contradicts
from tdml_p2p.swarm.step_material import StepMaterial, decode_record
from tests.tdml_p2p.swarm.session_kit import CLIENT, TASK, Run, inline, without_threads
from tests.tdml_p2p.swarm.test_adapters import FROZEN, MANIFEST
from tests.tdml_p2p.swarm.test_private import private
from tests.tdml_p2p.swarm.test_private import trained as privately
from tests.tdml_p2p.swarm.test_session import in_virtual_time, trained
from tests.trainer.image_samples import resnet_manifest
from tests.trainer.swarm_kit import manifest_of, tied_manifest
from trainer import worker_compute
from trainer.content import address_of
from trainer.manifest import OptimizerSettings, TaskManifest
from trainer.messages import Reduce, decode_message, encode_header
from trainer.reduction import Reduction
from trainer.state import StageState
from trainer.step_rule import StepRule

AUDIT, KEY = bytes([1]) * 32, bytes([2]) * 32


def clipped(manifest: TaskManifest) -> TaskManifest:
    return msgspec.structs.replace(manifest, optimizer=OptimizerSettings(clip=0.5))


def compressed(kind: str) -> TaskManifest:
    return msgspec.structs.replace(manifest_of(stages=2, steps=2), compression=kind)


@pytest.fixture(scope="module")
def run() -> Run:
    """Two stages of two replicas, two clipped steps, nobody cheats."""
    return trained(manifest=clipped(manifest_of(stages=2, steps=2)), replicas=2)


def steps(run: Run) -> Iterator[tuple[int, int, int]]:
    """Return every claimed optimiser's step: (stage, replica, step)."""
    for stage, peers in enumerate(run.stages):
        for replica in range(len(peers) if stage in run.manifest.seated else 0):
            for step in range(1, run.manifest.steps + 1):
                yield stage, replica, step


def opening_of(run: Run, stage: int, replica: int, step: int) -> Opening:
    peer = run.stages[stage][replica]
    found = run.sessions[peer].book.opening((0, step, run.manifest.microbatches), AUDIT, KEY)
    assert found is not None
    return found


def step_of(run: Run, stage: int, replica: int, step: int, is_opened: bool = False) -> Cell:
    """Return what an auditor, or after the opening a voter, knows of a claimed step."""
    wanted = Wanted(TASK, 0, step, stage, run.manifest.microbatches)
    claim = run.claim(stage, step, replica)
    opened = opening_of(run, stage, replica, step) if is_opened else None
    claimed = Claimed(run.stages[stage][replica], CLIENT, claim, opened)
    return replace(run.cell(wanted), state=claim.state_before, claimed=claimed)


def executed(run: Run, cell: Cell, fetch: Callable[..., object] | None = None) -> Execution:
    found: list[Execution] = []

    async def execute() -> None:
        found.append(await Reexecutor(cast("Callable[..., object]", fetch or run.fetch), run.ask, inline).run(cell))  # type: ignore[arg-type]

    with without_threads():
        in_virtual_time(execute)
    return found[0]


def is_false(run: Run, place: tuple[int, int, int]) -> bool:
    """Whether an auditor finds the step of (stage, replica, step) false, and a voter as well."""
    found = []
    for is_opened in (False, True):
        cell = step_of(run, *place, is_opened=is_opened)
        found.append(contradicts(executed(run, cell), cell, opening_of(run, *place)))
    assert found[0] == found[1]
    return found[0]


SWARMS: dict[str, Callable[[], Run]] = {
    "clipped": lambda: trained(manifest=clipped(manifest_of(stages=2, steps=2)), replicas=2),
    "plain, three replicas": lambda: trained(manifest=manifest_of(stages=1, steps=2), replicas=3),
    "more replicas than cells": lambda: trained(manifest=clipped(manifest_of(2, 2, 2)), replicas=3),
    "tied": lambda: trained(manifest=tied_manifest(stages=2, steps=2), replicas=2),
    "int8 links": lambda: trained(manifest=compressed("int8"), replicas=2),
    "bf16 links": lambda: trained(manifest=compressed("bf16"), replicas=2),
    "adapters": lambda: trained(manifest=MANIFEST, replicas=2, frozen=FROZEN),
    "images": lambda: trained(manifest=resnet_manifest(stages=2, steps=2), replicas=2),
    "private, tied and clipped": lambda: privately(private(2, optimizer=OptimizerSettings(clip=0.5)), replicas=2),
}


@pytest.mark.parametrize("name", SWARMS)
def test_honest_steps_are_found_again_bit_for_bit(name: str) -> None:
    run = SWARMS[name]()
    for place in steps(run):
        cell, opened = step_of(run, *place), opening_of(run, *place)
        execution = executed(run, cell)
        assert not execution.contradiction
        assert not contradicts(execution, cell, opened)
        assert execution.sketch(KEY) == opened.sketch


# what workers may do


def false_rule(run: Callable[[], Run], monkeypatch: pytest.MonkeyPatch, stage: int, step: int) -> Run:
    """Return a run in which the workers of a stage alter their weights in one step."""

    class FalseRule(StepRule):
        def __init__(self, manifest: TaskManifest, index: int) -> None:
            super().__init__(manifest, index)
            self.index = index

        def apply(self, state: StageState, gradient: object, squares: object) -> StageState:
            after = super().apply(state, gradient, squares)  # type: ignore[arg-type]
            if self.index != stage or after.step != step:
                return after
            return StageState(after.step, after.weights * (1 + 1e-6), after.m, after.v)

    with monkeypatch.context() as patch:
        patch.setattr(worker_compute, "StepRule", FalseRule)
        return run()


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_stage_all_of_whose_workers_alter_the_weights_is_found(
    monkeypatch: pytest.MonkeyPatch, replicas: int
) -> None:
    run = false_rule(
        lambda: trained(manifest=manifest_of(stages=2, steps=3), replicas=replicas), monkeypatch, stage=1, step=2
    )
    assert {place for place in steps(run) if is_false(run, place)} == {(1, replica, 2) for replica in range(replicas)}


def test_of_a_false_partial_sum_only_its_maker_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Reduction.own_sum

    def doubled(reduction: Reduction, gradients: object) -> object:
        total = honest(reduction, gradients)  # type: ignore[arg-type]
        return total * 2 if 0 in reduction.own_cells and reduction.request.step == 2 else total

    with monkeypatch.context() as patch:
        patch.setattr(Reduction, "own_sum", doubled)
        run = trained(manifest=manifest_of(stages=1, steps=2), replicas=2)
    liars = {replica for replica in range(2) if 0 in run.claim(0, 2, replica).cells}
    assert len({run.claim(0, 2, replica).state_after for replica in range(2)}) == 1  # both hold the false state
    assert {place for place in steps(run) if is_false(run, place)} == {(0, replica, 2) for replica in liars}


def test_a_norm_that_is_not_the_gradients_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = StepRule.join

    class FalseNorm(StepRule):
        def join(self, gradient: object, far: object) -> tuple[float, bytes]:
            squares, digest = honest(self, gradient, far)  # type: ignore[arg-type]
            return 100 * squares, digest

    with monkeypatch.context() as patch:
        patch.setattr(worker_compute, "StepRule", FalseNorm)
        run = trained(manifest=clipped(manifest_of(stages=2, steps=1)))
    assert "norm" in executed(run, step_of(run, 0, 0, 1)).contradiction


def test_a_claim_of_another_state_than_its_work_led_to_is_found(run: Run) -> None:
    cell = step_of(run, 0, 0, 2)
    assert cell.claimed is not None
    for changes in ({"state_after": run.claim(0, 1).state_after}, {"state_after": bytes(32)}):
        claim = msgspec.structs.replace(cell.claimed.claim, **changes)
        false = replace(cell, claimed=replace(cell.claimed, claim=claim))
        assert "state" in executed(run, false).contradiction


def test_a_step_from_another_state_is_found(run: Run) -> None:
    first, second = run.claim(0, 1), run.claim(0, 2)
    cell = replace(step_of(run, 0, 0, 2), state=first.state_before)
    assert "did not start" in executed(run, cell).contradiction
    later = step_of(run, 0, 0, 1)
    assert "did not start" in executed(run, replace(later, state=second.state_before)).contradiction


def test_a_first_step_starts_from_the_initial_state(run: Run) -> None:
    other = trained(manifest=msgspec.structs.replace(manifest_of(stages=2, steps=1), seed=6))

    async def fetch(address: bytes, holders: tuple[str, ...]) -> Buffer:
        try:
            return await run.fetch(address, holders)
        except Unavailable:
            return await other.fetch(address, [name for name in holders if name in other.sessions])

    cell = replace(step_of(run, 0, 0, 1), state=other.claim(0, 1).state_before)
    assert "did not start" in executed(run, cell, fetch).contradiction


# false records


def record_of(run: Run, place: tuple[int, int, int]) -> StepMaterial:
    stage, replica, step = place
    peer = run.stages[stage][replica]
    address = run.sessions[peer].book.step_record(0, step)
    assert address is not None
    data = run.sessions[peer].blob(address)
    assert data is not None
    return decode_record(bytes(data))


def judged(run: Run, place: tuple[int, int, int], data: bytes) -> str:
    """Return what is found in a step of whose record these are the bytes."""
    run_of = run.stages[place[0]][place[1]]

    async def fetch(address: bytes, holders: tuple[str, ...]) -> Buffer:
        return data if address == address_of(data) else await run.fetch(address, holders)

    async def ask(peer: str, _request: bytes) -> bytes:
        await trio.lowlevel.checkpoint()
        assert peer == run_of
        from tdml_p2p.swarm.inputs import Input, encode

        return encode(Descriptor(Input(address_of(data), peer, bytes(64)), None))

    found: list[Execution] = []

    async def execute() -> None:
        found.append(await Reexecutor(fetch, ask, inline).run(step_of(run, *place)))  # type: ignore[arg-type]

    with without_threads():
        in_virtual_time(execute)
    return found[0].contradiction


def rewritten(material: StepMaterial, **changes: object) -> bytes:
    return msgspec.msgpack.encode(msgspec.structs.replace(material, **changes))


def test_a_record_as_it_is_says_nothing_false(run: Run) -> None:
    assert judged(run, (0, 0, 1), msgspec.msgpack.encode(record_of(run, (0, 0, 1)))) == ""


@pytest.mark.parametrize(
    "what", ["bytes", "long", "order", "signature", "owners", "cells", "parts", "part", "apply", "far", "foreign"]
)
def test_a_false_record_is_named(run: Run, what: str) -> None:
    place = (0, 0, 2)
    material, before = record_of(run, place), record_of(run, (0, 0, 1))
    reduce = decode_message(material.reduce.header, ())
    assert isinstance(reduce, Reduce)
    greedy = encode_header(msgspec.structs.replace(reduce, owners=(run.stages[0][0],) * len(reduce.owners)))
    [part] = material.parts
    forged = msgspec.structs.replace(part, address=material.cells[0].trace.gw)
    key = PrivateKey(bytes([1]) * 32)  # the worker's own
    own = msgspec.structs.replace(part, signature=key.sign(statement(TASK, b"", part.address)))
    cases = {
        "bytes": lambda: b"\xc1",
        "long": lambda: bytes(5 << 20),
        "order": lambda: rewritten(material, reduce=before.reduce),
        "signature": lambda: rewritten(material, reduce=msgspec.structs.replace(material.reduce, signature=bytes(64))),
        "owners": lambda: rewritten(material, reduce=msgspec.structs.replace(material.reduce, header=greedy)),
        "cells": lambda: rewritten(material, cells=material.cells[:1]),
        "parts": lambda: rewritten(material, parts=()),
        "part": lambda: rewritten(material, parts=(forged,)),
        "apply": lambda: rewritten(material, apply=None),
        "far": lambda: rewritten(material, far=part),
        "foreign": lambda: rewritten(material, parts=(own,)),
    }
    told = {
        "bytes": "cannot be read",
        "long": "too long",
        "order": "of another step",
        "signature": "has not signed",
        "owners": "has not signed",
        "cells": "not the cells claimed",
        "parts": "not those of the others",
        "part": "not signed by its sender",
        "apply": "not there, or should not be",
        "far": "not there, or should not be",
        "foreign": "not signed by its sender",
    }
    assert told[what] in judged(run, place, cases[what]())


def test_who_added_cells_and_claims_to_have_had_none_is_found(run: Run) -> None:
    place = (0, 0, 2)
    cell = step_of(run, *place)
    assert cell.claimed is not None
    silent = replace(cell, claimed=replace(cell.claimed, claim=msgspec.structs.replace(cell.claimed.claim, cells=())))
    data = rewritten(record_of(run, place), cells=())

    async def fetch(address: bytes, holders: tuple[str, ...]) -> Buffer:
        return data if address == record else await run.fetch(address, holders)

    record = run.sessions[run.stages[0][0]].book.step_record(0, 2)
    assert "not the cells claimed" in executed(run, silent, fetch).contradiction


def test_other_gradients_than_were_claimed_are_found_when_the_step_is_opened(run: Run) -> None:
    """A record may name other gradients; its leaves then are not those under the claim's root."""
    cell, opened = step_of(run, 0, 0, 2), opening_of(run, 0, 0, 2)
    execution = executed(run, cell)
    assert not contradicts(execution, cell, opened)
    assert contradicts(replace(execution, leaves=execution.leaves[::-1]), cell, opened)
    altered = msgspec.structs.replace(opened, trace=msgspec.structs.replace(opened.trace, gw=bytes(32)))
    assert contradicts(execution, cell, altered)


def test_material_that_is_not_given_is_no_contradiction(run: Run) -> None:
    gradients = {one.trace.gw for one in record_of(run, (0, 0, 2)).cells}

    async def fetch(address: bytes, holders: tuple[str, ...]) -> Buffer:
        if address in gradients:
            raise Unavailable("kept back")
        return await run.fetch(address, holders)

    with pytest.raises(Unavailable):
        executed(run, step_of(run, 0, 0, 2), fetch)


def test_a_worker_that_names_no_record_is_silent(run: Run) -> None:
    cell = step_of(run, 0, 0, 2)
    with pytest.raises((Unavailable, InputsRefused)):
        executed(run, replace(cell, wanted=msgspec.structs.replace(cell.wanted, step=9)))
