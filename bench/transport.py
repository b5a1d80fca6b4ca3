"""Speed of `/tdml/tensor/2` against a bare libp2p stream, between two processes on 127.0.0.1.

Prints one JSON object: megabytes per second (10^6) of one-way transfer for several sizes of message, by
tensor frames, by a bare stream of the same host, and by a bare stream of libp2p's own host with Noise, each
with the processor seconds of both processes for 10^9 bytes, the same of blobs that are fetched by their address;
and the milliseconds of a small request and its reply. The other process is this file with `--serve`.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import trio
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.peer.id import ID
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as NoiseTransport

from chain.keys import PrivateKey
from tdml_p2p.host import Network, NetworkConfig
from tdml_p2p.peers import peer_info
from tdml_p2p.streams import READ_BYTES, WRITE_BYTES, StreamEnded, read_exactly, read_some
from tdml_p2p.tensors import Frame
from trainer.content import address_of

CHAIN = bytes(32)
SESSION = bytes(range(32))
RAW = "/bench/raw/1"
ECHO = "/bench/echo/1"
_LENGTH = 8
_MOST_BLOBS = 128
"""Fetched in a round: a peer answers no more than 200 requests a second of another, after a burst."""


def stock_host(seed: bytes) -> Any:
    """Return libp2p's own host with Noise only."""
    pair = create_new_key_pair(seed)
    noise = NoiseTransport(pair, noise_privkey=create_noise_key_pair().private_key)
    return new_host(key_pair=pair, sec_opt={NOISE: noise})


async def absorb(stream: Any) -> None:
    """Read announced lengths of bytes and acknowledge each."""
    try:
        while True:
            left = int.from_bytes(await read_exactly(stream, _LENGTH), "big")
            while left:
                left -= len(await read_some(stream, min(left, READ_BYTES)))
            await stream.write(b"\1")
    except StreamEnded:
        return


async def echo(_sender: str, data: bytes) -> bytes:
    """Answer with the request."""
    return data


def blob(size: int) -> bytes:
    """Return bytes of which no chunk is like another."""
    return random.Random(size).randbytes(size)


async def serve(sizes: list[int]) -> None:
    """Take everything until standard input closes; acknowledge every tensor frame with a small one."""
    stock = stock_host(bytes([4]) * 32)
    config = NetworkConfig()
    async with stock.run([_address()]), Network.open(config, PrivateKey(bytes([2]) * 32), CHAIN) as network:
        network.host.set_stream_handler(RAW, absorb)
        stock.set_stream_handler(RAW, absorb)
        network.on_request(ECHO, echo, 1 << 20)
        for size in sizes:
            await network.blobs.put(blob(size))
        frames = network.tensors.open_session(SESSION)
        addresses = {"network": network.addresses[0], "stock": str(stock.get_addrs()[0])}
        print(json.dumps(addresses), flush=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_until_input_ends, nursery.cancel_scope)
            async for frame in frames:
                if isinstance(frame, Frame):
                    await network.tensors.send(frame.sender, SESSION, b"", [], 30)


async def _until_input_ends(scope: trio.CancelScope) -> None:
    async with trio.lowlevel.FdStream(os.dup(sys.stdin.fileno())) as stdin:
        while await stdin.receive_some():
            continue
    scope.cancel()


def _address() -> Any:
    from multiaddr import Multiaddr

    return Multiaddr("/ip4/127.0.0.1/tcp/0")


async def raw_speed(host: Any, peer: Any, size: int, count: int) -> float:
    """Return the MB/s of `count` messages of `size` bytes over one bare stream."""
    stream = await host.new_stream(peer, [RAW])
    data = bytes(size)
    await _send_raw(stream, data)
    start = trio.current_time()
    for _ in range(count):
        await _send_raw(stream, data)
    seconds = trio.current_time() - start
    await stream.close()
    return size * count / seconds / 1e6


async def _send_raw(stream: Any, data: bytes) -> None:
    await stream.write(len(data).to_bytes(_LENGTH, "big"))
    for start in range(0, len(data), WRITE_BYTES):
        await stream.write(data[start : start + WRITE_BYTES])
    await read_exactly(stream, 1)


async def tensor_speed(network: Network, frames: Any, peer: str, size: int, count: int) -> float:
    """Return the MB/s of `count` frames with a tensor of `size` bytes each, every one acknowledged."""
    data = memoryview(bytearray(size))

    async def one() -> None:
        await network.tensors.send(peer, SESSION, b"header", [data], 60)
        await frames.receive()

    await one()
    start = trio.current_time()
    for _ in range(count):
        await one()
    return size * count / (trio.current_time() - start) / 1e6


async def blob_speed(network: Network, peer: str, address: bytes, size: int, count: int) -> float:
    """Return the MB/s of fetching a blob `count` times."""
    await network.blobs.fetch(address, [peer])
    start = trio.current_time()
    for _ in range(count):
        await network.blobs.fetch(address, [peer])
    return size * count / (trio.current_time() - start) / 1e6


async def request_milliseconds(network: Network, peer: str, count: int) -> float:
    """Return the median time of a 64-byte request and its reply."""
    taken = []
    for _ in range(count):
        start = trio.current_time()
        await network.request(peer, ECHO, bytes(64), limit=64, timeout=10)
        taken.append((trio.current_time() - start) * 1000)
    return statistics.median(taken)


async def measure(addresses: dict[str, str], sizes: list[int], total: int, rounds: int, pid: int) -> dict[str, Any]:
    """Return the figures against a serving process; of several rounds the fastest counts."""
    result: dict[str, Any] = {"rounds": rounds, "sizes": {}}
    stock, stock_info = stock_host(bytes([3]) * 32), peer_info(addresses["stock"])
    async with stock.run([]), Network.open(NetworkConfig(), PrivateKey(bytes([1]) * 32), CHAIN) as network:
        peer = await network.connect(addresses["network"])
        await stock.connect(stock_info)
        frames = network.tensors.open_session(SESSION)
        for size in sizes:
            count = max(1, total // size)
            counts = dict.fromkeys(("raw", "tensor", "stock"), count) | {"blob": min(count, _MOST_BLOBS)}
            ways: dict[str, Callable[[], Awaitable[float]]] = {
                "raw": partial(raw_speed, network.host, ID.from_string(peer), size, count),
                "tensor": partial(tensor_speed, network, frames, peer, size, count),
                "stock": partial(raw_speed, stock, stock_info.peer_id, size, count),
                "blob": partial(blob_speed, network, peer, address_of(blob(size)), size, counts["blob"]),
            }
            speeds, used = await _alternate(ways, rounds, pid)
            best = {name: round(max(values), 1) for name, values in speeds.items()}
            # a message more than are counted warms up
            sent = {name: rounds * size * (number + 1) / 1e9 for name, number in counts.items()}
            result["sizes"][str(size)] = {
                **best,
                "tensor_over_raw": round(best["tensor"] / best["raw"], 3),
                "cpu_seconds_per_gb": {name: round(seconds / sent[name], 2) for name, seconds in used.items()},
            }
        result["request_ms"] = round(await request_milliseconds(network, peer, 200), 2)
    return result


async def _alternate(
    ways: "dict[str, Callable[[], Awaitable[float]]]", rounds: int, pid: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Return the speeds of each way in every round, and the processor seconds of both processes."""
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    used = dict.fromkeys(ways, 0.0)
    for _ in range(rounds):
        for name, once in ways.items():
            before = time.process_time() + _processor_seconds(pid)
            speeds[name].append(await once())
            used[name] += time.process_time() + _processor_seconds(pid) - before
    return speeds, used


def _processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Run the benchmark, or serve it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON, as is always done")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64 << 10, 1 << 20, 16 << 20])
    parser.add_argument("--total", type=int, default=128 << 20, help="bytes sent per round and size")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.serve:
        trio.run(serve, options.sizes)
        return
    sizes = [str(size) for size in options.sizes]
    command = [sys.executable, "-m", "bench.transport", "--serve", "--sizes", *sizes]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        addresses = json.loads(child.stdout.readline())
        print(json.dumps(trio.run(measure, addresses, options.sizes, options.total, options.rounds, child.pid)))
    finally:
        child.stdin.close()
        child.wait(timeout=30)


if __name__ == "__main__":
    main()
