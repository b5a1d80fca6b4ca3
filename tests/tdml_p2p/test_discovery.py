"""Announcing and finding between real hosts."""

from dataclasses import replace

import pytest

from tdml_p2p.discovery import TakeRecords, _encoder
from tdml_p2p.host import Network
from tdml_p2p.records import RecordError, RecordReason, sign_record
from tdml_p2p.requests import RequestFailed
from tests.tdml_p2p.network_kit import CHAIN, QUICK, key, meshed, until

TASK = f"task/{'ab' * 32}"


async def test_a_newcomer_with_one_address_lists_everything() -> None:
    async with meshed(3) as peers:
        await peers[1].discovery.announce("tasks", b"first")
        await peers[2].discovery.announce("tasks", b"second")
        await peers[2].discovery.announce(f"{TASK}/stage/1", b"worker")
        config = replace(QUICK, bootstrap=(peers[0].addresses[0],))
        async with Network.open(config, key(9), CHAIN) as newcomer:
            await until(lambda: newcomer.peers() != ())
            found = {(record.peer, record.record) for record in await newcomer.discovery.find("tasks")}
            assert found == {(peers[1].peer, b"first"), (peers[2].peer, b"second")}
            stage = await newcomer.discovery.find(f"{TASK}/stage/1")
            assert [(record.peer, record.record) for record in stage] == [(peers[2].peer, b"worker")]
            assert await newcomer.discovery.find(TASK) == ()


async def test_a_newer_record_replaces_the_older_one() -> None:
    async with meshed(2) as (first, second):
        await first.discovery.announce("tasks", b"one")
        await first.discovery.announce("tasks", b"two")
        assert [record.record for record in await second.discovery.find("tasks")] == [b"two"]
        assert [record.record for record in await first.discovery.find("tasks")] == [b"two"]


async def test_the_dht_names_providers_beyond_the_neighbours() -> None:
    async with meshed(3) as peers:
        await peers[1].discovery.announce("tasks", b"far")
        assert await peers[2].discovery._providers("tasks") == [peers[1].peer]


async def test_records_in_the_name_of_others_are_refused_and_charged() -> None:
    async with meshed(2) as (first, second):
        forged = sign_record(key(5), "tasks", b"x", int(second.discovery._clock()), 600)
        message = _encoder.encode(TakeRecords((forged,)))
        with pytest.raises(RequestFailed) as failed:
            await second.request(first.peer, first.discovery._protocol, message, limit=64, timeout=5)
        assert failed.value.reason == RecordReason.BAD_PEER
        assert first.limits.penalty(second.peer) > 0
        assert await first.discovery.find("tasks") == ()


async def test_bad_keys_and_large_records_are_refused_here() -> None:
    async with meshed(1) as (peer,):
        with pytest.raises(RecordError):
            await peer.discovery.announce("anything", b"")
        with pytest.raises(RecordError):
            await peer.discovery.announce("tasks", bytes(5000))
        with pytest.raises(RecordError):
            await peer.discovery.find("anything")
