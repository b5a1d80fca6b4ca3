"""A run in bf16: its workers are of the client's kernel class, other machines judge it only from afar."""

import shutil
from pathlib import Path

import pytest
import trio
from processes_kit import (
    PATIENCE,
    Swarm,
    client,
    events_on_chain,
    finished,
    losses,
    network,
    printed,
    training,
    undisturbed,
)

from chain.queries import open_reader
from chain.state import Table

pytestmark = [pytest.mark.slow, pytest.mark.trio]

UNLIKE = {"ONEDNN_MAX_CPU_ISA": "AVX2"}
MACHINES = {0: ((), UNLIKE), 3: ((), UNLIKE), 4: ((), {})}
DISPUTES = {"disputed", "convicted", "acquitted", "faulted", "evicted", "slashed", "charged"}


async def test_unlike_machines_get_no_seat_and_nobody_is_disputed(tmp_path: Path) -> None:
    train = training(tmp_path, steps=8, precision="bf16", replicas=1)
    events: list[dict[str, object]] = []
    async with network(tmp_path / "network", 5, 3, MACHINES) as swarm, client(swarm, train) as running:
        seen: list[dict[str, str]] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_declines, swarm, seen)
            with trio.fail_after(2 * PATIENCE):
                assert await finished(running, events) == 0, running.log.read_text()[-2000:]
            nursery.cancel_scope.cancel()
        assert [row["reason"] for row in seen if "kernel class" in row["reason"]]
        shutil.copytree(train.out, tmp_path / "left")
    assert losses(events) == undisturbed(train)
    ended = {kind for kind, _ in events_on_chain(train.out / "chain.db")}
    assert "passed" in ended
    assert not DISPUTES & ended
    audits = open_reader(tmp_path / "left" / "chain.db").state.tables[Table.AUDITS].values()
    told = {audit.reveal.other_kernel for audit in audits if audit.reveal is not None}
    assert told == {True, False}


async def _declines(swarm: Swarm, seen: list[dict[str, str]]) -> None:
    """Collect why the unlike worker takes no seat."""
    while not seen:
        await trio.sleep(0.5)
        seen += (await printed("cli.peer", "status", "--home", str(swarm.home(3)), "--json"))["declined"]
