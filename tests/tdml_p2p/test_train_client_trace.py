"""`train --trace`: one file of what every peer of a real network did."""

import json
from pathlib import Path

import pytest
from train_kit import Client, settings, swarm

pytestmark = [pytest.mark.trio, pytest.mark.slow]


async def test_a_run_over_a_network_leaves_a_trace_of_all_its_cells(tmp_path: Path) -> None:
    path = tmp_path / "traces" / "run.json"
    train = settings(tmp_path, steps=4, compress="int8", trace=path)
    async with swarm(tmp_path) as peers:
        client = Client(train, peers[0].invite)
        assert await client.run() == 0
        workers = [peer.name for peer in peers[1:]]
    events = json.loads(path.read_text())["traceEvents"]
    names = {event["args"]["name"]: event["pid"] for event in events if event["name"] == "process_name"}
    assert {name.split()[-1] for name in names} >= set(workers)
    cells = {(step, cell) for step in range(1, 5) for cell in range(train.microbatches)}
    for stage in range(2):
        (pid,) = (pid for name, pid in names.items() if name.startswith(f"stage {stage} "))
        lanes = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name" and e["pid"] == pid}
        spans = [e for e in events if e["ph"] == "X" and e["pid"] == pid]
        for name in ("forward", "backward", "encrypt and write", "verify"):
            found = {(e["args"].get("step"), e["args"].get("cell")) for e in spans if e["name"] == name}
            assert name == "encrypt and write" or found >= cells, name
            assert found
        assert {lanes[e["tid"]] for e in spans if e["name"] == "forward"} == {"compute"}
        assert {"worker", "receive", "claims"} <= set(lanes.values())
    assert [e["args"]["step"] for e in events if e["name"] == "step"] == [1, 2, 3, 4]
