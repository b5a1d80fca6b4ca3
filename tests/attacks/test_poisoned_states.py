"""A joiner whose holder serves a false state: refused by name, taken from another holder, nobody honest charged."""

from collections.abc import Awaitable, Callable
from typing import NamedTuple, TypeVar

import pytest
import torch
import trio

from tdml_p2p.blob_transfer import ABSENT, PROTOCOL, IndexReply, WantIndex, _encoder, decode_want
from tdml_p2p.host import Network
from tdml_p2p.requests import Refused
from tdml_p2p.swarm.library import Library
from tdml_p2p.swarm.states import fetch_state
from tests.tdml_p2p.network_kit import meshed
from tests.trainer.swarm_kit import CLIENT, manifest_of
from trainer.content import address_of, index_of
from trainer.messages import Fault, Finish, Message, Prepare, Ready
from trainer.payloads import Reason
from trainer.stage import build_stage, stage_layout
from trainer.state import StageState, StateManifest
from trainer.transport import InMemoryHub
from trainer.worker import Worker
from trainer.worker_ports import StateUnavailable, WorkerConfig, WorkerPorts
from trainer.worker_step import StepRecord

T = TypeVar("T")
Answer = Callable[[str, bytes], Awaitable[bytes]]
STEP = 7
LARGE = 300_000
"""Parameters whose vectors take more than one chunk."""


def state_of(step: int, size: int) -> StageState:
    generator = torch.Generator().manual_seed(step)
    return StageState(step, *(torch.randn(size, generator=generator) for _ in range(3)))


class Poison(NamedTuple):
    """What a liar makes of an honest answer, and whether it can be seen to lie; `told` is the joiner's reason."""

    of: Callable[[StageState, bytes, bytes], bytes]
    is_lie: bool
    told: str


def flipped(state: StageState, request: bytes, reply: bytes) -> bytes:
    """Serve weights in which one bit is another."""
    if decode_want(request).address != state.manifest.weights:
        return reply
    return reply[:-1] + bytes([reply[-1] ^ 1])


def cut(state: StageState, request: bytes, reply: bytes) -> bytes:
    """Serve moments that end too soon."""
    return reply[:-4] if decode_want(request).address == state.manifest.v else reply


def instead(state: StageState, other: bytes, address: bytes, request: bytes, reply: bytes) -> bytes:
    """Serve, consistently, another blob in place of one."""
    want = decode_want(request)
    if want.address != address:
        return reply
    index = index_of(other)
    return _encoder.encode(IndexReply(index, other if len(index.chunks) == 1 else b"")) if _asks(want) else other


def _asks(want: object) -> bool:
    return isinstance(want, WantIndex)


def older_manifest(state: StageState, request: bytes, reply: bytes) -> bytes:
    """Serve the manifest of an earlier state under the wanted root."""
    other = StateManifest(STEP - 1, *(address_of(buffer) for buffer in state.buffers())).encode()
    return instead(state, other, state.root, request, reply)


def older_weights(state: StageState, request: bytes, reply: bytes) -> bytes:
    """Serve the weights of an earlier state under the address of the wanted ones."""
    other = bytes(state_of(STEP - 1, state.weights.numel()).buffers()[0])
    return instead(state, other, state.manifest.weights, request, reply)


def manifest_only(state: StageState, request: bytes, reply: bytes) -> bytes:
    """Say that one has the state, and have nothing but its manifest."""
    if decode_want(request).address != state.root:
        raise Refused(ABSENT)
    return reply


POISONS = {
    "a bit of the weights": Poison(flipped, True, "false bytes"),
    "moments cut short": Poison(cut, True, "false bytes"),
    "an earlier manifest": Poison(older_manifest, True, "false bytes"),
    "earlier weights": Poison(older_weights, True, "false bytes"),
    "only the manifest": Poison(manifest_only, False, ABSENT),
}


async def hold(holder: Network, state: StageState) -> None:
    for part in (state.manifest.encode(), *map(bytes, state.buffers())):
        await holder.blobs.put(part)


def poisoning(liar: Network, state: StageState, poison: Poison) -> Answer:
    """Return how a liar that has the state answers."""

    async def answer(sender: str, request: bytes) -> bytes:
        return poison.of(state, request, bytes(await liar.blobs._serve(sender, request)))

    return answer


@pytest.mark.parametrize("size", [20, LARGE])
@pytest.mark.parametrize("name", POISONS)
async def test_a_poisoned_state_is_refused_by_name_and_comes_from_another_holder(name: str, size: int) -> None:
    poison, state = POISONS[name], state_of(STEP, size)
    async with meshed(3) as (liar, honest, joiner):
        library = Library(joiner, lambda _: None)
        for holder in (liar, honest):
            await hold(holder, state)
        liar.on_request(PROTOCOL, poisoning(liar, state, poison), 256)
        with pytest.raises(StateUnavailable, match=f"{liar.peer}: {poison.told}"):
            await fetch_state(library.fetch, state.root, (liar.peer,), size)
        found = await fetch_state(library.fetch, state.root, (liar.peer, honest.peer), size)
        assert (found.step, found.root) == (STEP, state.root)
        assert torch.equal(found.weights, state.weights)
        assert (joiner.limits.penalty(liar.peer) > 0) == poison.is_lie
        assert joiner.limits.penalty(honest.peer) == 0


async def test_a_true_state_of_another_size_is_none_and_who_serves_it_is_not_charged() -> None:
    state = state_of(STEP, 20)
    async with meshed(2) as (holder, joiner):
        await hold(holder, state)
        with pytest.raises(StateUnavailable, match="not the one that its root names"):
            await fetch_state(Library(joiner, lambda _: None).fetch, state.root, (holder.peer,), 21)
        assert joiner.limits.penalty(holder.peer) == 0


# a whole worker as the joiner


class Joining:
    """A worker that joins at step 7, on the network `joiner`; the test speaks for its client."""

    def __init__(self, joiner: Network) -> None:
        torch.set_num_threads(1)
        manifest, hub = manifest_of(stages=2), InMemoryHub()
        library, size = Library(joiner, lambda _: None), stage_layout(manifest, 0).total
        self.client = hub.join(CLIENT)
        config = WorkerConfig(CLIENT, build_stage(manifest, 0), manifest, ring_depth=3)
        ports = WorkerPorts(
            self._inline, lambda root, holders: fetch_state(library.fetch, root, holders, size), self._on_committed
        )
        self.worker = Worker(config, hub.join("me"), ports)
        self.state = state_of(STEP, size)

    async def asked(self, root: bytes, *holders: str) -> Message:
        """Return what the joiner says to a request for the state with this root."""
        await self.client.send("me", Prepare(0, STEP, 0, root, holders))
        received = await self.client.receive()
        assert isinstance(received.message, Message)
        return received.message

    async def _inline(self, work: Callable[[], T], /) -> T:
        await trio.lowlevel.checkpoint()
        return work()

    async def _on_committed(self, record: StepRecord) -> None:
        raise AssertionError("no step was asked for")


@pytest.mark.parametrize("name", POISONS)
async def test_a_joiner_says_that_it_has_no_state_and_is_ready_with_the_next_holder(name: str) -> None:
    async with meshed(3) as (liar, honest, joiner), trio.open_nursery() as nursery:
        joining = Joining(joiner)
        state = joining.state
        for holder in (liar, honest):
            await hold(holder, state)
        liar.on_request(PROTOCOL, poisoning(liar, state, POISONS[name]), 256)
        nursery.start_soon(joining.worker.run)
        assert await joining.asked(state.root, liar.peer) == Fault(0, STEP, Reason.NO_STATE, ())
        assert not joining.worker.states
        assert await joining.asked(state.root, liar.peer, honest.peer) == Ready(0, STEP, state.root)
        assert [kept.root for kept in joining.worker.states] == [state.root]
        assert joiner.limits.penalty(honest.peer) == 0
        await joining.client.send("me", Finish())


async def test_a_root_of_another_step_is_no_state_of_this_one() -> None:
    """A manifest that is what its root says, and yet of another step than the client asks for."""
    async with meshed(2) as (liar, joiner), trio.open_nursery() as nursery:
        joining = Joining(joiner)
        older = StageState(STEP - 1, joining.state.weights, joining.state.m, joining.state.v)
        await hold(liar, older)
        nursery.start_soon(joining.worker.run)
        assert await joining.asked(older.root, liar.peer) == Fault(0, STEP, Reason.STATE_MISMATCH, ())
        assert not joining.worker.states
        await joining.client.send("me", Finish())
