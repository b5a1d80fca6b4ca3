"""A swarm of unlike machines: instruction sets, matrix products, threads, memory. Nobody honest is even suspected."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import trio
from processes_kit import PATIENCE, client, events_on_chain, finished, losses, network, training, undisturbed

pytestmark = [pytest.mark.slow, pytest.mark.trio]

MACHINES = {
    1: ((), {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41"}),
    2: (("--threads", "2"), {}),
    3: ((), {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}),
    4: (("--threads", "1"), {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}),
    5: (("--memory", "65536"), {}),
}
DISPUTES = {"disputed", "opinion", "ballot", "faulted", "undecided", "convicted", "acquitted", "evicted", "slashed"}


async def test_unlike_machines_train_the_same_model_and_agree_in_audits(tmp_path: Path) -> None:
    train = training(tmp_path, steps=12)
    events: list[dict[str, Any]] = []
    async with network(tmp_path / "network", 6, 5, MACHINES) as swarm, client(swarm, train) as running:
        with trio.fail_after(2 * PATIENCE):
            assert await finished(running, events) == 0, running.log.read_text()[-2000:]
        kernels = {row["kernel"] for row in await trio.to_thread.run_sync(swarm.ask, 0, "workers")}
        too_small = swarm.network.peers[5]
    [formed] = [event for event in events if event["event"] == "formed"]
    assert too_small not in [peer for stage in formed["stages"] for peer in stage]
    assert losses(events) == pytest.approx(undisturbed(train), rel=1e-5)
    ended = Counter(kind for kind, _ in events_on_chain(train.out / "chain.db"))
    assert not DISPUTES.intersection(ended)
    assert ended["passed"] >= 12
    assert len(kernels) > 1, "the machines are alike"
