"""Keeping connected: the full mesh, restarts, remembered peers, wrong identities, hostile hellos."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multiaddr import Multiaddr

from chain.keys import peer_id
from tdml_p2p.host import Network
from tdml_p2p.peers import ConnectFailed, Hello, decode_hello, peer_info
from tests.tdml_p2p.network_kit import CHAIN, QUICK, key, meshed, networks, until


async def test_everybody_finds_everybody_through_one_address() -> None:
    async with networks(6) as peers:
        await until(lambda: all(len(peer.peers()) == 5 for peer in peers))
        assert peers[5].peers() == tuple(sorted(peer.peer for peer in peers[:5]))


async def test_a_peer_that_leaves_is_missed_and_welcome_again() -> None:
    async with Network.open(QUICK, key(0), CHAIN) as network:
        async with Network.open(QUICK, key(1), CHAIN) as leaver:
            await leaver.connect(network.addresses[0])
            assert network.peers() == (leaver.peer,)
        await until(lambda: network.peers() == ())
        async with Network.open(QUICK, key(1), CHAIN) as again:
            await again.connect(network.addresses[0])
            await until(lambda: network.peers() == (again.peer,))


async def test_the_first_peer_may_start_last() -> None:
    async with Network.open(QUICK, key(0), CHAIN) as early:
        address = early.addresses[0]
    listen = (address.partition("/p2p/")[0],)
    config = replace(QUICK, bootstrap=(address,))
    async with (
        Network.open(config, key(1), CHAIN) as waiting,
        Network.open(replace(QUICK, listen=listen), key(0), CHAIN) as late,
    ):
        await until(lambda: waiting.peers() == (late.peer,))


async def test_peers_are_remembered_between_runs(tmp_path: Path) -> None:
    config = replace(QUICK, home=tmp_path)
    async with Network.open(QUICK, key(0), CHAIN) as network:
        async with Network.open(config, key(1), CHAIN) as first_run:
            await first_run.connect(network.addresses[0])
            await until(lambda: network.peer in (tmp_path / "peers.json").read_text())
        await until(lambda: network.peers() == ())
        async with Network.open(config, key(1), CHAIN) as second_run:
            await until(lambda: network.peers() == (second_run.peer,))


@pytest.mark.parametrize("content", ["", "{", '{"a": 1}', '["/ip4/1.2.3.4/tcp/1"]', "[1]"])
async def test_a_damaged_memory_is_no_obstacle(tmp_path: Path, content: str) -> None:
    (tmp_path / "peers.json").write_text(content)
    async with Network.open(replace(QUICK, home=tmp_path), key(0), CHAIN) as network:
        await until(lambda: (tmp_path / "peers.json").read_text() == "[]")
        assert network.peers() == ()


async def test_another_identity_at_the_address_is_refused() -> None:
    async with meshed(1) as (network,), Network.open(QUICK, key(1), CHAIN) as dialler:
        transport = network.addresses[0].partition("/p2p/")[0]
        with pytest.raises(ConnectFailed, match="cannot be reached"):
            await dialler.connect(f"{transport}/p2p/{peer_id(key(2).account)}")
        assert dialler.peers() == ()


@pytest.mark.parametrize(
    "address", ["", "nonsense", "/ip4/127.0.0.1/tcp/1", "/ip4/999.0.0.1/tcp/1/p2p/x", "/ip4/1.2.3.4/tcp/1/p2p/Qm"]
)
async def test_an_address_of_nobody_is_a_named_failure(address: str) -> None:
    async with Network.open(QUICK, key(0), CHAIN) as network:
        with pytest.raises(ConnectFailed, match="is not an address of a peer"):
            await network.connect(address)


async def test_a_dead_address_does_not_hide_a_live_one() -> None:
    async with meshed(1) as (network,), Network.open(QUICK, key(1), CHAIN) as dialler:
        with pytest.raises(ConnectFailed):
            await dialler.connect(f"/ip4/127.0.0.1/tcp/1/p2p/{network.peer}")
        assert await dialler.connect(network.addresses[0]) == network.peer


@given(st.binary(max_size=300))
def test_any_bytes_are_a_hello_or_a_value_error(data: bytes) -> None:
    try:
        hello = decode_hello(data)
    except ValueError:
        return
    assert isinstance(hello, Hello)


def test_an_address_keeps_its_identity() -> None:
    name = peer_id(key(0).account)
    info = peer_info(f"/ip4/10.0.0.1/tcp/4001/p2p/{name}")
    assert str(info.peer_id) == name
    assert info.addrs == [Multiaddr("/ip4/10.0.0.1/tcp/4001")]
