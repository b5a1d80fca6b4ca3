"""What a worker handed its neighbours against what it claims: signed inputs that these hold are proof, nothing else."""

from collections.abc import Iterator, Sequence

import msgspec
import pytest
import torch
import trio
import trio.testing

from chain.keys import PrivateKey, peer_id
from chain.params import Params
from chain.verdicts import Limits, limits_for
from tdml_p2p.swarm.handed import Handed, is_gross
from tdml_p2p.swarm.inputs import Descriptor, Senders, Wanted, decode_wanted, encode, expected_messages, signed_input
from tdml_p2p.swarm.material import Unavailable
from tdml_p2p.swarm.reexecution import Cell
from tests.tdml_p2p.swarm.session_kit import without_threads
from tests.trainer.swarm_kit import manifest_of
from trainer.content import address_of
from trainer.manifest import TaskManifest
from trainer.payloads import Dtype, pack
from trainer.stage import CellResult

TASK = bytes(range(32))
WORKER, BEFORE, AFTER, OTHER = (PrivateKey(bytes([number]) * 32) for number in range(2, 6))
LIMITS: Limits = limits_for(Params())
SHAPE = (2, 8, 16)


@pytest.fixture(autouse=True)
def _inline() -> Iterator[None]:
    """Do the work of threads at once: virtual time does not wait for threads."""
    with without_threads():
        yield


def result() -> CellResult:
    y, gx, gw = (torch.rand(SHAPE, generator=torch.Generator().manual_seed(seed)) - 0.5 for seed in range(3))
    return CellResult(y, gx, gw.flatten(), boundaries=())


class Neighbours:
    """Stages 0 and 2 around a worker of stage 1: what each holds, signed by whom."""

    def __init__(self, compression: str = "none") -> None:
        self.manifest: TaskManifest = msgspec.structs.replace(manifest_of(stages=3, layers=4), compression=compression)
        self.sent = {"y": result().y, "gx": result().gx}
        self.signers = {"y": WORKER, "gx": WORKER}
        self.silent = set[str]()
        self.withheld = set[bytes]()
        self.blobs: dict[bytes, bytes] = {}
        self.seconds = 0.0
        """That a tensor takes to come."""

    async def ask(self, peer: str, request: bytes) -> bytes:
        await trio.lowlevel.checkpoint()
        if peer in self.silent:
            await trio.sleep_forever()
        wanted = decode_wanted(request)
        if peer != peer_id((BEFORE, None, AFTER)[wanted.stage].account):
            raise Unavailable("this peer does not hold that cell")
        x, gy = expected_messages(wanted, self.manifest)
        name, message = ("gx", gy) if wanted.stage == 0 else ("y", x)
        data = bytes(pack(self.sent[name], self.manifest.wire)[0].data)
        self.blobs[address_of(data)] = data
        one = signed_input(self.signers[name], TASK, message, address_of(data))
        return encode(Descriptor(None, one) if wanted.stage == 0 else Descriptor(one, None))

    async def fetch(self, address: bytes, _holders: Sequence[str]) -> bytes:
        await trio.sleep(self.seconds)
        if address in self.withheld or address not in self.blobs:
            raise Unavailable("nobody has it")
        return self.blobs[address]

    async def found(self, seconds: float = 60.0) -> bool:
        until = trio.current_time() + seconds
        senders = Senders(frozenset([peer_id(BEFORE.account)]), frozenset(map(peer_id, (AFTER.account, OTHER.account))))
        cell = Cell(Wanted(TASK, 0, 1, 1, 0), self.manifest, bytes(32), (), senders)
        return await Handed(self.ask, self.fetch, LIMITS).is_other(cell, peer_id(WORKER.account), result(), until)


@pytest.mark.parametrize("compression", ["none", "bf16", "int8"])
@pytest.mark.parametrize("name", ["y", "gx"])
async def test_other_results_than_are_claimed_are_found_on_either_side(name: str, compression: str) -> None:
    around = Neighbours(compression)
    assert not await around.found()
    around.sent[name] = around.sent[name] * -1.0
    assert await around.found()


@pytest.mark.parametrize("compression", ["none", "bf16", "int8"])
async def test_an_output_that_was_sent_twice_and_differs_by_rounding_is_nobodys_fault(compression: str) -> None:
    around = Neighbours(compression)
    around.sent["y"] = around.sent["y"] * (1 + 1e-6)
    assert not await around.found()


async def test_what_somebody_else_signed_says_nothing_of_this_worker() -> None:
    around = Neighbours()
    around.sent["y"], around.signers["y"] = around.sent["y"] * 2, OTHER
    assert not await around.found()


async def test_a_neighbour_that_tells_and_does_not_give_proves_nothing() -> None:
    around = Neighbours()
    around.sent["y"] = around.sent["y"] * 2
    around.withheld.add(address_of(bytes(pack(around.sent["y"])[0].data)))
    assert not await around.found()


async def test_silent_neighbours_hold_up_nobody_for_long(autojump_clock: trio.testing.MockClock) -> None:
    around, begun = Neighbours(), trio.current_time()
    around.silent |= set(map(peer_id, (BEFORE.account, AFTER.account)))
    assert not await around.found()
    assert trio.current_time() - begun < 10


@pytest.mark.parametrize(("seconds", "is_found"), [(40.0, True), (80.0, False)])
async def test_a_large_tensor_has_all_the_time_that_is_left(
    seconds: float, is_found: bool, autojump_clock: trio.testing.MockClock
) -> None:
    around = Neighbours()
    around.seconds, around.sent["y"] = seconds, around.sent["y"] * 2
    assert await around.found() == is_found


async def test_one_silent_neighbour_does_not_hide_what_another_was_sent() -> None:
    around = Neighbours()
    around.silent.add(peer_id(BEFORE.account))
    around.sent["y"] = around.sent["y"] * 2
    assert await around.found()


def test_bytes_of_another_length_are_gross() -> None:
    assert is_gross(bytes(12), torch.rand(2, 2, 1), Dtype.FP32, 1.0)
