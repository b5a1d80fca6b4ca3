"""Large messages are opened outside the event loop, in the order in which they came, with the same bits."""

import math
import threading
from collections.abc import Callable

import pytest
import torch
import trio
import trio.testing
from msgspec import structs
from swarm_kit import CLIENT, Kit, manifest_of, tied_manifest

from trainer import messages as m
from trainer import worker_intake
from trainer.coordinator_pace import Pace
from trainer.manifest import TaskManifest
from trainer.payloads import Dtype, Reason, TensorPayload, pack
from trainer.stage import build_stage
from trainer.state import StageState, initial_state
from trainer.transport import Lost, Received
from trainer.worker_intake import Data, Intake, Opened, Opener
from trainer.worker_ports import T, WorkerConfig
from trainer.worker_seat import Seat


def opened(manifest: TaskManifest, monkeypatch: pytest.MonkeyPatch) -> tuple[list[bytes], list[bool]]:
    """Return what a swarm of two replicas a stage trains, in real time; of each opening, if it was in the loop."""
    torch.set_num_threads(1)
    roots, were_here, here = list[bytes](), list[bool](), threading.get_ident()
    plain = Opener.open

    def noted(opener: Opener, message: Data, current: StageState | None) -> Opened:
        if isinstance(message, m.Partial | m.Tied) or message.payload[0].is_encoded:
            were_here.append(threading.get_ident() == here)
        return plain(opener, message, current)

    monkeypatch.setattr(Opener, "open", noted)
    # whose cells they are decides in which order they are added up: not to depend on how busy this machine is
    monkeypatch.setattr(Pace, "weights", lambda _, replicas: dict.fromkeys(replicas, 1.0))

    async def train() -> None:
        roots.extend(state.root for state in await Kit(manifest).train())

    trio.run(train)
    monkeypatch.undo()
    return roots, were_here


@pytest.mark.parametrize("compression", ["none", "bf16", "int8"])
def test_nothing_large_is_opened_in_the_event_loop_and_the_bits_stay(
    compression: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = structs.replace(tied_manifest(steps=2), compression=compression)
    monkeypatch.setattr(worker_intake, "LARGE", 0)
    roots, were_here = opened(manifest, monkeypatch)
    sums = manifest.steps * 2 * (2 + 2 * 2)  # partial sums between replicas, and tied parts from end to end
    assert len(were_here) >= sums + (compression != "none") * 2 * manifest.steps * manifest.microbatches
    assert not any(were_here)
    monkeypatch.setattr(worker_intake, "LARGE", math.inf)
    assert opened(manifest, monkeypatch) == (roots, [True] * len(were_here))


class FakeSeat:
    """Takes everything; with the first message, what has come before it."""

    def __init__(self, *early: Received) -> None:
        self.early = early
        self.log: list[tuple[str, str]] = []

    def opening(self, received: Received) -> Callable[[], Opened] | None:
        def open_it() -> Opened:
            self.log.append(("opened", received.sender))
            if received.sender == "poor":
                raise MemoryError
            return Opened(torch.zeros(1))

        return None if received.sender == "early" else open_it

    def take(self, received: Received, opened: Opened | None = None) -> tuple[Received, ...]:
        self.log.append(("took" if opened is None else "took opened", received.sender))
        released, self.early = self.early, ()
        return released

    def lack(self, message: m.Message | Lost, error: Exception) -> None:
        self.log.append((type(error).__name__, type(message).__name__))


def part(sender: str, size: int, attempt: int = 1) -> Received:
    return Received(sender, m.Partial(0, 1, attempt, 0, pack(torch.zeros(size))))


LARGE = worker_intake.LARGE // 4


async def after_a_while(work: Callable[[], T], /) -> T:
    await trio.testing.wait_all_tasks_blocked()
    return work()


async def test_what_waited_is_taken_in_its_order_and_only_what_is_large_and_due_is_opened_before() -> None:
    first = Received(CLIENT, m.OpenStep(0, 1, ()))
    seat = FakeSeat(part("large", LARGE), part("small", LARGE - 1), part("early", LARGE), part("larger", 2 * LARGE))
    await Intake(seat, after_a_while).take(first)
    assert seat.log == [
        ("took", CLIENT),
        ("opened", "large"),
        ("took opened", "large"),
        ("took", "small"),
        ("took", "early"),
        ("opened", "larger"),
        ("took opened", "larger"),
    ]


async def test_lack_of_memory_in_the_thread_is_told_and_the_next_message_is_taken() -> None:
    seat = FakeSeat(part("poor", LARGE), part("small", 1))
    await Intake(seat, after_a_while).take(Received(CLIENT, m.OpenStep(0, 1, ())))
    assert seat.log == [("took", CLIENT), ("opened", "poor"), ("MemoryError", "Partial"), ("took", "small")]


@pytest.mark.parametrize(
    ("shape", "dtype", "is_readonly", "is_opened"),
    [
        ((LARGE,), Dtype.FP32, False, False),
        ((LARGE,), Dtype.FP32, True, True),
        ((2 * LARGE,), Dtype.BF16, False, True),
        ((2 * LARGE - 1,), Dtype.BF16, False, False),
    ],
)
async def test_of_a_cells_inputs_only_what_must_be_decoded_or_copied_is_opened_before(
    shape: tuple[int, ...], dtype: Dtype, is_readonly: bool, is_opened: bool
) -> None:
    data = memoryview(bytearray(math.prod(shape) * (2 if dtype is Dtype.BF16 else 4)))
    payload = TensorPayload(dtype, shape, data.toreadonly() if is_readonly else data)
    seat = FakeSeat()
    await Intake(seat, after_a_while).take(Received("p", m.Activation(0, 1, 0, 0, (payload,))))
    assert seat.log == [("opened", "p"), ("took opened", "p")] if is_opened else [("took", "p")]


def seat_of_the_last_stage(posted: list[m.Message], memory_limit: int) -> Seat:
    manifest = structs.replace(manifest_of(stages=2, steps=2, microbatches=2), compression="bf16")
    config = WorkerConfig(CLIENT, build_stage(manifest, 1), manifest, ring_depth=4, memory_limit=memory_limit)
    seat = Seat(config, "me", lambda _to, message: posted.append(message))
    seat.current = initial_state(manifest, 1)
    seat.take(Received(CLIENT, m.OpenStep(0, 1, (("p0", "me"), ("p0", "me")))))
    return seat


def an_input() -> Received:
    manifest = manifest_of()
    x = pack(torch.ones(manifest.batch, manifest.sequence, manifest.hidden), Dtype.BF16)
    return Received("p0", m.Activation(0, 1, 0, 0, x))


@pytest.mark.parametrize("limit", [1 << 20, 1])
async def test_a_state_that_is_lost_while_a_message_is_opened_lets_it_be_refused_and_what_does_not_fit_is_not_opened(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_intake, "LARGE", 0)
    posted, opened = list[m.Message](), list[object]()
    seat = seat_of_the_last_stage(posted, limit)

    async def lose_meanwhile(work: Callable[[], T], /) -> T:
        opened.append(result := work())
        seat.lose_state()
        return result

    await Intake(seat, lose_meanwhile).take(an_input())
    assert len(opened) == (limit > 1)
    assert (seat.work is None) == (limit > 1)
    assert [message.reason for message in posted if isinstance(message, m.Fault)] == [
        Reason.NO_STATE if limit > 1 else Reason.MEMORY_FULL
    ]
