"""Who counts as a member of a task, and what a peer does when it cannot apply for a seat."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import base58
import msgspec
import pytest
import trio
import trio.testing

from chain.engine import ChainEngine, SubmitRefused
from chain.keys import PrivateKey, peer_id
from chain.reasons import Reason
from chain.records import Task
from chain.state import State
from chain.transactions import LeaveSeat, TakeSeat
from tdml_p2p.swarm.admission import WrongAnswer
from tdml_p2p.swarm.applying import Applicant
from tdml_p2p.swarm.leaving import Leaving
from tdml_p2p.swarm.service import SwarmService
from tests.tdml_p2p.swarm.task_samples import terms_of
from tests.trainer.training_samples import small_manifest
from trainer.footprint import largest
from trainer.kernel import kernel_class

T = TypeVar("T")
MANIFEST = small_manifest(stages=2)

TASK = bytes(range(32))
CLIENT, SEATED, EVICTED, SPARE, STRANGER = (PrivateKey(bytes([number]) * 32).account for number in range(1, 6))


def service() -> SwarmService:
    """Return as much of a service as membership needs: the newest final state."""
    workers = [(SEATED, True), (EVICTED, False), (SPARE, False)]
    state = SimpleNamespace(
        task=lambda task: SimpleNamespace(client=CLIENT) if task == TASK else None,
        workers=lambda _: [SimpleNamespace(account=account, is_seated=seated) for account, seated in workers],
    )
    return cast(SwarmService, SimpleNamespace(_engine=SimpleNamespace(state=state)))


@pytest.mark.parametrize(
    ("account", "is_member"), [(CLIENT, True), (SEATED, True), (EVICTED, False), (SPARE, False), (STRANGER, False)]
)
def test_the_client_and_the_seated_are_members(account: bytes, is_member: bool) -> None:
    assert SwarmService.is_member(service(), TASK, peer_id(account)) is is_member


def test_an_unknown_task_has_no_members() -> None:
    assert not SwarmService.is_member(service(), bytes(32), peer_id(CLIENT))


def test_a_peer_without_an_ed25519_key_is_no_member() -> None:
    rsa = base58.b58encode(bytes([0x12, 0x20]) + bytes(32)).decode()
    assert not SwarmService.is_member(service(), TASK, rsa)


class Chain:
    """Takes applications, or refuses them."""

    def __init__(self, refuses: bool = False) -> None:
        self.refuses = refuses
        self.sent: list[object] = []

    async def submit(self, payload: object) -> bytes:
        await trio.lowlevel.checkpoint()
        if self.refuses:
            raise SubmitRefused(Reason.NO_FUNDS)
        self.sent.append(payload)
        return bytes(32)


async def at_once(work: Callable[[], T], /) -> T:
    await trio.lowlevel.checkpoint()
    return work()


def applicant(chain: Chain, memory: int = 0, wrong: str = "") -> Applicant:
    async def prove(_task: Task) -> int:
        await trio.lowlevel.checkpoint()
        if wrong:
            raise WrongAnswer(wrong)
        return 2

    return Applicant(cast(ChainEngine, chain), at_once, memory, prove)


async def test_a_machine_that_computes_wrongly_does_not_apply() -> None:
    chain = Chain()
    peer = applicant(chain, wrong="gw is off")
    await peer.apply(cast(Task, SimpleNamespace(id=TASK, **terms_of(MANIFEST))), MANIFEST)
    assert not chain.sent
    assert peer.declined == {TASK: "this machine computes wrongly: gw is off"}


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "too little memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "too little memory"),
        (RuntimeError("no such instruction"), "this machine cannot compute: no such instruction"),
    ],
)
async def test_a_machine_that_cannot_compute_the_known_answers_declines(error: Exception, said: str) -> None:
    async def prove(_task: Task) -> int:
        await trio.lowlevel.checkpoint()
        raise error

    chain = Chain()
    peer = Applicant(cast(ChainEngine, chain), at_once, 0, prove)
    await peer.apply(cast(Task, SimpleNamespace(id=TASK, **terms_of(MANIFEST))), MANIFEST)
    assert not chain.sent
    assert peer.declined == {TASK: said}


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
async def test_a_stage_that_does_not_fit_gives_its_seat_up(error: Exception) -> None:
    def build(*_: object) -> None:
        raise error

    chain = Chain()
    closed: list[bytes] = []
    streams = SimpleNamespace(
        open_session=lambda _: trio.open_memory_channel[None](0)[1], close_session=lambda task: closed.append(task)
    )
    peer = SimpleNamespace(key=PrivateKey(bytes(32)), name="me", network=SimpleNamespace(tensors=streams))
    fake = SimpleNamespace(_peer=peer, _compute=at_once, _factory=build, _engine=chain, is_member=bool)
    fake.applicant = applicant(chain)
    fake._leave = lambda task, reason: SwarmService._leave(cast(SwarmService, fake), task, reason)
    task = SimpleNamespace(id=TASK, client=CLIENT, depth=4)
    await SwarmService._work(cast(SwarmService, fake), cast(Task, task), 0, MANIFEST)
    assert chain.sent == [LeaveSeat(TASK)]
    assert closed == [TASK]
    assert "cannot be built" in fake.applicant.declined[TASK]


async def test_a_machine_of_another_kernel_class_does_not_apply_and_says_which_it_is() -> None:
    rough = msgspec.structs.replace(MANIFEST, precision="bf16")
    own = kernel_class("bf16")
    for manifest, kernel, said in (
        (rough, own, ""),
        (rough, bytes(32), own.hex()),
        (rough, b"", "names no kernel class"),
        (MANIFEST, bytes(32), "names a kernel class"),
    ):
        chain = Chain()
        peer = applicant(chain)
        await peer.apply(cast(Task, SimpleNamespace(id=TASK, **terms_of(manifest, kernel=kernel))), manifest)
        assert said in peer.declined.get(TASK, "")
        assert [payload.kernel for payload in chain.sent] == ([] if said else [own])  # type: ignore[attr-defined]


@pytest.mark.parametrize("field", ["stages", "replicas", "microbatches", "redundancy", "depth"])
async def test_a_peer_does_not_apply_for_a_task_that_says_otherwise_than_its_manifest(field: str) -> None:
    """The chain counts by the one and workers compute by the other: an honest one would pay for the difference."""
    chain, terms = Chain(), terms_of(MANIFEST)
    peer = applicant(chain)
    await peer.apply(cast(Task, SimpleNamespace(id=TASK, **terms | {field: terms[field] + 1})), MANIFEST)
    assert "its manifest" in peer.declined[TASK]
    assert not chain.sent
    await peer.apply(cast(Task, SimpleNamespace(id=TASK, **terms)), MANIFEST)
    assert [type(payload) for payload in chain.sent] == [TakeSeat]


async def test_a_peer_that_cannot_pay_applies_again_later() -> None:
    chain = Chain(refuses=True)
    peer = applicant(chain)
    assert peer.begin(TASK)
    await peer.apply(cast(Task, SimpleNamespace(id=TASK, **terms_of(MANIFEST))), MANIFEST)
    assert peer.begin(TASK)
    chain.refuses = False
    await peer.apply(cast(Task, SimpleNamespace(id=TASK, **terms_of(MANIFEST))), MANIFEST)
    assert not peer.begin(TASK)
    assert [type(payload) for payload in chain.sent] == [TakeSeat]
    assert peer.answers == {TASK: 2}


async def test_a_peer_does_not_apply_for_what_it_cannot_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    need = largest(MANIFEST)
    for memory, free, said in (
        (need.total - 1, None, "more than the"),
        (0, need.total - 1, "are free"),
        (need.total, need.total, ""),
        (0, None, ""),
    ):
        monkeypatch.setattr("trainer.footprint.available_bytes", lambda free=free: free)
        chain = Chain()
        peer = applicant(chain, memory)
        await peer.apply(cast(Task, SimpleNamespace(id=TASK, **terms_of(MANIFEST))), MANIFEST)
        assert said in peer.declined.get(TASK, "")
        assert len(chain.sent) == (not said)
        assert len(peer.declined) == bool(said)
        state = SimpleNamespace(task=lambda _: SimpleNamespace(is_open=True), worker=lambda *_: None)
        peer.forget_closed(cast(State, state), SEATED)
        assert len(peer.declined) == bool(said)
        peer.forget_closed(cast(State, SimpleNamespace(task=lambda _: None, worker=lambda *_: None)), SEATED)
        assert not peer.declined


class Seats:
    """A service's applicant and sessions, with memory for one seat and a half."""

    def __init__(self) -> None:
        self.chain = Chain()
        self.sessions: dict[bytes, Any] = {}
        memory = largest(MANIFEST).total * 3 // 2
        self.applicant = Applicant(cast(ChainEngine, self.chain), at_once, memory, self._prove, self.held)

    async def _prove(self, _task: Task) -> int:
        await trio.sleep(1)
        return 0

    def held(self, but: bytes) -> int:
        fake = SimpleNamespace(applicant=self.applicant, _sessions=self.sessions)
        return SwarmService._held_memory(cast(SwarmService, fake), but)

    async def apply(self, *tasks: bytes) -> list[bytes]:
        """Apply for all of them at once that are due; return where an application was sent."""
        sent = len(self.chain.sent)
        async with trio.open_nursery() as nursery:
            for task in tasks:
                if self.applicant.begin(task):
                    nursery.start_soon(
                        self.applicant.apply, cast(Task, SimpleNamespace(id=task, **terms_of(MANIFEST))), MANIFEST
                    )
        return [cast(TakeSeat, payload).task for payload in self.chain.sent[sent:]]

    def forget(self, *, gone: bytes = b"", closed: bytes = b"") -> None:
        state = SimpleNamespace(
            task=lambda task: SimpleNamespace(is_open=task != closed),
            worker=lambda task, _: SimpleNamespace(is_present=task != gone),
        )
        self.applicant.forget_closed(cast(State, state), SEATED)


@pytest.mark.parametrize("end", ["closed", "gone", "not built", "session"])
async def test_memory_that_is_applied_for_is_held_and_who_found_none_left_applies_once_it_is_free(
    end: str, autojump_clock: trio.testing.MockClock
) -> None:
    seats, tasks = Seats(), (TASK, bytes(32))
    (first,) = await seats.apply(*tasks)
    (other,) = set(tasks) - {first}
    assert "other seats" in seats.applicant.declined[other]
    assert seats.held(other) == largest(MANIFEST).total
    assert seats.held(first) == 0
    assert await seats.apply(*tasks) == []
    seats.forget()
    assert await seats.apply(*tasks) == []
    if end == "not built":
        seats.applicant.decline(first, "its stage cannot be built")
    elif end == "session":
        seats.sessions[first] = SimpleNamespace(footprint=largest(MANIFEST).total, is_stopped=False)
        assert await seats.apply(*tasks) == []
        seats.sessions[first].is_stopped = True
    else:
        seats.forget(gone=first if end == "gone" else b"", closed=first if end == "closed" else b"")
    assert await seats.apply(*tasks) == [other]
    assert other not in seats.applicant.declined


async def test_seats_that_a_peer_has_when_it_starts_take_memory_before_it_applies_elsewhere(
    autojump_clock: trio.testing.MockClock,
) -> None:
    seats, mine, other = Seats(), TASK, bytes(32)
    state = cast(
        State,
        SimpleNamespace(
            open_tasks=lambda: [SimpleNamespace(id=mine), SimpleNamespace(id=other)],
            worker=lambda task, _: SimpleNamespace(is_present=True) if task == mine else None,
        ),
    )
    assert seats.applicant.note_seats(state, SEATED, seats.sessions) == {mine}
    assert await seats.apply(other) == []
    assert other not in seats.applicant.declined  # nobody knows yet
    await seats.applicant.hold(mine, MANIFEST)
    assert seats.held(other) == largest(MANIFEST).total
    assert seats.applicant.note_seats(state, SEATED, seats.sessions) == frozenset()
    assert await seats.apply(other) == []
    assert "other seats" in seats.applicant.declined[other]


@pytest.mark.parametrize("is_measured", [False, True], ids=["nobody tells of it", "it runs"])
async def test_a_seat_that_nobody_tells_about_is_not_waited_for_for_ever_and_one_that_runs_is_known(
    is_measured: bool, autojump_clock: trio.testing.MockClock
) -> None:
    seats, mine, other = Seats(), TASK, bytes(32)
    state = cast(
        State,
        SimpleNamespace(
            open_tasks=lambda: [SimpleNamespace(id=mine)], worker=lambda *_: SimpleNamespace(is_present=True)
        ),
    )
    if is_measured:
        seats.sessions[mine] = SimpleNamespace(footprint=1, is_stopped=False)
    assert bool(seats.applicant.note_seats(state, SEATED, seats.sessions)) is not is_measured
    assert await seats.apply(other) == ([other] if is_measured else [])
    await trio.sleep(61)
    assert bool(seats.applicant.note_seats(state, SEATED, seats.sessions)) is not is_measured
    assert await seats.apply(other) == ([] if is_measured else [other])


async def test_what_is_too_large_in_any_case_is_not_tried_again() -> None:
    peer = applicant(Chain(), largest(MANIFEST).total - 1)
    assert peer.begin(TASK)
    await peer.apply(cast(Task, SimpleNamespace(id=TASK, **terms_of(MANIFEST))), MANIFEST)
    assert not peer.reserved
    assert not peer.begin(TASK)


@pytest.mark.parametrize("is_refused", [False, True])
async def test_a_peer_that_stops_gives_up_its_seats_and_works_until_the_chain_says_so(
    is_refused: bool,
) -> None:
    sent: list[object] = []
    worker = SimpleNamespace(is_seated=True)
    blocks, arrivals = trio.open_memory_channel[None](1)

    async def submit(payload: object) -> bytes:
        await trio.lowlevel.checkpoint()
        if is_refused:
            raise SubmitRefused(Reason.MEMPOOL_FULL)
        sent.append(payload)
        return bytes(32)

    state = SimpleNamespace(task=lambda _: SimpleNamespace(is_open=True), worker=lambda *_: worker)
    engine = SimpleNamespace(submit=submit, state=state, subscribe=lambda: arrivals)
    leaving = Leaving(cast(Any, engine), bytes(32), cast(Any, {TASK: None}))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(leaving.leave)
        await trio.testing.wait_all_tasks_blocked()
        assert sent == ([] if is_refused else [LeaveSeat(TASK)])
        assert nursery.child_tasks
        worker.is_seated = False
        await blocks.send(None)


async def test_who_left_stays_until_its_claims_have_settled_or_no_block_comes(
    autojump_clock: trio.testing.MockClock,
) -> None:
    worker = SimpleNamespace(is_seated=False, engaged=2)
    blocks, arrivals = trio.open_memory_channel[None](1)
    state = SimpleNamespace(
        task=lambda _: SimpleNamespace(is_open=True), worker=lambda *_: worker, workers=lambda _: []
    )
    engine = SimpleNamespace(state=state, subscribe=lambda: arrivals)
    session = SimpleNamespace(seat=SimpleNamespace(on_chain=0))
    leaving = Leaving(cast(Any, engine), bytes(32), cast(Any, {TASK: session}))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(leaving.hand_over)
        await blocks.send(None)
        await trio.testing.wait_all_tasks_blocked()
        assert nursery.child_tasks
        worker.engaged = 0
        await blocks.send(None)
    worker.engaged = 1
    blocks, arrivals = trio.open_memory_channel[None](1)
    with trio.fail_after(60):
        await leaving.hand_over()
