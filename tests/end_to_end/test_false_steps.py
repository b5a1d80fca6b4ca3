"""Workers whose cells are right and whose optimiser's steps are not, in real processes: evicted, and nobody else."""

from pathlib import Path

import pytest
import trio
from processes_kit import PATIENCE, client, events_on_chain, finished, losses, network, training, undisturbed

pytestmark = [pytest.mark.slow, pytest.mark.trio]


@pytest.mark.parametrize("attack", ["false-step", "false-sum"])
async def test_who_alters_its_optimisers_steps_is_evicted_and_the_run_ends_as_without_it(
    tmp_path: Path, attack: str
) -> None:
    train = training(tmp_path, steps=16)
    cheats = {1: ("--attack", attack, "--from-step", "4")}
    events: list[dict[str, object]] = []
    peers = network(tmp_path / "network", peers=5, workers=4, cheats=cheats)
    async with peers as swarm, client(swarm, train) as running:
        with trio.fail_after(4 * PATIENCE):
            code = await finished(running, events)
    assert code == 0, running.log.read_text()[-2000:]
    chain = events_on_chain(train.out / "chain.db")
    evicted = {str(data["worker"]) for kind, data in chain if kind == "evicted"}
    assert evicted == {swarm.network.peers[1]}
    assert not [data for kind, data in chain if kind == "charged"]
    assert losses(events) == pytest.approx(undisturbed(train), rel=1e-4)
