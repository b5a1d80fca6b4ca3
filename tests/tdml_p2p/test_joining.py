"""A peer that joins a running task: it computes verified cells first, takes a verified state, and then its share."""

from pathlib import Path
from typing import Any

import pytest
import trio
from train_kit import Client, settings, swarm, worker

from tdml_p2p.peer import open_peer

pytestmark = [pytest.mark.trio, pytest.mark.slow]


async def test_a_newcomer_knows_the_answers_of_verified_cells_before_it_takes_part(tmp_path: Path) -> None:
    # far more steps than it takes: the run is cut short once the newcomer has done what is asked for
    train = settings(tmp_path, steps=400, stages=1, replicas=2, microbatches=2, audit_rate=1.0, save_every=0)
    under_way = trio.Event()

    def on_event(client: Client, event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 4:
            under_way.set()

    async with swarm(tmp_path, workers=1) as (founder, *_), trio.open_nursery() as nursery:
        client = Client(train, founder.invite, on_event)
        nursery.start_soon(client.run)
        await under_way.wait()
        async with open_peer(worker(tmp_path, 7, founder.invite)) as newcomer:
            assert newcomer.swarm is not None
            [task] = client.of("posted", "task")
            done: dict[str, int] = {}
            while not done.get("steps"):
                done = newcomer.swarm.progress(bytes.fromhex(task))
                await trio.sleep(0.02)
            assert done["known_answers"] >= 1
            assert newcomer.name in client.of("joined", "peer")
            nursery.cancel_scope.cancel()
    assert not client.of("evicted", "peer")
