"""Seats in a whole run: what workers claim, what they show to auditors, and that re-execution finds who cheats."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import msgspec
import pytest
import torch
import trio
import trio.testing

from chain.commitment import is_member, leaf
from chain.ledger.book import audit_id
from chain.params import Params
from chain.records import ClaimRecord
from chain.state import Audit, State, Task
from chain.transactions import Claim, Opening, Trace
from chain.verdicts import deviations, is_fraud, is_match, limits_for
from tdml_p2p.demo.faults import ATTACKS, faulty_factory
from tdml_p2p.swarm.inputs import Descriptor, InputsRefused, Wanted, checked, encode, merge, opened_inputs
from tdml_p2p.swarm.reexecution import Execution, Reexecutor, results_of
from tdml_p2p.swarm.service import SwarmService
from tests.tdml_p2p.swarm.session_kit import CLIENT, TASK, Run, inline, without_threads
from tests.trainer.swarm_kit import manifest_of
from trainer.coordinator_ports import StepDone
from trainer.state import StateManifest
from trainer.worker_step import StepRecord

LIMITS = limits_for(Params())
AUDIT, KEY = bytes([1]) * 32, bytes([2]) * 32
STEPS = (1, 2, 3)


def in_virtual_time(body: Callable[[], object]) -> None:
    trio.run(body, clock=trio.testing.MockClock(autojump_threshold=0))


def trained(**settings: object) -> Run:
    torch.set_num_threads(1)
    run = Run(**settings)  # type: ignore[arg-type]
    in_virtual_time(run.train)
    return run


@pytest.fixture(scope="module")
def run() -> Run:
    """Two stages of two replicas, three steps, nobody cheats."""
    return trained(manifest=manifest_of(stages=2, steps=3), replicas=2)


def cells(run: Run) -> Iterator[tuple[str, Wanted]]:
    """Return every cell with the worker that claimed it."""
    for stage, peers in enumerate(run.stages):
        for replica, peer in enumerate(peers):
            for step in STEPS:
                for cell in run.claim(stage, step, replica).cells:
                    yield peer, Wanted(TASK, 0, step, stage, cell)


def opening(run: Run, peer: str, wanted: Wanted) -> Opening:
    found = run.sessions[peer].book.opening((wanted.generation, wanted.step, wanted.cell), AUDIT, KEY)
    assert found is not None
    return found


def reexecuted(run: Run, wanted: Wanted) -> Execution:
    """Return what a peer that takes no part in the task gets."""
    found: list[Execution] = []

    async def execute() -> None:
        found.append(await Reexecutor(run.fetch, run.ask, inline).run(run.cell(wanted)))

    with without_threads():
        in_virtual_time(execute)
    return found[0]


def test_every_cell_is_claimed_once_at_every_stage(run: Run) -> None:
    assert [event.step for event in run.events if isinstance(event, StepDone)] == list(STEPS)
    for stage in range(2):
        for step in STEPS:
            claimed = [cell for replica in range(2) for cell in run.claim(stage, step, replica).cells]
            assert sorted(claimed) == list(range(run.manifest.microbatches))
    assert {session.steps for session in run.sessions.values()} == {3}


def test_claims_hang_together_by_the_roots_of_states(run: Run) -> None:
    for stage in range(2):
        for replica in range(2):
            claims = [run.claim(stage, step, replica) for step in STEPS]
            assert [claim.state_before for claim in claims[1:]] == [claim.state_after for claim in claims[:-1]]
            assert claims[-1].state_after == run.states[stage].root
        roots = [{run.claim(stage, step, replica).state_after for replica in range(2)} for step in STEPS]
        assert [len(each) for each in roots] == [1, 1, 1]


def test_an_opening_is_under_the_claim(run: Run) -> None:
    for peer, wanted in cells(run):
        replica = run.stages[wanted.stage].index(peer)
        claim = run.claim(wanted.stage, wanted.step, replica)
        opened = opening(run, peer, wanted)
        place = claim.cells.index(wanted.cell)
        assert is_member(claim.root, leaf(opened.salt, opened.trace), place, len(claim.cells) + 1, opened.proof)
        assert opened.trace.state == claim.state_before


def test_a_worker_names_its_inputs_and_who_signed_them(run: Run) -> None:
    for peer, wanted in cells(run):
        part = run.describe(peer, wanted)
        assert part is not None
        inputs = merge([checked(wanted, part, run.manifest, run.cell(wanted).senders)])
        assert inputs is not None
        trace = opening(run, peer, wanted).trace
        assert (inputs.x.address, inputs.gy.address) == (trace.x, trace.gy)
        if wanted.stage == 0:
            assert inputs.x.sender == CLIENT
        else:
            assert inputs.gy.sender == CLIENT


def test_neighbours_know_the_inputs_of_a_worker_that_is_silent(run: Run) -> None:
    for peer, wanted in cells(run):
        cell = run.cell(wanted)
        others = [other for other in cell.holders if other not in run.stages[wanted.stage]]
        parts = [part for other in others if (part := run.describe(other, wanted)) is not None]
        inputs = merge([checked(wanted, part, run.manifest, cell.senders) for part in parts])
        assert inputs is not None
        trace = opening(run, peer, wanted).trace
        assert (inputs.x.address, inputs.gy.address) == (trace.x, trace.gy)


def test_inputs_of_one_cell_do_not_pass_for_another(run: Run) -> None:
    peer, wanted = next(cells(run))
    part = run.describe(peer, wanted)
    assert part is not None
    for other in (
        Wanted(TASK, 0, wanted.step + 1, wanted.stage, wanted.cell),
        Wanted(TASK, 1, wanted.step, wanted.stage, wanted.cell),
        Wanted(TASK, 0, wanted.step, wanted.stage, wanted.cell + 1),
        Wanted(bytes(32), 0, wanted.step, wanted.stage, wanted.cell),
    ):
        with pytest.raises(InputsRefused, match="signature"):
            checked(other, part, run.manifest, run.cell(wanted).senders)


@pytest.mark.parametrize(
    "place", [(0, 9, 0, 0), (0, 1, 0, 99), (1, 1, 0, 0), (0, 1, 2, 0), (0, 0, 0, 0)], ids=lambda place: str(place)
)
def test_nothing_is_said_of_cells_that_are_not_kept(run: Run, place: tuple[int, int, int, int]) -> None:
    generation, step, stage, cell = place
    wanted = Wanted(TASK, generation, step, stage, cell)
    assert [run.sessions[peer].describe(wanted) for peer in run.stages[0]] == [None, None]


def test_re_execution_by_a_stranger_agrees_to_the_bit(run: Run) -> None:
    for peer, wanted in cells(run):
        if wanted.step != 2:
            continue
        execution = reexecuted(run, wanted)
        opened = opening(run, peer, wanted)
        assert results_of(execution) == (opened.trace.y, opened.trace.gx, opened.trace.gw)
        assert execution.sketch(KEY) == opened.sketch


def test_tensors_and_states_are_served_by_address(run: Run) -> None:
    for peer, wanted in cells(run):
        session, trace = run.sessions[peer], opening(run, peer, wanted).trace
        for name in ("x", "y", "gy", "gw", "state"):
            assert session.blob(getattr(trace, name)) is not None, name
    final = run.states[1].manifest
    for address in (final.root(), final.weights, final.m, final.v):
        assert all(run.sessions[peer].blob(address) is not None for peer in run.stages[1])
        assert run.sessions[run.stages[0][0]].blob(address) is None
    assert run.sessions[run.stages[0][0]].blob(bytes(32)) is None


def nothing_on_chain() -> State:
    return cast(State, SimpleNamespace(claim=lambda _identity: None))


@pytest.mark.parametrize(("audited", "kept"), [((), ()), ((1,), (1,)), ((2,), (0, 1)), ((0, 2), (0, 1))])
def test_gradients_are_kept_until_it_is_drawn_which_are_audited(
    audited: tuple[int, ...], kept: tuple[int, ...]
) -> None:
    run = trained(manifest=manifest_of(stages=1, steps=3, microbatches=2))
    [peer] = run.stages[0]
    session = run.sessions[peer]
    traces = [opening(run, peer, Wanted(TASK, 0, 2, 0, cell)).trace for cell in (0, 1)]
    task = cast(Task, SimpleNamespace(settled=0, generation=0, transition=2))
    for drawn in (False, True):
        record = SimpleNamespace(drawn=drawn, id=bytes(32))
        names = {audit_id(cast(ClaimRecord, record), cell) for cell in audited}
        state = SimpleNamespace(claim=lambda _, r=record: r, audit=lambda name, names=names: name in names or None)
        session.on_state(cast(State, state), task)
        held = [cell for cell in (0, 1) if session.blob(traces[cell].gw) is not None]
        assert held == ([0, 1] if not drawn else list(kept))
    for cell in (0, 1):
        assert (session.book.opening((0, 2, cell), AUDIT, KEY) is None) == (cell not in kept)
        assert session.blob(traces[cell].y) is not None


def test_what_has_settled_is_forgotten() -> None:
    run = trained(manifest=manifest_of(stages=1, steps=3, microbatches=2))
    [peer] = run.stages[0]
    session = run.sessions[peer]
    traces: dict[int, Trace] = {step: opening(run, peer, Wanted(TASK, 0, step, 0, 0)).trace for step in STEPS}
    session.on_state(nothing_on_chain(), cast(Task, SimpleNamespace(settled=2, generation=0)))
    assert [session.book.cell(0, step, 0) is None for step in STEPS] == [True, True, False]
    assert [session.blob(traces[step].gw) is None for step in STEPS] == [True, True, False]
    # A worker that joins starts from the settled state, and audits of step 3 run on it.
    assert [session.blob(traces[step].state) is None for step in STEPS] == [True, True, False]
    session.on_state(nothing_on_chain(), cast(Task, SimpleNamespace(settled=3, generation=0)))
    assert session.book.cell(0, 3, 0) is None
    assert session.blob(run.states[0].root) is not None


def test_a_step_that_there_is_no_memory_to_claim_is_left_out_and_the_work_goes_on() -> None:
    run = Run(manifest=manifest_of(stages=1, steps=3))
    peer = run.stages[0][0]
    add = run.sessions[peer].book.add

    def scarce(record: StepRecord, before: bytes, after: StateManifest) -> Claim | None:
        if record.step == 2:
            raise MemoryError
        return add(record, before, after)

    run.sessions[peer].book.add = scarce  # type: ignore[method-assign]
    in_virtual_time(run.train)
    assert [claim.step for claim in run.outboxes[peer].claims if isinstance(claim, Claim)] == [1, 3]


def test_a_session_that_has_not_begun_holds_nothing() -> None:
    run = Run(manifest=manifest_of(stages=1, steps=3))
    session = run.sessions[run.stages[0][0]]
    session.on_state(nothing_on_chain(), cast(Task, SimpleNamespace(settled=0, generation=0)))
    assert session.blob(bytes(32)) is None
    assert session.describe(Wanted(TASK, 0, 1, 0, 0)) is None


@pytest.mark.parametrize("attack", list(ATTACKS))
def test_re_execution_finds_the_cheat_and_nobody_else(attack: str) -> None:
    run = trained(manifest=manifest_of(stages=2, steps=3, layers=4), factories={(0, 0): faulty_factory(attack, 2)})
    verdicts = {}
    for stage, (peer,) in enumerate(run.stages):
        for step in STEPS:
            wanted = Wanted(TASK, 0, step, stage, 1)
            found = deviations(opening(run, peer, wanted).sketch, reexecuted(run, wanted).sketch(KEY))
            verdicts[stage, step] = (is_match(found, LIMITS), is_fraud(found, LIMITS))
    honest, fraud = (True, False), (False, True)
    assert verdicts == {
        (0, 1): honest,
        (0, 2): fraud,
        (0, 3): fraud,
        **dict.fromkeys([(1, 1), (1, 2), (1, 3)], honest),
    }


def test_nothing_is_refused_among_honest_peers(run: Run) -> None:
    assert [transport.refused.total() for transport in (run.client, *run.transports.values())] == [0] * 5


def test_what_a_worker_had_no_room_for_it_computes_again(run: Run) -> None:
    """A service without a network opens a cell whose weight gradient was not kept, by re-executing it."""
    peer, wanted = next(cells(run))
    kept = run.sessions[peer].book.cell(0, wanted.step, wanted.cell)
    assert kept is not None
    session = run.sessions[peer]
    audit = SimpleNamespace(task=TASK, generation=0, step=wanted.step, cell=wanted.cell, id=AUDIT, key=KEY)
    session.book._steps[0, wanted.step].cells[wanted.cell] = replace(kept, record=replace(kept.record, gw=None))
    service = SimpleNamespace(
        _sessions={TASK: session},
        _describe_audit=lambda _: run.cell(wanted),
        _reexecutor=Reexecutor(run.fetch, run.ask, inline),
    )
    found: list[Opening | None] = []

    async def open_it() -> None:
        found.append(await SwarmService._open_audit(cast(SwarmService, service), cast(Audit, audit)))

    with without_threads():
        in_virtual_time(open_it)
    signed = encode(cast(Descriptor, session.describe(wanted)))
    assert found == [msgspec.structs.replace(opening(run, peer, wanted), inputs=signed)]
    assert opened_inputs(cast(Opening, found[0]), wanted, run.manifest, run.cell(wanted).senders) is not None
    restored = session.book.cell(0, wanted.step, wanted.cell)
    assert restored is not None
    assert restored.record.gw is not None
