"""Where material comes from: this peer's own memory first, then named holders; manifests are kept once read."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import cast

import pytest
import trio

from tdml_p2p.blob_transfer import BlobUnavailable
from tdml_p2p.host import Network
from tdml_p2p.swarm.library import Library
from tdml_p2p.swarm.material import Unavailable
from tdml_p2p.swarm.states import fetch_state
from tests.tdml_p2p.swarm.trace_samples import state_of
from tests.trainer.training_samples import small_manifest
from trainer.content import address_of
from trainer.manifest import MAX_MANIFEST_BYTES, encode_manifest
from trainer.worker_ports import StateUnavailable

MANIFEST = small_manifest(stages=2)
TASK = bytes(range(32))
OWN = bytes([1]) * 32


@dataclass
class FakeNetwork:
    """Blobs of others, who announces what, and what was asked of whom."""

    peer: str = "me"
    held: dict[bytes, bytes] = field(default_factory=dict)
    announced: dict[str, list[str]] = field(default_factory=dict)
    asked: list[tuple[bytes, tuple[str, ...], int]] = field(default_factory=list)

    @property
    def discovery(self) -> "FakeNetwork":
        return self

    @property
    def blobs(self) -> "FakeNetwork":
        return self

    async def find(self, name: str) -> list[SimpleNamespace]:
        await trio.lowlevel.checkpoint()
        return [SimpleNamespace(peer=peer) for peer in self.announced.get(name, [])]

    async def fetch(self, address: bytes, holders: Sequence[str], limit: int) -> bytes:
        await trio.lowlevel.checkpoint()
        self.asked.append((address, tuple(holders), limit))
        if address not in self.held:
            raise BlobUnavailable("nobody has it")
        return self.held[address]


@pytest.fixture
def network() -> FakeNetwork:
    return FakeNetwork()


@pytest.fixture
def library(network: FakeNetwork) -> Library:
    """A library of a peer that has one blob itself."""
    return Library(cast(Network, network), {OWN: memoryview(b"mine")}.get)


async def test_what_is_here_is_not_asked_for(library: Library, network: FakeNetwork) -> None:
    assert await library.fetch(OWN, ["other"]) == b"mine"
    assert network.asked == []


async def test_others_are_asked_once_each_and_this_peer_never(library: Library, network: FakeNetwork) -> None:
    network.held[bytes(32)] = b"theirs"
    assert await library.fetch(bytes(32), ["a", "me", "b", "a"], 9) == b"theirs"
    assert network.asked == [(bytes(32), ("a", "b"), 9)]


async def test_what_nobody_has_is_unavailable(library: Library) -> None:
    with pytest.raises(Unavailable, match="nobody has it"):
        await library.fetch(bytes(32), ["a"])


async def test_a_manifest_is_learned_from_whoever_announces_its_task(library: Library, network: FakeNetwork) -> None:
    network.announced[f"task/{TASK.hex()}"] = ["b", "me"]
    network.held[MANIFEST.address] = encode_manifest(MANIFEST)
    assert library.manifest(MANIFEST.address) is None
    await library.learn(MANIFEST.address, TASK, ["client"])
    assert library.manifest(MANIFEST.address) == MANIFEST
    assert network.asked == [(MANIFEST.address, ("b", "client"), MAX_MANIFEST_BYTES)]


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff", encode_manifest(MANIFEST)[:-1]])
async def test_a_manifest_that_is_none_is_not_learned(library: Library, network: FakeNetwork, data: bytes) -> None:
    network.held[address_of(data)] = data
    with pytest.raises(Unavailable, match="the manifest is refused"):
        await library.learn(address_of(data), TASK, ["client"])
    assert library.manifest(address_of(data)) is None
    asked = len(network.asked)
    with pytest.raises(Unavailable, match="the manifest is refused"):
        await library.learn(address_of(data), TASK, ["client"])
    assert len(network.asked) == asked  # nobody is made to look at it at every block


async def test_a_manifest_that_nobody_has_is_not_learned(library: Library) -> None:
    with pytest.raises(Unavailable, match="nobody has it"):
        await library.learn(MANIFEST.address, TASK, ["client"])


def test_an_own_manifest_is_known(library: Library) -> None:
    library.know(MANIFEST)
    assert library.manifest(MANIFEST.address) == MANIFEST


@pytest.fixture
def blobs(network: FakeNetwork) -> dict[bytes, bytes]:
    """A state that another peer holds."""
    state = state_of(4)
    parts = (state.manifest.encode(), *map(bytes, state.buffers()))
    network.held |= {address_of(part): part for part in parts}
    return network.held


async def test_a_state_is_found_by_its_root(library: Library, blobs: dict[bytes, bytes]) -> None:
    expected = state_of(4)
    for size in (None, 20):
        found = await fetch_state(library.fetch, expected.root, ["other"], size)
        assert (found.step, found.root) == (4, expected.root)
        assert [vector.tolist() for vector in (found.weights, found.m, found.v)] == [
            vector.tolist() for vector in (expected.weights, expected.m, expected.v)
        ]


@pytest.mark.parametrize("part", ["root", "weights", "m", "v"])
async def test_a_state_with_a_missing_part_is_unavailable(
    library: Library, blobs: dict[bytes, bytes], part: str
) -> None:
    manifest = state_of(4).manifest
    del blobs[manifest.root() if part == "root" else getattr(manifest, part)]
    with pytest.raises(StateUnavailable, match="nobody has it"):
        await fetch_state(library.fetch, manifest.root(), ["other"])


async def test_a_state_of_another_size_is_unavailable(library: Library, blobs: dict[bytes, bytes]) -> None:
    with pytest.raises(StateUnavailable):
        await fetch_state(library.fetch, state_of(4).root, ["other"], 19)


async def test_a_root_of_something_else_is_unavailable(library: Library, blobs: dict[bytes, bytes]) -> None:
    with pytest.raises(StateUnavailable):
        await fetch_state(library.fetch, state_of(4).manifest.weights, ["other"])
