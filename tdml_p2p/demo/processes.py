"""Child processes of the demonstration: started, read line by line, and always ended."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from tdml_p2p.errors import UserError

_GRACE_SECONDS = 10.0


class ChildFailed(UserError):
    """A child process that ended, or said nothing, when it should have served."""

    def __init__(self, name: str, problem: str, log: Path) -> None:
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        super().__init__(
            f"{name} {problem}: {lines[-1] if lines else 'it said nothing'}", "see its log beside the model"
        )


class Child:
    """One running Python child that prints JSON lines on stdout and logs into a file."""

    def __init__(self, name: str, process: trio.Process, log: Path) -> None:
        self.name = name
        self.process = process
        self.log = log
        self._buffer = b""

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """Yield the JSON objects that the child prints until it closes its output."""
        assert self.process.stdout is not None
        while True:
            while b"\n" in self._buffer:
                line, self._buffer = self._buffer.split(b"\n", 1)
                if line.strip():
                    yield json.loads(line)
            chunk = await self.process.stdout.receive_some(65536)
            if not chunk:
                return
            self._buffer += chunk

    async def drain(self) -> None:
        """Read and drop what the child prints until it closes its output."""
        assert self.process.stdout is not None
        while await self.process.stdout.receive_some(65536):
            pass

    async def expect(self, event: str, seconds: float) -> dict[str, Any]:
        """Return the first event of that name; raise `ChildFailed` when none comes in time."""
        with trio.move_on_after(seconds):
            async for found in self.events():
                if found.get("event") == event:
                    return found
        raise ChildFailed(self.name, f"printed no {event!r} event", self.log)

    async def stop(self) -> None:
        """End the child: politely first, by force after a grace period."""
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
            with trio.move_on_after(_GRACE_SECONDS):
                await self.process.wait()
        if self.process.returncode is None:
            self.process.kill()
            await self.process.wait()


async def stop_all(children: Sequence[Child]) -> None:
    """End the processes together: one after the other, the last would wait for all graces before its own."""
    async with trio.open_nursery() as nursery:
        for one in children:
            nursery.start_soon(one.stop)


@asynccontextmanager
async def child(
    name: str, module: str, arguments: Sequence[str], log: Path, variables: Mapping[str, str] | None = None
) -> AsyncIterator[Child]:
    """Run `python -m module arguments`, with these variables in its environment, and stop it on leaving the block."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} | dict(variables or {})
    with log.open("ab") as stderr:
        process = await trio.lowlevel.open_process(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=environment,
            start_new_session=True,
        )
    running = Child(name, process, log)
    try:
        yield running
    finally:
        with trio.CancelScope(shield=True):
            await running.stop()
            if process.stdout is not None:
                await process.stdout.aclose()
