"""Peers that flood, stall, lie about lengths or break off: each costs one stream or connection at most."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

import pytest
import trio
from libp2p.peer.id import ID
from libp2p.pubsub.gossipsub import PROTOCOL_ID_V11
from libp2p.pubsub.pb import rpc_pb2
from multiaddr import Multiaddr

from tdml_p2p.host import Network
from tdml_p2p.limits import LimitConfig, Offence
from tdml_p2p.peers import ConnectFailed
from tdml_p2p.requests import RequestFailed, RequestReason
from tdml_p2p.streams import STREAM_ERRORS
from tests.tdml_p2p.network_kit import CHAIN, QUICK, key, meshed, until

ECHO = "/tdml/echo/1"


async def echo(_sender: str, data: bytes) -> bytes:
    await trio.lowlevel.checkpoint()
    return data


@asynccontextmanager
async def attacked() -> AsyncIterator[tuple[Network, Network]]:
    """Run a peer that serves `ECHO` and one that will misbehave; afterwards the first must still answer."""
    async with meshed(2) as (victim, attacker):
        victim.on_request(ECHO, echo, 1000)
        yield victim, attacker
        assert await attacker.request(victim.peer, ECHO, b"alive", limit=9, timeout=10) == b"alive"


def tcp_of(network: Network) -> tuple[str, int]:
    address = Multiaddr(network.addresses[0])
    return address.value_for_protocol("ip4"), int(address.value_for_protocol("tcp"))


@pytest.mark.parametrize(
    "sent",
    [b"", b"\x00", b"\xff\xff\xff\xff", b"\x00\x00\x00\x08half"],
    ids=["nothing", "part-of-length", "4-GiB", "half"],
)
async def test_a_broken_request_costs_one_stream(sent: bytes) -> None:
    async with attacked() as (victim, attacker):
        stream = await attacker.host.new_stream(ID.from_string(victim.peer), [ECHO])
        if sent:
            await stream.write(sent)
        await stream.reset()
        await until(lambda: victim.requests.refused.total() > 0)
        assert attacker.peers() == (victim.peer,)


async def test_streams_of_one_peer_are_limited() -> None:
    async with attacked() as (victim, attacker):
        held, before = [], victim.host._streams[attacker.peer]
        limit = victim.limits.config.streams
        while victim.limits.offences[Offence.TOO_MANY_STREAMS] == 0:
            stream = await attacker.host.get_network().new_stream(ID.from_string(victim.peer))
            held.append(stream)
            assert len(held) <= 2 * limit
        for stream in held:
            await stream.reset()
        await until(lambda: victim.host._streams[attacker.peer] == before)


async def test_a_request_that_drips_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tdml_p2p.requests.READ_SECONDS", 0.5)
    async with attacked() as (victim, attacker):
        stream = await attacker.host.new_stream(ID.from_string(victim.peer), [ECHO])
        began = trio.current_time()
        with suppress(*STREAM_ERRORS):
            for piece in b"\x00\x00\x03\xe8" + bytes(996):
                await stream.write(bytes([piece]))
                await trio.sleep(0.1)
        assert trio.current_time() - began < 5
        assert victim.requests.refused == {RequestReason.BROKEN: 1}


async def test_replies_that_nobody_reads_are_bounded_and_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    size, streams = 1 << 20, 6
    monkeypatch.setattr("tdml_p2p.requests.SERVE_SECONDS", 2.0)
    monkeypatch.setattr("tdml_p2p.requests.MAX_FLYING_BYTES_OF_ONE", 2 * size)
    monkeypatch.setattr("tdml_p2p.requests.MAX_FLYING_BYTES", 2 * size)
    most = 0

    async def large(_sender: str, _data: bytes) -> bytes:
        nonlocal most
        await trio.lowlevel.checkpoint()
        most = max(most, victim.requests.flying.total())
        return bytes(size)

    async with attacked() as (victim, attacker):
        victim.on_request("/tdml/large/1", large, 10)
        for _ in range(streams):
            stream = await attacker.host.new_stream(ID.from_string(victim.peer), ["/tdml/large/1"])
            await stream.write(bytes(4))
        await until(lambda: victim.requests.refused[RequestReason.BUSY] == streams - 2)
        assert most <= 2 * size + 100
        async with Network.open(QUICK, key(5), CHAIN) as other:
            await other.connect(victim.addresses[0])
            replies: list[int] = []

            async def ask() -> None:
                replies.append(len(await other.request(victim.peer, "/tdml/large/1", b"", limit=size, timeout=10)))

            async with trio.open_nursery() as nursery:  # more than one at a time, as right after two peers have met
                nursery.start_soon(ask)
                nursery.start_soon(ask)
            assert replies == [size, size]
        await until(lambda: not victim.requests.flying)


async def test_noise_on_the_socket_costs_that_socket() -> None:
    async with attacked() as (victim, _):
        for sent in (b"\x00" * 64, b"GET / HTTP/1.1\r\n\r\n", b"\x13/multistream/1.0.0\n\xff\xff\xff"):
            raw = await trio.open_tcp_stream(*tcp_of(victim))
            await raw.send_all(sent)
            await raw.aclose()


async def test_an_idle_socket_does_not_stop_others() -> None:
    async with attacked() as (victim, _):
        idle = [await trio.open_tcp_stream(*tcp_of(victim)) for _ in range(20)]
        async with Network.open(QUICK, key(5), CHAIN) as late:
            assert await late.connect(victim.addresses[0]) == victim.peer
        for raw in idle:
            await raw.aclose()


async def test_connections_that_ended_free_their_slots() -> None:
    config = replace(QUICK, max_connections=3)
    async with Network.open(config, key(0), CHAIN) as network:
        for _ in range(5):
            async with Network.open(QUICK, key(1), CHAIN) as visitor:
                await visitor.connect(network.addresses[0])
            await until(lambda: network.host.get_network()._inbound_limiter.borrowed_tokens == 0)


async def test_a_banned_peer_is_cut_off_and_kept_out() -> None:
    limits = LimitConfig(penalty_limit=30)
    async with (
        Network.open(replace(QUICK, limits=limits, round_seconds=60), key(0), CHAIN) as network,
        Network.open(replace(QUICK, round_seconds=60), key(1), CHAIN) as offender,
    ):
        await offender.connect(network.addresses[0])
        for _ in range(4):
            network.penalize(offender.peer, "false range")
        await until(lambda: not network.peers() and not offender.peers())
        assert network.limits.is_banned(offender.peer)
        with pytest.raises(ConnectFailed):
            await offender.connect(network.addresses[0])
        with pytest.raises(ConnectFailed, match="banned"):
            await network.connect(offender.addresses[0])


async def test_a_flood_of_requests_is_refused_by_name() -> None:
    limits = LimitConfig(requests=0.0001, requests_burst=8)
    config = replace(QUICK, limits=limits, round_seconds=60)
    async with (
        Network.open(config, key(0), CHAIN) as network,
        Network.open(replace(QUICK, round_seconds=60), key(1), CHAIN) as flooder,
    ):
        network.on_request(ECHO, echo, 10)
        await flooder.connect(network.addresses[0])
        with pytest.raises(RequestFailed) as failed:
            for _ in range(10):
                await flooder.request(network.peer, ECHO, b"", limit=9, timeout=5)
        assert failed.value.reason == RequestReason.TOO_MANY


def prefixed(rpc: bytes) -> bytes:
    return bytes([len(rpc) & 0x7F | 0x80, len(rpc) >> 7]) + rpc


@pytest.mark.parametrize(
    "sent",
    [b"\xff" * 12, b"\xff\xff\xff\x7f", prefixed(b"\xff" * 200)],
    ids=["endless-length", "256-MiB", "no-message"],
)
async def test_broken_gossip_costs_its_stream_and_is_charged(sent: bytes) -> None:
    async with attacked() as (victim, attacker):
        stream = await attacker.host.new_stream(ID.from_string(victim.peer), [PROTOCOL_ID_V11])
        await stream.write(sent)
        await until(lambda: victim.limits.offences[Offence.INVALID_MESSAGE] == 1)


async def test_gossip_tells_nobody_whom_to_dial() -> None:
    async with attacked() as (victim, attacker):
        dialled: list[str] = []
        victim.host.connect = dialled.append
        stranger = rpc_pb2.PeerInfo(peerID=ID.from_string(attacker.peer).to_bytes()[:-1] + b"x")
        prune = rpc_pb2.ControlPrune(topicID="vote", peers=[stranger])
        rpc = rpc_pb2.RPC(control=rpc_pb2.ControlMessage(prune=[prune]))
        seen: list[object] = []
        victim.gossip.router.handle_prune = seen_by(seen, victim.gossip.router.handle_prune)
        stream = await attacker.host.new_stream(ID.from_string(victim.peer), [PROTOCOL_ID_V11])
        await stream.write(prefixed(rpc.SerializeToString()))
        await until(lambda: len(seen) > 0)
        assert not dialled
        assert not any(message.peers for message in seen)


def seen_by(seen: list[Any], handler: Any) -> Any:
    async def handle(prune: Any, sender: Any) -> None:
        seen.append(prune)
        await handle(prune, sender)

    return handle
