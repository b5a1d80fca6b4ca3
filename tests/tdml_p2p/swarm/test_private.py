"""A private run among sessions: what the client's ends send and serve, and audits of the stages between them."""

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
import torch
import trio
import trio.testing

from chain.keys import account_of
from chain.params import Params
from chain.state import Task
from chain.verdicts import deviations, is_fraud, is_match, limits_for
from tdml_p2p.demo.faults import ATTACKS, faulty_factory
from tdml_p2p.swarm.audited import audited_cell
from tdml_p2p.swarm.feed import ClientFeed
from tdml_p2p.swarm.inputs import Descriptor, InputsRefused, Wanted, checked, merge
from tdml_p2p.swarm.preparation import Prepared
from tdml_p2p.swarm.private import SentBook
from tdml_p2p.swarm.reexecution import Execution, Reexecutor, results_of
from tdml_p2p.tensor_sessions import Frame
from tests.tdml_p2p.swarm.session_kit import CLIENT, CLIENT_KEY, TASK, Run, inline, without_threads
from tests.tdml_p2p.swarm.task_samples import terms_of
from tests.trainer.swarm_kit import PATIENCE, TIED, FakeGovernor, batches_of, manifest_of
from trainer.content import address_of
from trainer.coordinator import Coordinator
from trainer.coordinator_ports import CoordinatorConfig, CoordinatorPorts, Members, StepDone
from trainer.data import Validation
from trainer.ends import Ends, EndsGovernor
from trainer.manifest import TaskManifest, complete
from trainer.payloads import Dtype
from trainer.stage import build_stage
from trainer.state import initial_state
from trainer.tensors import buffer_of
from trainer.worker_ports import WorkerConfig, WorkerPorts

LIMITS = limits_for(Params())
KEY = bytes([2]) * 32
STEPS = (1, 2, 3)


def private(stages: int, **changes: Any) -> TaskManifest:
    """Return a task of gpt2 with tied embeddings, of some stages between the client's two."""
    base = manifest_of(1, steps=3, layers=4)
    ends = {"family": "gpt2", "config": TIED, "private": True, "stages": stages + 2, "cuts": ()}
    return complete(msgspec.structs.replace(base, **ends, **changes))


class PrivateRun(Run):
    """A run whose client holds its ends; what it puts on the wires is kept."""

    def __init__(self, manifest: TaskManifest, **settings: Any) -> None:
        super().__init__(manifest, **settings)
        last = manifest.stages - 1
        for stage in (0, last):
            for peer in self.stages[stage]:
                del self.sessions[peer], self.transports[peer], self.outboxes[peer]
        self.stages[0] = self.stages[last] = (CLIENT,)
        self.left: list[Frame] = []
        deliver = self.wires.deliver
        self.wires.deliver = lambda to, frame: (self._keep(frame), deliver(to, frame))[1]  # type: ignore[method-assign]
        self.book = SentBook(CLIENT_KEY, TASK, manifest)
        seats = [WorkerConfig(CLIENT, build_stage(manifest, index), manifest, 7) for index in (0, last)]
        self.ends = Ends(seats, self.client, WorkerPorts(_compute, self._fetch_state, self.book.add))
        tokens = batches_of(manifest)._tokens
        ports = CoordinatorPorts(
            EndsGovernor(FakeGovernor(Members(0, 0, tuple(self.stages[1:-1]))), self.ends),
            batches_of(manifest),
            self.events.append,
            self.ends.fetching(self._fetch_state),
            self._source,
            validation=Validation(tokens, manifest, 2),
        )
        self.coordinator = Coordinator(CoordinatorConfig(manifest, PATIENCE, eval_every=2), self.ends.transport, ports)

    async def train(self) -> None:
        """Run to the end of the training."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.ends.run)
            await super().train()
            nursery.cancel_scope.cancel()

    def describe(self, peer: str, wanted: Wanted) -> Descriptor | None:
        """Return what a peer says of a cell's inputs."""
        return self.book.describe(wanted) if peer == CLIENT else super().describe(peer, wanted)

    async def fetch(self, address: bytes, holders: Sequence[str]) -> memoryview:
        """Return a blob that one of `holders` has."""
        found = self.book.blob(address) if CLIENT in holders else None
        return await super().fetch(address, holders) if found is None else found

    def _keep(self, frame: Frame) -> None:
        if frame.sender == CLIENT:
            self.left.append(frame)

    def _source(self, step: int, stage: int) -> tuple[bytes, tuple[str, ...]]:
        return b"", ()


async def _compute(work: Any, /) -> Any:
    await trio.sleep(0.01)
    return work()


def in_virtual_time(body: Any) -> None:
    trio.run(body, clock=trio.testing.MockClock(autojump_threshold=0))


def trained(manifest: TaskManifest, **settings: Any) -> PrivateRun:
    torch.set_num_threads(1)
    run = PrivateRun(manifest, **settings)
    in_virtual_time(run.train)
    assert [event.step for event in run.events if isinstance(event, StepDone)] == list(STEPS)
    return run


@pytest.fixture(scope="module", params=[(1, "none"), (2, "int8")], ids=["one stage", "two stages, int8"])
def run(request: pytest.FixtureRequest) -> PrivateRun:
    stages, compression = request.param
    return trained(private(stages, compression=compression), replicas=2)


def cells(run: PrivateRun) -> Iterator[tuple[str, Wanted]]:
    """Return every cell of the seated stages with the worker that claimed it."""
    for stage in run.manifest.seated:
        for replica, peer in enumerate(run.stages[stage]):
            for step in STEPS:
                for cell in run.claim(stage, step, replica).cells:
                    yield peer, Wanted(TASK, 0, step, stage, cell)


def reexecuted(run: PrivateRun, wanted: Wanted) -> Execution:
    """Return what a peer that takes no part in the task gets."""
    found: list[Execution] = []

    async def execute() -> None:
        found.append(await Reexecutor(run.fetch, run.ask, inline).run(run.cell(wanted)))

    with without_threads():
        in_virtual_time(execute)
    return found[0]


def test_only_seated_stages_are_claimed_by_their_number_on_chain(run: PrivateRun) -> None:
    for place, stage in enumerate(run.manifest.seated):
        for step in STEPS:
            claims = [run.claim(stage, step, replica) for replica in range(2)]
            assert {claim.stage for claim in claims} == {place}
            assert sorted(cell for claim in claims for cell in claim.cells) == list(range(run.manifest.microbatches))
    assert all(peer in run.sessions for stage in run.manifest.seated for peer in run.stages[stage])
    assert CLIENT not in run.outboxes


def test_re_execution_by_a_stranger_agrees_to_the_bit(run: PrivateRun) -> None:
    for peer, wanted in cells(run):
        opening = run.sessions[peer].book.opening((0, wanted.step, wanted.cell), bytes(32), KEY)
        assert opening is not None
        execution = reexecuted(run, wanted)
        assert results_of(execution) == (opening.trace.y, opening.trace.gx, opening.trace.gw)
        assert execution.sketch(KEY) == opening.sketch


def test_the_client_knows_the_inputs_of_a_worker_that_is_silent(run: PrivateRun) -> None:
    for peer, wanted in cells(run):
        cell = run.cell(wanted)
        neighbours = [other for other in cell.holders if other not in run.stages[wanted.stage]]
        parts = [part for other in neighbours if (part := run.describe(other, wanted)) is not None]
        inputs = merge([checked(wanted, part, run.manifest, cell.senders) for part in parts])
        assert inputs is not None
        kept = run.sessions[peer].book.cell(0, wanted.step, wanted.cell)
        assert kept is not None
        assert (inputs.x.address, inputs.gy.address) == (kept.trace.x, kept.trace.gy)
        for part in (inputs.x, inputs.gy):
            if part.sender == CLIENT:
                assert address_of(run.book.blob(part.address) or b"") == part.address
        assert CLIENT in {inputs.x.sender, inputs.gy.sender}


def token_rows(run: PrivateRun) -> tuple[list[bytes], list[bytes]]:
    """Return the bytes of all tensors of tokens and labels of a run, and of their rows."""
    found = [run.coordinator._ports.batches.batch(step, cell) for step in STEPS for cell in range(4)]
    kept = run.coordinator._ports.validation
    assert kept is not None
    tensors = [tensor for batch in (*found, *map(kept.batch, range(kept.count))) for tensor in batch]
    return [bytes(buffer_of(t)) for t in tensors], [bytes(buffer_of(row)) for t in tensors for row in t]


def test_no_token_and_no_label_leaves_the_client_or_is_served(run: PrivateRun) -> None:
    tensors, rows = token_rows(run)
    left = b"".join(b"".join((bytes(frame.header), *map(bytes, frame.tensors))) for frame in run.left)
    served = b"".join(map(bytes, run.book._tensors.values()))
    assert len(left) > 10_000
    assert len(served) > 6_000
    assert not any(row in left or row in served for row in rows)
    headers = b"".join(bytes(frame.header) for frame in run.left)
    assert all(name in headers for name in (b"Activation", b"Gradient", b"Relay", b"OpenStep"))
    assert not any(name in headers for name in (b"Tokens", b"Labels", b"Probe", b"Tied", b"CellDone"))
    for data in tensors:
        assert run.book.blob(address_of(data)) is None
        assert run.feed.blob(address_of(data)) is None
    for step in STEPS:
        for stage in range(run.manifest.stages):
            asked = Wanted(TASK, 0, step, stage, 0)
            assert run.feed.describe(asked) is None
            assert (run.book.describe(asked) is None) == (stage not in run.manifest.seated)


def test_the_search_would_find_tokens_in_a_run_that_is_not_private() -> None:
    manifest = manifest_of(stages=2, steps=1)
    sent: list[bytes] = []
    run = Run(manifest)
    deliver = run.wires.deliver
    run.wires.deliver = lambda to, frame: (  # type: ignore[method-assign]
        sent.extend(map(bytes, frame.tensors)) if frame.sender == CLIENT else None,
        deliver(to, frame),
    )[1]
    in_virtual_time(run.train)
    rows = [bytes(buffer_of(row)) for tensor in batches_of(manifest).batch(1, 0) for row in tensor]
    assert all(row in b"".join(sent) for row in rows)


def test_states_of_the_ends_are_not_served() -> None:
    manifest = private(1)
    states = tuple(initial_state(manifest, index) for index in range(3))
    feed = ClientFeed(CLIENT_KEY, TASK, Prepared(manifest, batches_of(manifest), cast(Any, None), states=states))
    assert [feed.blob(state.root) is None for state in states] == [True, False, True]
    assert [feed.blob(state.manifest.weights) is None for state in states] == [True, False, True]
    assert [feed.source(0, stage, CLIENT)[0] for stage in range(3)] == [state.root for state in states]
    assert feed.source(1, 0, CLIENT) == (b"", ())


def test_inputs_of_one_cell_do_not_pass_for_another(run: PrivateRun) -> None:
    _, wanted = next(cells(run))
    other = Wanted(TASK, 0, wanted.step, wanted.stage, (wanted.cell + 1) % 4)
    part = run.book.describe(other)
    assert part is not None
    with pytest.raises(InputsRefused, match="signature"):
        checked(wanted, part, run.manifest, run.cell(wanted).senders)


@pytest.mark.parametrize("attack", list(ATTACKS))
@pytest.mark.parametrize("stage", [1, 2])
def test_re_execution_finds_the_cheat_and_nobody_else(attack: str, stage: int) -> None:
    run = trained(private(2), factories={(stage, 0): faulty_factory(attack, 2)})
    for peer, wanted in cells(run):
        if wanted.cell != 1:
            continue
        opening = run.sessions[peer].book.opening((0, wanted.step, 1), bytes(32), KEY)
        assert opening is not None
        found = deviations(opening.sketch, reexecuted(run, wanted).sketch(KEY))
        is_cheat = wanted.stage == stage and wanted.step >= 2
        assert (is_match(found, LIMITS), is_fraud(found, LIMITS)) == (
            not is_cheat,
            is_cheat,
        )


def test_what_has_settled_is_forgotten() -> None:
    run = trained(private(1))
    addresses = {step: run.book.describe(Wanted(TASK, 0, step, 1, 0)) for step in STEPS}
    task = cast(Task, SimpleNamespace(settled=2, generation=0))
    run.book.forget(task.settled, task.generation)
    assert [run.book.describe(Wanted(TASK, 0, step, 1, 0)) is None for step in STEPS] == [True, True, False]
    for step, found in addresses.items():
        assert found is not None
        assert found.x is not None
        assert (run.book.blob(found.x.address) is None) == (step <= 2)
    run.book.forget(2, 2)
    assert run.book.describe(Wanted(TASK, 0, 3, 1, 0)) is None


def test_the_wire_of_what_is_kept_is_that_of_the_task(run: PrivateRun) -> None:
    _, wanted = next(cells(run))
    part = run.book.describe(Wanted(TASK, 0, 1, 1, wanted.cell))
    assert part is not None
    assert part.x is not None
    data = run.book.blob(part.x.address)
    assert data is not None
    count = run.manifest.batch * run.manifest.sequence * run.manifest.hidden
    assert len(data) == (4 * count if run.manifest.wire is Dtype.FP32 else count + 4 * -(-count // 256))


def test_an_audit_on_chain_is_of_the_stage_after_the_clients() -> None:
    """Of a task whose manifest has another number of seats nothing can be said."""
    run = PrivateRun(private(2))
    workers = [
        SimpleNamespace(stage=place, account=account_of(peer))
        for place, stage in enumerate(run.manifest.seated)
        for peer in run.stages[stage]
    ]
    for place, stage in enumerate(run.manifest.seated):
        account = workers[place].account
        audit = SimpleNamespace(task=TASK, generation=0, step=1, stage=place, cell=3, worker=account, opening=None)
        claim = SimpleNamespace(claim=SimpleNamespace(state_before=bytes(32)))
        task = SimpleNamespace(client=CLIENT_KEY.account, **terms_of(run.manifest))
        state = SimpleNamespace(task=lambda _, task=task: task, workers=lambda _: workers)
        cell = audited_cell(*cast(Any, (audit, claim, state, run.manifest)))
        assert cell is not None
        assert cell.wanted == Wanted(TASK, 0, 1, stage, 3)
        neighbours = ([CLIENT] if place == 0 else run.stages[1]), ([CLIENT] if place == 1 else run.stages[2])
        assert (cell.senders.x, cell.senders.gy) == tuple(map(frozenset, neighbours))
        task.stages = 4
        assert audited_cell(*cast(Any, (audit, claim, state, run.manifest))) is None
