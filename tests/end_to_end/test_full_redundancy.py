"""Every cell on three real peers: one of them cheats, is outvoted, convicted, and not one step is poisoned."""

from pathlib import Path
from typing import Any

import pytest
import trio
from processes_kit import PATIENCE, client, events_on_chain, finished, losses, network, training, undisturbed

from chain.keys import peer_id
from tdml_p2p.home import Home

pytestmark = [pytest.mark.slow, pytest.mark.trio]


async def test_a_cheat_among_three_is_outvoted_and_convicted_and_no_step_is_poisoned(tmp_path: Path) -> None:
    train = training(tmp_path, steps=10, replicas=3, redundancy=3)
    events: list[dict[str, Any]] = []
    cheats = {6: ("--attack", "sign-flip", "--from-step", "3")}
    async with network(tmp_path / "network", 7, 6, cheats=cheats) as swarm, client(swarm, train) as running:
        with trio.fail_after(2 * PATIENCE):
            assert await finished(running, events) == 0, running.log.read_text()[-2000:]
        cheat = peer_id(Home(swarm.home(6)).load_key().account)
    clean = undisturbed(train)
    assert losses(events) == clean
    # also in the steps that were done before the conviction, and again after it
    for event in events:
        if event["event"] == "step":
            assert event["loss"] == clean[event["step"] - 1]
    outvoted = [event for event in events if event["event"] == "outvoted"]
    assert {event["peer"] for event in outvoted} == {cheat}
    assert min(event["step"] for event in outvoted) == 3
    chain = events_on_chain(train.out / "chain.db")
    assert [data["worker"] for kind, data in chain if kind == "evicted"] == [cheat]
    assert cheat in [data["worker"] for kind, data in chain if kind == "watched"]
    claims = [data for kind, data in chain if kind == "claimed" and data["step"] == 1]
    assert len(claims) in (6, 6 + 5)  # again by those who are left where the step had not settled yet
    assert all(data["cells"] == [0, 1, 2, 3] for data in claims)
