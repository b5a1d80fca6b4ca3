"""One worker, driven by a scripted client and scripted neighbours."""

from collections.abc import Awaitable, Callable

import pytest
import torch
import trio
from swarm_kit import CLIENT, batches_of, in_virtual_time, manifest_of

from trainer import messages as m
from trainer import payloads
from trainer.footprint import cell_bytes
from trainer.payloads import Reason
from trainer.stage import build_stage
from trainer.state import StageState, initial_state
from trainer.transport import InMemoryHub, Lost, Received
from trainer.worker import Worker
from trainer.worker_ports import StateUnavailable, T, WorkerConfig, WorkerPorts
from trainer.worker_step import StepRecord

MANIFEST = manifest_of(stages=2, steps=4, microbatches=2)
ME, TWIN, NEXT = "me", "twin", "next"
HIDDEN = (MANIFEST.batch, MANIFEST.sequence, MANIFEST.hidden)
ROUTES = ((ME, NEXT), (ME, NEXT))
NO_ROOT = bytes(32)


class Bench:
    """A worker of stage 0 among silent peers that the test speaks for."""

    def __init__(self, ring_depth: int = 3, **limits: int) -> None:
        torch.set_num_threads(1)
        self.hub = InMemoryHub()
        self.peers = {peer: self.hub.join(peer) for peer in (CLIENT, NEXT, TWIN, "stranger")}
        self.records: list[StepRecord] = []
        self.holder: dict[bytes, StageState] = {}
        config = WorkerConfig(CLIENT, build_stage(MANIFEST, 0), MANIFEST, ring_depth, **limits)
        ports = WorkerPorts(self.inline, lambda root, holders: self.fetch(root, holders), self.on_committed)
        self.worker = Worker(config, self.hub.join(ME), ports)

    async def inline(self, work: Callable[[], T], /) -> T:
        await trio.lowlevel.checkpoint()
        return work()

    async def fetch(self, root: bytes, holders: tuple[str, ...]) -> StageState:
        await trio.lowlevel.checkpoint()
        if root not in self.holder:
            raise StateUnavailable
        return self.holder[root]

    async def on_committed(self, record: StepRecord) -> None:
        self.records.append(record)

    async def say(self, *messages: m.Message, peer: str = CLIENT) -> None:
        for message in messages:
            await self.peers[peer].send(ME, message)
        await trio.testing.wait_all_tasks_blocked()

    async def hear(self, peer: str = CLIENT) -> m.Message:
        received: Received = await self.peers[peer].receive()
        assert received.sender == ME
        assert not isinstance(received.message, Lost)
        return received.message

    def run(self, script: Callable[["Bench"], Awaitable[None]]) -> None:
        async def main() -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.worker.run)
                with trio.fail_after(60):
                    await script(self)
                await self.say(m.Finish())

        in_virtual_time(main)

    async def open(self, step: int = 1, routes: tuple[tuple[str, ...], ...] = ROUTES) -> None:
        if step == 1:
            await self.say(m.Prepare(0, 0, 0, b"", ()))
            assert await self.hear() == m.Ready(0, 0, initial_state(MANIFEST, 0).root)
        await self.say(m.OpenStep(0, step, routes))

    async def step(self, step: int) -> bytes:
        """Walk through a whole step with both cells here; return the new root."""
        await self.open(step)
        for cell in range(2):
            await self.say(tokens(step, cell))
            await self.say(m.Gradient(0, step, cell, 1, gradient()), peer=NEXT)
        kinds = [type(await self.hear()) for _ in range(4)]
        assert kinds.count(m.CellDone) == kinds.count(m.Passed) == 2
        await self.say(m.Reduce(0, step, 1, (ME, ME), (ME,)))
        summed = await self.hear()
        assert isinstance(summed, m.Summed)
        await self.say(m.Apply(0, step, 1, (1, 1), (summed.squares, 0.5)))
        reduced = await self.hear()
        assert isinstance(reduced, m.Reduced)
        await self.say(m.Commit(0, step))
        return reduced.root


def tokens(step: int, cell: int) -> m.Tokens:
    return m.Tokens(0, step, cell, payloads.pack(batches_of(MANIFEST).batch(step, cell).tokens))


def gradient(scale: float = 0.01) -> tuple[payloads.TensorPayload]:
    return payloads.pack(torch.full(HIDDEN, scale))


def test_a_step_ends_in_a_record_with_everything() -> None:
    bench = Bench()

    async def script(bench: Bench) -> None:
        root = await bench.step(1)
        assert [state.step for state in bench.worker.states] == [0, 1]
        (record,) = bench.records
        assert (record.generation, record.step, record.stage, record.root) == (0, 1, 0, root)
        assert [cell.cell for cell in record.cells] == [0, 1]
        for index, cell in enumerate(record.cells):
            assert torch.equal(cell.x, batches_of(MANIFEST).batch(1, index).tokens)
            assert (cell.x_sender, cell.gy_sender) == (CLIENT, NEXT)
            assert cell.y.shape == HIDDEN
            assert cell.gx.numel() == 0
            assert cell.gw.shape == bench.worker.states[0].weights.shape
            assert len(cell.boundaries) == 1

    bench.run(script)
    assert not bench.worker.refused


def test_a_tensor_before_its_step_or_route_is_kept_for_later() -> None:
    async def script(bench: Bench) -> None:
        await bench.say(m.Prepare(0, 0, 0, b"", ()))
        await bench.say(m.Gradient(0, 1, 0, 1, gradient()), peer=NEXT)
        await bench.say(m.Gradient(0, 1, 1, 1, gradient()), peer="stranger")
        await bench.hear()
        await bench.say(m.OpenStep(0, 1, ROUTES), tokens(1, 0), tokens(1, 1))
        assert [type(await bench.hear()) for _ in range(3)] == [m.Passed, m.CellDone, m.Passed]
        await bench.say(m.Reroute(0, 1, 1, 1, "stranger"))
        assert [type(await bench.hear()) for _ in range(2)] == [m.Passed, m.CellDone]
        assert not bench.worker.refused

    Bench().run(script)


def test_a_new_consumer_gets_the_output_again() -> None:
    async def script(bench: Bench) -> None:
        await bench.open()
        await bench.say(tokens(1, 0))
        first = await bench.hear(NEXT)
        await bench.say(m.Reroute(0, 1, 0, 1, TWIN))
        assert await bench.hear(TWIN) == first

    Bench().run(script)


def test_a_cell_taken_away_and_given_back_is_done_once_more() -> None:
    async def script(bench: Bench) -> None:
        await bench.open()
        await bench.say(tokens(1, 0))
        await bench.say(m.Reroute(0, 1, 0, 0, TWIN), m.Reroute(0, 1, 0, 0, ME))
        await bench.say(m.Gradient(0, 1, 0, 1, gradient()), peer=NEXT)
        heard = [await bench.hear() for _ in range(3)]
        assert [type(message) for message in heard] == [m.Passed, m.Passed, m.CellDone]
        await bench.say(m.Reroute(0, 1, 0, 0, TWIN), m.Reroute(0, 1, 0, 0, ME))
        assert [type(await bench.hear()) for _ in range(2)] == [m.Passed, m.CellDone]

    Bench().run(script)


def test_replicas_sum_in_the_same_order() -> None:
    async def script(bench: Bench) -> None:
        await bench.open(routes=((ME, NEXT), (TWIN, NEXT)))
        await bench.say(tokens(1, 0))
        await bench.say(m.Gradient(0, 1, 0, 1, gradient()), peer=NEXT)
        await bench.say(m.Reduce(0, 1, 1, (ME, TWIN), (ME, TWIN)))
        partial = await bench.hear(TWIN)
        assert isinstance(partial, m.Partial)
        await bench.say(m.Reduce(0, 1, 1, (ME, TWIN), (ME, TWIN)))
        answers = [await bench.hear() for _ in range(3)]
        assert answers[-1] == m.Fault(0, 1, Reason.PARTIAL_MISSING, (TWIN,))
        await bench.say(m.Partial(0, 1, 1, 0, partial.payload), peer=TWIN)
        assert isinstance(await bench.hear(), m.Summed)

    Bench().run(script)


def test_another_order_to_apply_replaces_the_first() -> None:
    async def script(bench: Bench) -> None:
        await bench.open()
        for cell in range(2):
            await bench.say(tokens(1, cell))
            await bench.say(m.Gradient(0, 1, cell, 1, gradient()), peer=NEXT)
        await bench.say(m.Reduce(0, 1, 3, (ME, ME), (ME,)))
        summed = [await bench.hear() for _ in range(5)][-1]
        assert isinstance(summed, m.Summed)
        orders = [m.Apply(0, 1, n, (3, n), (summed.squares, float(n))) for n in (1, 2)]
        for order in (*orders, orders[1], orders[0]):
            await bench.say(order)
        first, second, again = [await bench.hear() for _ in range(3)]
        assert isinstance(first, m.Reduced)
        assert isinstance(second, m.Reduced)
        assert (first.attempt, second.attempt) == (1, 2)
        assert first.root != second.root
        assert again == second
        assert bench.worker.refused == {Reason.DUPLICATE: 1}
        await bench.say(m.Apply(0, 1, 3, (2, 3), (1.0, 1.0)))
        assert bench.worker.refused == {Reason.DUPLICATE: 1, Reason.STALE_STEP: 1}
        await bench.say(m.Commit(0, 1))
        assert bench.records[0].root == second.root
        assert bench.records[0].applied == orders[1]

    Bench().run(script)


def test_what_is_not_finite_is_told_and_not_sent_on() -> None:
    async def script(bench: Bench) -> None:
        await bench.open(routes=((ME, NEXT), (TWIN, NEXT)))
        await bench.say(tokens(1, 0))
        await bench.say(m.Gradient(0, 1, 0, 1, gradient(float("inf"))), peer=NEXT)
        assert [await bench.hear() for _ in range(2)] == [m.Passed(0, 1, 0, 0), m.NotFinite(0, 1, 0, 1, "gradient")]
        await bench.say(m.Gradient(0, 1, 0, 1, gradient()), peer=NEXT)
        assert isinstance(await bench.hear(), m.CellDone)
        await bench.say(m.Reduce(0, 1, 1, (ME, TWIN), (ME, TWIN)))
        partial = await bench.hear(TWIN)
        assert isinstance(partial, m.Partial)
        poisoned = payloads.pack(torch.full(partial.payload[0].shape, float("nan")))
        await bench.say(m.Partial(0, 1, 1, 0, poisoned), peer=TWIN)
        assert await bench.hear() == m.Fault(0, 1, Reason.NOT_FINITE, (TWIN,))

    Bench().run(script)


def test_a_new_generation_goes_back_to_a_state_of_the_ring() -> None:
    async def script(bench: Bench) -> None:
        first = await bench.step(1)
        second = await bench.step(2)
        await bench.open(3)
        await bench.say(tokens(3, 0))
        await bench.say(m.Prepare(1, 1, 0, b"", ()))
        assert isinstance(await bench.hear(), m.Passed)
        assert await bench.hear() == m.Ready(1, 1, first)
        assert second not in [state.root for state in bench.worker.states]
        await bench.say(m.Prepare(0, 0, 0, b"", ()))
        assert bench.worker.refused == {Reason.STALE_GENERATION: 1}

    Bench().run(script)


def test_an_honest_worker_sends_two_outputs_of_one_cell_when_the_client_begins_the_step_again() -> None:
    """Why nobody is convicted for having signed two inputs of a cell: a step may be begun again in a generation."""
    outputs: list[m.Message] = []

    async def script(bench: Bench) -> None:
        for number in (0, 1):
            await bench.open(1)
            await bench.say(m.Tokens(0, 1, 0, payloads.pack(batches_of(MANIFEST).batch(1, number).tokens)))
            assert isinstance(await bench.hear(), m.Passed)
            outputs.append(await bench.hear(NEXT))
        assert not bench.worker.refused

    Bench().run(script)
    first, second = outputs
    assert isinstance(first, m.Activation)
    assert isinstance(second, m.Activation)
    assert m.encode_header(first) == m.encode_header(second)
    assert bytes(first.payload[0].data) != bytes(second.payload[0].data)


def test_forgotten_states_are_gone() -> None:
    async def script(bench: Bench) -> None:
        await bench.step(1)
        await bench.step(2)
        bench.worker.forget(1)
        assert [state.step for state in bench.worker.states] == [1, 2]
        await bench.say(m.Prepare(1, 5, 0, b"", ()))
        assert await bench.hear() == m.Fault(1, 5, Reason.NO_STATE, ())

    Bench().run(script)


def test_a_run_begins_with_no_other_state_than_its_seed_gives() -> None:
    """Its auditors know that one only: who began with another would be convicted for the first step."""

    async def script(bench: Bench) -> None:
        state = initial_state(MANIFEST, 0)
        other = StageState(0, state.weights + 1.0, state.m, state.v)
        bench.holder = {other.root: other}
        await bench.say(m.Prepare(0, 0, 0, other.root, (CLIENT,)))
        assert await bench.hear() == m.Fault(0, 0, Reason.STATE_MISMATCH, ())
        await bench.say(m.Prepare(0, 0, 0, state.root, (CLIENT,)))
        assert await bench.hear() == m.Ready(0, 0, state.root)

    Bench().run(script)


@pytest.mark.parametrize("routes", [ROUTES[:1], (*ROUTES, *ROUTES)])
def test_a_step_has_as_many_cells_as_the_manifest_says(routes: tuple[tuple[str, ...], ...]) -> None:
    async def script(bench: Bench) -> None:
        await bench.step(1)
        await bench.say(m.OpenStep(0, 2, routes))
        assert bench.worker.refused == {Reason.UNKNOWN_CELL: 1}
        await bench.open(2)
        assert bench.worker.refused == {Reason.UNKNOWN_CELL: 1}

    Bench().run(script)


def test_a_fetched_state_must_have_the_wanted_root() -> None:
    async def script(bench: Bench) -> None:
        state = initial_state(MANIFEST, 0)
        good = StageState(7, state.weights, state.m, state.v)
        bench.holder = {good.root: good, NO_ROOT: good}
        await bench.say(m.Prepare(0, 7, 0, NO_ROOT, (TWIN,)))
        assert await bench.hear() == m.Fault(0, 7, Reason.STATE_MISMATCH, ())
        await bench.say(m.Prepare(0, 7, 0, good.root, ()))
        assert await bench.hear() == m.Fault(0, 7, Reason.NO_STATE, ())
        await bench.say(m.Prepare(0, 7, 0, good.root, (TWIN,)))
        assert await bench.hear() == m.Ready(0, 7, good.root)

    Bench().run(script)


def test_a_newer_request_ends_a_fetch_that_hangs() -> None:
    bench = Bench()

    async def hang(root: bytes, holders: tuple[str, ...]) -> StageState:
        await trio.sleep_forever()
        raise StateUnavailable

    bench.fetch = hang  # type: ignore[method-assign]

    async def script(bench: Bench) -> None:
        await bench.say(m.Prepare(0, 7, 0, NO_ROOT, (TWIN,)))
        await bench.say(m.Prepare(0, 0, 0, b"", ()))
        assert isinstance(await bench.hear(), m.Ready)

    bench.run(script)


def test_an_error_of_the_stage_is_told_and_survived() -> None:
    async def script(bench: Bench) -> None:
        await bench.open()
        wrong = torch.full((MANIFEST.batch, MANIFEST.sequence), 10**6, dtype=torch.int32)
        await bench.say(m.Tokens(0, 1, 0, payloads.pack(wrong)), tokens(1, 1))
        heard = [await bench.hear() for _ in range(2)]
        assert heard == [m.Fault(0, 1, Reason.COMPUTE_FAILED, ()), m.Passed(0, 1, 1, 0)]

    Bench().run(script)


X = gradient()
REFUSALS: list[tuple[str, str, m.Message, Reason]] = [
    ("order-of-a-stranger", "stranger", m.Commit(0, 1), Reason.WRONG_SENDER),
    ("finish-of-a-neighbour", NEXT, m.Finish(), Reason.WRONG_SENDER),
    ("prepare-another-stage", CLIENT, m.Prepare(0, 0, 1, b"", ()), Reason.WRONG_STAGE),
    ("past-step", CLIENT, tokens(1, 0), Reason.STALE_STEP),
    ("open-past-step", CLIENT, m.OpenStep(0, 1, ROUTES), Reason.STALE_STEP),
    ("open-again", CLIENT, m.OpenStep(0, 2, ROUTES), Reason.DUPLICATE),
    ("open-too-far", CLIENT, m.OpenStep(0, 9, ROUTES), Reason.NO_STATE),
    ("tokens-too-far", CLIENT, tokens(9, 0), Reason.UNKNOWN_CELL),
    ("tokens-of-a-stranger", "stranger", tokens(2, 0), Reason.UNKNOWN_CELL),
    ("labels-at-the-first-stage", CLIENT, m.Labels(0, 2, 0, tokens(2, 0).payload), Reason.WRONG_STAGE),
    ("no-such-cell", CLIENT, m.Tokens(0, 2, 7, tokens(2, 0).payload), Reason.UNKNOWN_CELL),
    ("tokens-twice", CLIENT, tokens(2, 0), Reason.DUPLICATE),
    ("activation-to-the-first-stage", NEXT, m.Activation(0, 2, 0, 1, X), Reason.WRONG_STAGE),
    ("gradient-of-the-wrong-stage", NEXT, m.Gradient(0, 2, 0, 0, X), Reason.WRONG_STAGE),
    (
        "gradient-of-the-wrong-shape",
        NEXT,
        m.Gradient(0, 2, 0, 1, payloads.pack(torch.zeros(1, 1, 1))),
        Reason.TENSOR_SHAPE,
    ),
    ("partial-of-the-wrong-stage", TWIN, m.Partial(0, 2, 1, 1, payloads.pack(torch.zeros(4))), Reason.WRONG_STAGE),
    ("reduce-unfinished-cells", CLIENT, m.Reduce(0, 2, 1, (ME, ME), (ME,)), Reason.UNKNOWN_CELL),
    ("reduce-with-another-end", CLIENT, m.Reduce(0, 2, 1, (TWIN, TWIN), (TWIN, ME), (NEXT,)), Reason.UNEXPECTED),
    ("reduce-other-cells", CLIENT, m.Reduce(0, 2, 1, (TWIN,), (TWIN, ME)), Reason.UNKNOWN_CELL),
    ("reduce-without-me", CLIENT, m.Reduce(0, 2, 1, (TWIN, TWIN), (TWIN,)), Reason.UNEXPECTED),
    ("reduce-unlisted-owner", CLIENT, m.Reduce(0, 2, 1, (TWIN, TWIN), (ME,)), Reason.UNEXPECTED),
    ("apply-nothing", CLIENT, m.Apply(0, 2, 1, (1, 1), (0.0, 0.0)), Reason.UNEXPECTED),
    ("tied-part-where-none-is", NEXT, m.Tied(0, 2, 1, 1, payloads.pack(torch.zeros(4))), Reason.WRONG_STAGE),
    ("commit-nothing", CLIENT, m.Commit(0, 2), Reason.UNEXPECTED),
    ("reroute-past-step", CLIENT, m.Reroute(0, 1, 0, 0, ME), Reason.STALE_STEP),
    ("reroute-no-such-stage", CLIENT, m.Reroute(0, 2, 0, 5, ME), Reason.WRONG_STAGE),
    ("a-worker's-message", CLIENT, m.Ready(0, 2, NO_ROOT), Reason.UNEXPECTED),
]


@pytest.mark.parametrize(("peer", "message", "reason"), [r[1:] for r in REFUSALS], ids=[r[0] for r in REFUSALS])
def test_what_does_not_fit_is_refused_by_name(peer: str, message: m.Message, reason: Reason) -> None:
    bench = Bench()

    async def script(bench: Bench) -> None:
        await bench.step(1)
        await bench.open(2)
        await bench.say(tokens(2, 0))
        assert isinstance(await bench.hear(), m.Passed)
        await bench.say(message, peer=peer)
        assert bench.worker.refused == {reason: 1}
        await bench.say(tokens(2, 1))
        assert isinstance(await bench.hear(), m.Passed)

    bench.run(script)


def test_memory_for_a_step_is_bounded() -> None:
    async def script(bench: Bench) -> None:
        await bench.open()
        await bench.say(tokens(1, 0))
        await bench.say(tokens(1, 1))
        assert await bench.hear() == m.Passed(0, 1, 0, 0)
        assert bench.worker.refused == {Reason.MEMORY_FULL: 1}
        # it finishes what it has room for, and then tells that the rest must go elsewhere
        await bench.say(m.Gradient(0, 1, 0, 1, gradient()), peer=NEXT)
        assert isinstance(await bench.hear(), m.CellDone)
        assert await bench.hear() == m.Fault(0, 1, Reason.MEMORY_FULL, ())

    Bench(memory_limit=cell_bytes(MANIFEST, 0) * 2 - 1).run(script)


def test_a_cell_that_goes_elsewhere_ends_the_wait_to_tell_that_another_does_not_fit() -> None:
    async def script(bench: Bench) -> None:
        await bench.open()
        await bench.say(tokens(1, 0), tokens(1, 1))
        assert await bench.hear() == m.Passed(0, 1, 0, 0)
        await bench.say(m.Reroute(0, 1, 0, 0, TWIN))
        assert await bench.hear() == m.Fault(0, 1, Reason.MEMORY_FULL, ())

    Bench(memory_limit=cell_bytes(MANIFEST, 0) * 2 - 1).run(script)


def test_a_cell_that_will_not_fit_is_refused_before_anything_is_computed() -> None:
    async def script(bench: Bench) -> None:
        await bench.open()
        await bench.say(tokens(1, 0))
        assert await bench.hear() == m.Fault(0, 1, Reason.MEMORY_FULL, ())
        assert bench.worker.refused == {Reason.MEMORY_FULL: 1}

    Bench(memory_limit=cell_bytes(MANIFEST, 0) - 1).run(script)


def test_memory_for_early_tensors_is_bounded_by_sender() -> None:
    size = 4 * MANIFEST.batch * MANIFEST.sequence * MANIFEST.hidden

    async def script(bench: Bench) -> None:
        await bench.open()
        await bench.say(*(m.Gradient(0, 2, cell, 1, X) for cell in range(3)), peer="stranger")
        assert bench.worker.refused == {Reason.TOO_EARLY: 1}
        await bench.say(m.Gradient(0, 2, 0, 1, X), peer=NEXT)
        await bench.say(m.Gradient(0, 2, 0, 1, X), peer=NEXT)
        assert bench.worker.refused == {Reason.TOO_EARLY: 1, Reason.DUPLICATE: 1}

    Bench(early_limit=4 * size).run(script)
