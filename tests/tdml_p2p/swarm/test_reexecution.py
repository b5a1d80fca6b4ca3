"""Re-execution of a cell from signed inputs; whatever is wrong with the material is a named refusal."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec
import pytest
import torch
import trio
import trio.testing

from chain.keys import PrivateKey, peer_id
from chain.transactions import Claim, Opening, Trace
from tdml_p2p.swarm.inputs import Descriptor, InputsRefused, Senders, Wanted, encode, expected_messages, signed_input
from tdml_p2p.swarm.material import Unavailable
from tdml_p2p.swarm.reexecution import Cell, Claimed, Execution, Reexecutor
from tests.trainer.training_samples import CONFIG, small_batches, small_manifest
from trainer.content import address_of
from trainer.stage import CellKey, build_stage, execute
from trainer.state import StageState, initial_state
from trainer.tensors import buffer_of

T = TypeVar("T")
TASK = bytes(range(32))
CLIENT = PrivateKey(bytes([1]) * 32)
WORKER = PrivateKey(bytes([2]) * 32)
HOLDER = peer_id(WORKER.account)
MANIFEST = small_manifest(stages=1, config={**CONFIG, "attention_dropout": 0.25})
WANTED = Wanted(TASK, 0, 1, 0, 0)
STATE = initial_state(MANIFEST, 0)


@pytest.fixture(scope="module", autouse=True)
def _warm() -> None:
    """Import what the first stage of a process imports, which takes seconds."""
    build_stage(MANIFEST, 0)


async def inline(work: Callable[[], T], /) -> T:
    await trio.lowlevel.checkpoint()
    return work()


class Material:
    """What the holder of a cell gives: blobs by address, and the signed inputs."""

    def __init__(self, state: StageState = STATE) -> None:
        self.blobs: dict[bytes, bytes] = {}
        for buffer in state.buffers():
            self.give(bytes(buffer))
        self.state = self.give(state.manifest.encode())
        batch = small_batches(MANIFEST).batch(1, 0)
        self.tokens, self.labels = bytes(buffer_of(batch.tokens)), bytes(buffer_of(batch.labels))
        self.key = CLIENT

    def give(self, blob: bytes) -> bytes:
        self.blobs[address_of(blob)] = blob
        return address_of(blob)

    async def fetch(self, address: bytes, _holders: Sequence[str]) -> bytes:
        await trio.lowlevel.checkpoint()
        if address not in self.blobs:
            raise Unavailable("nobody has it")
        return self.blobs[address]

    async def ask(self, _peer: str, _request: bytes) -> bytes:
        await trio.lowlevel.checkpoint()
        x, gy = expected_messages(WANTED, MANIFEST)
        return encode(
            Descriptor(
                signed_input(self.key, TASK, x, self.give(self.tokens)),
                signed_input(self.key, TASK, gy, self.give(self.labels)),
            )
        )

    async def run(self) -> Execution:
        client = frozenset([peer_id(CLIENT.account)])
        cell = Cell(WANTED, MANIFEST, self.state, (HOLDER,), Senders(client, client))
        return await Reexecutor(self.fetch, self.ask, inline).run(cell)


async def test_the_result_is_the_workers_to_the_bit() -> None:
    execution = await Material().run()
    stage = build_stage(MANIFEST, 0)
    stage.load(STATE.weights)
    batch = small_batches(MANIFEST).batch(1, 0)
    # what dropout drops follows from step and cell, whatever the generation
    expected = execute(stage, batch.tokens, batch.labels, None, CellKey(3, WANTED.step, WANTED.cell))
    assert torch.equal(execution.result.y, expected.y)
    assert torch.equal(execution.result.gw, expected.gw)


async def test_inputs_that_the_client_did_not_sign_are_refused() -> None:
    material = Material()
    material.key = WORKER
    with pytest.raises(Unavailable, match="may not send"):
        await material.run()


class TwoFaced(Material):
    """Two holders: one tells of other tokens, as signed for as those that the other tells of, or keeps silent."""

    def __init__(self, is_told: bool) -> None:
        super().__init__()
        self.true = self.tokens
        self.false = bytes(buffer_of(small_batches(MANIFEST).batch(1, 1).tokens))
        self.is_told = is_told

    async def ask(self, peer: str, request: bytes) -> bytes:
        self.tokens = self.true if peer == "true" else self.false
        if peer == "true" and not self.is_told:
            await trio.sleep_forever()
        return await super().ask(peer, request)

    async def told(self, opened: bytes | None, signer: PrivateKey | None = None) -> bytes:
        """Return the x that is computed on once the worker has opened this one, with signatures of it or without."""
        client = frozenset([peer_id(CLIENT.account)])
        trace = Trace(*[bytes(32)] * 7)
        trace = msgspec.structs.replace(trace, x=opened or bytes(32), gy=address_of(self.labels))
        signed = b"" if signer is None else self.signed(signer, trace)
        opening = None if opened is None else Opening(bytes(32), bytes(32), trace, (), bytes(384), signed)
        claim = Claim(TASK, 0, 1, 0, (0,), bytes(32), self.state, self.state)
        claimed = Claimed(HOLDER, peer_id(CLIENT.account), claim, opening)
        cell = Cell(WANTED, MANIFEST, self.state, ("false", "true"), Senders(client, client), claimed)
        return (await Reexecutor(self.fetch, self.ask, inline).inputs(cell)).x.address

    def signed(self, signer: PrivateKey, trace: Trace) -> bytes:
        """Return the inputs of a trace, signed by somebody, as an opening holds them."""
        x, gy = expected_messages(WANTED, MANIFEST)
        return encode(Descriptor(signed_input(signer, TASK, x, trace.x), signed_input(signer, TASK, gy, trace.gy)))


async def test_inputs_that_are_signed_in_the_opening_need_no_teller(autojump_clock: trio.testing.MockClock) -> None:
    """A worker that is gone since, beside a sender that has signed two, is judged by what it was sent."""
    material, begun = TwoFaced(is_told=False), trio.current_time()
    true, false = address_of(material.true), address_of(material.false)
    assert await material.told(true, CLIENT) == true
    assert trio.current_time() == begun
    assert await material.told(true, WORKER) == false


async def test_of_two_signed_inputs_the_opened_one_is_taken(autojump_clock: trio.testing.MockClock) -> None:
    """A sender that signs two must not have a worker convicted that opened the one it was sent."""
    material = TwoFaced(is_told=True)
    true, false = address_of(material.true), address_of(material.false)
    assert await material.told(None) == false
    assert await material.told(true) == true
    assert await material.told(false) == false
    assert await material.told(bytes(32)) == false


async def test_the_opened_input_is_waited_for_a_few_seconds_only(autojump_clock: trio.testing.MockClock) -> None:
    material, begun = TwoFaced(is_told=False), trio.current_time()
    assert await material.told(address_of(material.true)) == address_of(material.false)
    assert trio.current_time() - begun < 10


async def test_a_missing_blob_is_unavailable() -> None:
    material = Material()
    del material.blobs[STATE.manifest.weights]
    with pytest.raises(Unavailable, match="nobody has it"):
        await material.run()


async def test_a_refused_request_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(_peer: str, _request: bytes) -> bytes:
        await trio.lowlevel.checkpoint()
        raise InputsRefused("this peer does not hold that cell")

    material = Material()
    monkeypatch.setattr(material, "ask", refuse)
    with pytest.raises(Unavailable, match="does not hold"):
        await material.run()


@pytest.mark.parametrize("reply", [b"", b"\xc1", bytes(5000), b"\x92\xc0\xc0"])
async def test_a_reply_that_is_none_is_unavailable(monkeypatch: pytest.MonkeyPatch, reply: bytes) -> None:
    async def answer(_peer: str, _request: bytes) -> bytes:
        await trio.lowlevel.checkpoint()
        return reply

    material = Material()
    monkeypatch.setattr(material, "ask", answer)
    with pytest.raises(Unavailable):
        await material.run()


@pytest.mark.parametrize("root", [b"", b"\xc1", bytes(300), b"\x94\x01\xc0\xc0\xc0"])
async def test_a_state_root_of_something_else_is_unavailable(root: bytes) -> None:
    material = Material()
    material.state = material.give(root)
    with pytest.raises(Unavailable):
        await material.run()


async def test_weights_of_another_size_are_unavailable() -> None:
    short = STATE.weights[:-1].clone()
    with pytest.raises(Unavailable):
        await Material(StageState(0, short, short, short)).run()


@pytest.mark.parametrize("name", ["tokens", "labels"])
@pytest.mark.parametrize("data", [b"", bytes(3), bytes(4), b"\xff" * 128])
async def test_signed_inputs_that_no_stage_takes_are_unavailable(name: str, data: bytes) -> None:
    material = Material()
    setattr(material, name, data)
    with pytest.raises(Unavailable):
        await material.run()


async def test_a_second_look_reads_other_last_bits_and_changes_nothing_of_the_first() -> None:
    client, material = frozenset([peer_id(CLIENT.account)]), Material()
    cell = Cell(WANTED, MANIFEST, material.state, (HOLDER,), Senders(client, client))
    reexecutor = Reexecutor(material.fetch, material.ask, inline)
    first = await reexecutor.run(cell)
    looks = [await reexecutor.again(cell, first, seed) for seed in (1, 1, 4)]
    after = await reexecutor.run(cell)
    assert torch.equal(first.result.y, after.result.y)
    assert torch.equal(first.result.gw, after.result.gw)
    assert torch.equal(looks[0].result.gw, looks[1].result.gw)
    assert not torch.equal(looks[0].result.gw, looks[2].result.gw)
    for look in looks:
        assert look.inputs == first.inputs
        assert not torch.equal(look.result.gw, first.result.gw)
        assert torch.allclose(look.result.gw, first.result.gw, rtol=1e-4, atol=1e-7)


async def test_material_that_is_gone_gives_no_second_look() -> None:
    client, material = frozenset([peer_id(CLIENT.account)]), Material()
    cell = Cell(WANTED, MANIFEST, material.state, (HOLDER,), Senders(client, client))
    reexecutor = Reexecutor(material.fetch, material.ask, inline)
    first = await reexecutor.run(cell)
    material.blobs.clear()
    with pytest.raises(Unavailable):
        await reexecutor.again(cell, first, 1)


async def test_the_cells_of_one_state_have_its_weights_fetched_once() -> None:
    material, first, fetched = Material(), build_stage(MANIFEST, 0), list[bytes]()
    later = StageState(0, STATE.weights * 2, STATE.m, STATE.v)
    roots = (material.state, Material(later).give(later.manifest.encode()))
    material.blobs |= Material(later).blobs

    async def fetch(address: bytes, holders: Sequence[str]) -> bytes:
        fetched.append(address)
        return await material.fetch(address, holders)

    client = frozenset([peer_id(CLIENT.account)])
    reexecutor = Reexecutor(fetch, material.ask, inline)
    batch = small_batches(MANIFEST).batch(1, 0)
    for turn in (0, 0, 1, 0):
        cell = Cell(WANTED, MANIFEST, roots[turn], (HOLDER,), Senders(client, client))
        execution = await reexecutor.run(cell)
        first.load((STATE, later)[turn].weights)
        expected = execute(first, batch.tokens, batch.labels, None, CellKey(0, WANTED.step, WANTED.cell))
        assert torch.equal(execution.result.gw, expected.gw)
    weights = [address for address in fetched if address in (STATE.manifest.weights, later.manifest.weights)]
    assert weights == [STATE.manifest.weights, later.manifest.weights, STATE.manifest.weights]


async def test_evidence_has_the_weights_that_were_not_fetched_again() -> None:
    material, kept = Material(), list[bytes]()

    async def keep(_inputs: object, blobs: Sequence[bytes | memoryview]) -> None:
        await trio.lowlevel.checkpoint()
        kept.extend(map(bytes, blobs))

    client = frozenset([peer_id(CLIENT.account)])
    cell = Cell(WANTED, MANIFEST, material.state, (HOLDER,), Senders(client, client))
    reexecutor = Reexecutor(material.fetch, material.ask, inline)
    await reexecutor.run(cell)
    await reexecutor.run(cell, keep)
    assert material.blobs[STATE.manifest.weights] in kept


async def test_a_state_without_weights_is_unavailable() -> None:
    material = Material()
    empty = msgspec.structs.replace(STATE.manifest, weights=material.give(b""))
    material.state = material.give(empty.encode())
    with trio.fail_after(20), pytest.raises(Unavailable):
        await material.run()
