"""Peers in other processes that are killed or frozen: losses are told, and shutdown does not wait for them."""

import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

import pytest
import trio

from tdml_p2p.blob_transfer import PROTOCOL
from tdml_p2p.host import Network
from tdml_p2p.requests import RequestFailed, RequestReason
from tdml_p2p.tensors import LinkLost, PeerLost, SendTimeout, TensorConfig
from tests.tdml_p2p.network_kit import CHAIN, QUICK, key, until
from tests.tdml_p2p.remote_peer import SESSION

CONFIG = replace(QUICK, round_seconds=60.0, tensors=TensorConfig(window=64 << 20))

pytestmark = pytest.mark.slow


@asynccontextmanager
async def remote() -> AsyncIterator[tuple[trio.Process, str]]:
    async with trio.open_nursery() as nursery:
        command = [sys.executable, "-m", "tests.tdml_p2p.remote_peer", "7"]
        process = await nursery.start(
            partial(trio.run_process, command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
        )
        address = b""
        while not address.endswith(b"\n"):
            address += await process.stdout.receive_some()
        try:
            yield process, address.decode().strip()
        finally:
            process.kill()
            await process.stdout.aclose()


async def test_a_killed_peer_is_lost_in_the_middle_of_a_frame() -> None:
    async with remote() as (process, address), Network.open(CONFIG, key(0), CHAIN) as network:
        peer = await network.connect(address)
        events = network.tensors.open_session(SESSION)
        await network.tensors.send(peer, SESSION, b"", [], 10)

        async def kill() -> None:
            await until(lambda: network.tensors._links[peer].credit < 32 << 20)
            process.kill()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(kill)
            with pytest.raises(PeerLost):
                for _ in range(8):
                    await network.tensors.send(peer, SESSION, b"", [memoryview(bytes(32 << 20))], 20)
        assert await events.receive() == LinkLost(peer)
        await until(lambda: network.peers() == ())
        with pytest.raises(PeerLost):
            await network.tensors.send(peer, SESSION, b"", [], 5)
        with pytest.raises(RequestFailed) as failed:
            await network.request(peer, PROTOCOL, b"", limit=10, timeout=5)
        assert failed.value.reason == RequestReason.UNREACHABLE


async def test_a_frozen_peer_times_out_and_does_not_hold_up_the_end() -> None:
    async with remote() as (process, address):
        with trio.CancelScope() as patience:
            async with Network.open(CONFIG, key(0), CHAIN) as network:
                peer = await network.connect(address)
                await network.tensors.send(peer, SESSION, b"", [], 10)
                process.send_signal(signal.SIGSTOP)
                with pytest.raises(RequestFailed) as failed:
                    await network.request(peer, PROTOCOL, b"", limit=10, timeout=0.3)
                assert failed.value.reason == RequestReason.TIMEOUT
                with pytest.raises(SendTimeout):
                    await network.tensors.send(peer, SESSION, b"", [memoryview(bytes(32 << 20))], 0.5)
                patience.deadline = trio.current_time() + 5
        assert not patience.cancelled_caught
