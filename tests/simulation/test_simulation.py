"""Seeded runs with less than a third of the stake faulty: no fork, nobody stuck, nobody honest accused."""

import pytest

from tests.simulation.runs import Run, crash_points, judged
from tests.simulation.scenario import BEHAVIOURS, MODES
from tests.simulation.world import World

CHUNK = 25
RUNS = {"mixed": 3_500, "byzantine": 1_000, "silent": 100, "halt": 50, "split": 50, "lossy": 50, "slow": 50}
CRASH_SEEDS = 16


def chunks() -> list[tuple[str, int]]:
    """The first seed of each chunk of runs, by mode."""
    return [(mode, first) for mode, runs in RUNS.items() for first in range(0, runs, CHUNK)]


@pytest.mark.parametrize(("mode", "first"), chunks())
def test_no_fork_nobody_stuck_nobody_honest_accused(mode: str, first: int) -> None:
    broken = [verdict for seed in range(first, first + CHUNK) if (verdict := judged(Run(mode, seed))).faults]
    assert not broken, "\n".join(map(str, broken))


@pytest.mark.parametrize("seed", range(CRASH_SEEDS))
def test_a_death_before_or_after_any_durable_write_does_no_harm(seed: int) -> None:
    runs = list(crash_points(seed))
    assert len(runs) >= 6
    broken = [verdict for run in runs if (verdict := judged(run)).faults]
    assert not broken, "\n".join(map(str, broken))


@pytest.mark.parametrize("first", range(0, 400, 2 * CHUNK))
def test_every_fork_names_a_third_of_the_stake_and_nobody_honest(first: int) -> None:
    verdicts = [judged(Run("crowded", seed)) for seed in range(first, first + 2 * CHUNK)]
    assert not [str(v) for v in verdicts if any("honest" in fault for fault in v.faults)]
    forks = [v for v in verdicts if v.judgement.forked_at is not None]
    assert len(forks) > CHUNK // 2
    assert not [str(v) for v in forks if 3 * v.judgement.guilty_share < 1]


def test_the_runs_meet_what_they_promise() -> None:
    scenarios = [MODES["mixed"](seed) for seed in range(500)]
    assert {len(scenario.stakes) for scenario in scenarios} == set(range(1, 11))
    assert sum(scenario.churn for scenario in scenarios) > 100
    assert {len(scenario.twins) for scenario in scenarios} >= {0, 1, 2, 3}
    assert any(max(s.stakes) >= 1000 * min(s.stakes) for s in scenarios)
    for scenario in scenarios:
        total = sum(scenario.stakes[i] for i in scenario.members)
        assert 3 * sum(scenario.stakes[i] for i in scenario.faulty) < total
    behaviours = {how for seed in range(100) for _, how in MODES["byzantine"](seed).byzantine}
    assert behaviours == set(BEHAVIOURS)


def test_sets_change_while_the_chain_runs() -> None:
    changes = 0
    for seed in range(40):
        world = World(MODES["mixed"](seed))
        world.run()
        changes += sum(
            a.members != b.members for a, b in zip(world.nodes[0].sets, world.nodes[0].sets[1:], strict=False)
        )
    assert changes > 10


def test_nothing_is_decided_while_a_third_is_away_and_all_goes_on_afterwards() -> None:
    scenario = MODES["halt"](3)
    assert scenario.quiet is not None
    world = World(scenario)
    log = world.run().log
    times = [time for time, _, what in log if type(what).__name__ == "Decide"]
    assert not [time for time in times if scenario.quiet[0] < time < scenario.quiet[1]]
    assert min(times) < scenario.quiet[0] < scenario.quiet[1] < max(times)
    assert world.is_done
