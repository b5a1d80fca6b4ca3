"""Slow links between peers on one machine: a network namespace each, joined by a switch in this process.

Every namespace has one TUN device. The switch reads packets, holds each for as long as the sender's uplink, the delay
and the receiver's downlink take, and writes it to the receiver. Needs root, `ip` and /dev/net/tun.
"""

import fcntl
import heapq
import os
import shutil
import struct
import subprocess
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

_TUNSETIFF, _TUN, _NO_INFO = 0x400454CA, 0x0001, 0x1000
_MTU = 9000
_QUEUE_SECONDS = 1.0
_DEVICE = "/dev/net/tun"


@dataclass(frozen=True)
class Link:
    """What lies between any two peers: bits per second up and down, seconds one way; 0 is no limit."""

    rate: float = 0.0
    delay: float = 0.0


def why_not() -> str:
    """Return why links cannot be made here, or nothing."""
    if os.geteuid() or shutil.which("ip") is None or not os.access(_DEVICE, os.R_OK | os.W_OK):
        return "needs root, the command ip and /dev/net/tun"
    return ""


class Switch:
    """The links of `count` peers, by index."""

    def __init__(self, count: int, link: Link) -> None:
        self.sent: Counter[int] = Counter()
        self.received: Counter[int] = Counter()
        self.dropped = 0
        self.count = count
        self._link = link
        self._names = [f"tdml-{os.getpid()}-{index}" for index in range(count)]
        self._devices: list[int] = []
        self._up = [0.0] * count
        self._down = [0.0] * count
        self._waiting: list[tuple[float, int, int, bytes]] = []
        self._passed = 0
        self._woken = trio.Event()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Make the namespaces, carry packets, and remove everything at the end."""
        try:
            for index, name in enumerate(self._names):
                self._devices.append(_join(name, self.address(index)))
            async with trio.open_nursery() as nursery:
                for index in range(len(self._devices)):
                    nursery.start_soon(self._read, index)
                nursery.start_soon(self._deliver)
                yield
                nursery.cancel_scope.cancel()
        finally:
            self._remove()

    def _remove(self) -> None:
        for device in self._devices:
            os.close(device)
        for name in self._names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)

    def namespace(self, index: int) -> str:
        """Return the name of a peer's namespace."""
        return self._names[index]

    def address(self, index: int) -> str:
        """Return the address of a peer."""
        return f"10.77.0.{index + 1}"

    async def _read(self, index: int) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._devices[index])
            while packet := _packet(self._devices[index]):
                to = packet[19] - 1 if packet[0] >> 4 == 4 else -1
                if 0 <= to < len(self._devices):
                    self._pass(index, to, packet)

    def _pass(self, sender: int, to: int, packet: bytes) -> None:
        now, size = trio.current_time(), len(packet)
        seconds = 8 * size / self._link.rate if self._link.rate else 0.0
        if self._up[sender] - now > _QUEUE_SECONDS:
            self.dropped += 1
            return
        self.sent[sender] += size
        self.received[to] += size
        self._up[sender] = max(now, self._up[sender]) + seconds
        # what comes from several peers at once shares the way down
        self._down[to] = max(self._up[sender] + self._link.delay, self._down[to] + seconds)
        self._passed += 1
        heapq.heappush(self._waiting, (self._down[to], self._passed, to, packet))
        self._woken.set()

    async def _deliver(self) -> None:
        while True:
            while not self._waiting or self._waiting[0][0] > trio.current_time():
                self._woken = trio.Event()
                with trio.move_on_at(self._waiting[0][0] if self._waiting else float("inf")):
                    await self._woken.wait()
            _, _, to, packet = heapq.heappop(self._waiting)
            try:
                os.write(self._devices[to], packet)
            except OSError:  # the device's queue is full, as a link's may be
                self.dropped += 1


def _packet(device: int) -> bytes:
    try:
        return os.read(device, _MTU)
    except BlockingIOError:
        return b""


def _join(name: str, address: str) -> int:
    """Make a namespace with a TUN device of that address; return the device's other end."""
    device = os.open(_DEVICE, os.O_RDWR | os.O_NONBLOCK)
    inner = f"tdml{name.rpartition('-')[2]}p{os.getpid() % 10**6}"[:15]
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", inner.encode(), _TUN | _NO_INFO))
    for command in (
        f"ip netns add {name}",
        f"ip link set {inner} netns {name}",
        f"ip -n {name} addr add {address}/24 dev {inner}",
        f"ip -n {name} link set {inner} mtu {_MTU} up",
        f"ip -n {name} link set lo up",
    ):
        subprocess.run(command.split(), check=True, capture_output=True)
    return device
