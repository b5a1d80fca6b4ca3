"""Peers that die where it might look like fraud: after their commitment to an audit, and when their disk is full."""

import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from processes_kit import (
    LOCAL,
    PATIENCE,
    Swarm,
    client,
    events_on_chain,
    finished,
    losses,
    network,
    training,
    undisturbed,
)

from tdml_p2p.demo.processes import Child
from tdml_p2p.errors import FAILED

pytestmark = [pytest.mark.slow, pytest.mark.end_to_end, pytest.mark.trio]
PUNISHMENTS = {"convicted", "slashed", "charged", "evicted", "equivocation"}
AUDITOR = 5
"""A peer that takes no seat."""
_NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount")
_DISK = "24m"


async def test_an_auditor_killed_between_commit_and_reveal_costs_nobody_anything(tmp_path: Path) -> None:
    train = training(tmp_path, steps=14)
    events: list[dict[str, Any]] = []
    dying = {AUDITOR: "tests.end_to_end.dying_auditor"}
    async with network(tmp_path / "network", 6, 4, modules=dying) as swarm, client(swarm, train) as running:
        with trio.fail_after(2 * PATIENCE):
            code = await finished(running, events)
        assert await swarm.peers[AUDITOR].process.wait() == -signal.SIGKILL
    assert code == 0, running.log.read_text()[-2000:]
    assert losses(events) == pytest.approx(undisturbed(train), rel=1e-4)
    happened = events_on_chain(train.out / "chain.db")
    assert not PUNISHMENTS & {kind for kind, _ in happened}
    victim = swarm.network.peers[AUDITOR]
    committed = {data["audit"] for kind, data in happened if kind == "committed" and data["by"] == victim}
    missed = {data["audit"] for kind, data in happened if kind == "absent" and data["peer"] == victim}
    assert committed & missed


@asynccontextmanager
async def on_a_small_disk(swarm: Swarm, index: int) -> AsyncIterator[Child]:
    """Run a peer whose home is a file system of its own that only it sees."""
    home = swarm.home(index)
    start = f"{sys.executable} -m cli.peer start --home {home} --join {swarm.invite} {' '.join(LOCAL)}"
    script = f"""
        cp -a {home} {home}.before && mount -t tmpfs -o size={_DISK} none {home} || exit 77
        cp -a {home}.before/. {home} && exec {start}
    """
    log = swarm.folder / "small.txt"
    with log.open("wb") as stderr:
        process = await trio.lowlevel.open_process(
            [*_NAMESPACE, "sh", "-c", script], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr
        )
    running = Child("small", process, log)
    try:
        await running.expect("ready", PATIENCE)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(running.drain)
            yield running
            nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            await running.stop()
            assert process.stdout is not None
            await process.stdout.aclose()


async def at_work(running: Child, events: list[dict[str, Any]], name: str) -> None:
    """Collect events until a step is done since a peer is one of the workers."""
    is_worker = False
    async for event in running.events():
        events.append(event)
        is_formed = event["event"] == "formed" and any(name in stage for stage in event["stages"])
        is_worker = is_worker or is_formed or (event["event"], event.get("peer")) == ("joined", name)
        if is_worker and event["event"] == "step":
            return
    raise AssertionError(f"it has had no work: {running.log.read_text()[-2000:]}")


def fill(running: Child, home: Path) -> None:
    """Leave no byte of a peer's disk: from outside, as another program on its machine would."""
    with (Path(f"/proc/{running.process.pid}/root{home}") / "filler").open("wb", buffering=0) as filler:
        try:
            while filler.write(bytes(4096)):
                pass
        except OSError as error:
            assert "No space left" in str(error)


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare")
async def test_a_worker_whose_disk_is_full_loses_its_seat_at_most(tmp_path: Path) -> None:
    if (await trio.run_process([*_NAMESPACE, "true"], capture_stderr=True, check=False)).returncode:
        pytest.skip("this machine has no user namespaces")
    train = training(tmp_path, steps=24)
    events: list[dict[str, Any]] = []
    others = network(tmp_path / "network", peers=5, workers=4, apart={4})
    async with others as swarm, on_a_small_disk(swarm, 4) as small, client(swarm, train) as running:
        with trio.fail_after(2 * PATIENCE):
            await at_work(running, events, swarm.network.peers[4])
        fill(small, swarm.home(4))
        with trio.fail_after(2 * PATIENCE):
            assert await small.process.wait() == FAILED
            code = await finished(running, events)
    assert code == 0, running.log.read_text()[-2000:]
    assert "error: The disk is full." in small.log.read_text()
    assert losses(events) == pytest.approx(undisturbed(train), rel=1e-4)
    assert not PUNISHMENTS & {kind for kind, _ in events_on_chain(train.out / "chain.db")}
