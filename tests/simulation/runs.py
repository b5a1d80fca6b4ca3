"""One judged run of a scenario, and the command that replays it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from tests.simulation.mutants import MUTANTS, Mutation
from tests.simulation.node import CHAIN_ID
from tests.simulation.oracle import Cast, Judgement, judge
from tests.simulation.scenario import MODES
from tests.simulation.world import World


@dataclass(frozen=True)
class Run:
    """What names a run: its mode, its seed and, where they apply, a mutant and a write to die at."""

    mode: str
    seed: int
    mutant: str = ""
    crash_at: int | None = None

    @property
    def command(self) -> str:
        """The command that runs it again."""
        words = ["python -m tests.simulation", "--mode", self.mode, "--seed", str(self.seed)]
        words += ["--mutant", self.mutant] if self.mutant else []
        words += ["--crash-at", str(self.crash_at)] if self.crash_at is not None else []
        return " ".join(words)


@dataclass(frozen=True)
class Verdict:
    """The broken invariants of one run (none for a good one), its figures and the digest of its trace."""

    run: Run
    faults: tuple[str, ...]
    judgement: Judgement
    trace: str
    seconds: float
    writes: int

    def __str__(self) -> str:
        return f"{'; '.join(self.faults) or 'good'}\nreplay: {self.run.command}"


def judged(run: Run) -> Verdict:
    """Return the verdict on one run."""
    scenario = MODES[run.mode](run.seed)
    if run.crash_at is not None:
        scenario = replace(scenario, crash_at=run.crash_at)
    world = World(scenario, MUTANTS[run.mutant] if run.mutant else Mutation())
    try:
        outcome = world.run()
    except AssertionError as error:
        return Verdict(run, (str(error),), Judgement(), world.trace.hexdigest(), world.now, world.writes)
    cast = Cast(scenario, CHAIN_ID, tuple(node.account for node in world.nodes))
    judgement = judge(cast, outcome.log)
    return Verdict(run, tuple(judgement.faults), judgement, world.trace.hexdigest(), world.now, world.writes)


def crash_points(seed: int) -> Iterator[Run]:
    """Yield a run for each durable write of a seed of mode "crash", dying before it and dying after it."""
    for point in range(judged(Run("crash", seed)).writes):
        yield Run("crash", seed, crash_at=point)
