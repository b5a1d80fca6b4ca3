"""A client that vanishes: seats are kept for it as long as their peers have set, and then given back."""

from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
from train_kit import Client, settings, swarm, worker

from tdml_p2p.peer import open_peer

pytestmark = [pytest.mark.trio, pytest.mark.slow]


@pytest.mark.parametrize(("grace", "is_kept"), [(2, False), (600, True)])
async def test_a_seat_is_kept_for_the_grace_period_and_then_left(tmp_path: Path, grace: int, is_kept: bool) -> None:
    def kill(client: Client, event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 2:
            client.crash()

    async with swarm(tmp_path, workers=0) as (founder,), AsyncExitStack() as stack:
        for index in range(2):
            kept = replace(worker(tmp_path, index, founder.invite), grace=grace)
            await stack.enter_async_context(open_peer(kept))
        client = Client(settings(tmp_path, steps=9, save_every=0), founder.invite, kill)
        assert await client.run() is None
        [task] = client.of("posted", "task")

        def seated() -> int:
            return sum(one.is_seated for one in founder.engine.state.workers(bytes.fromhex(task)))

        with trio.move_on_after(8 if is_kept else 60) as waiting:
            while seated():
                await founder.next_block()
        assert waiting.cancelled_caught is is_kept
        assert seated() == (2 if is_kept else 0)
