"""One judged run of a scenario, and the command that replays it."""

from dataclasses import dataclass

from chain.blocks import ValidatorSet
from chain.consensus import Consensus
from tests.simulation.oracle import judge
from tests.simulation.scenario import Scenario, scenario
from tests.simulation.world import World


@dataclass(frozen=True)
class Verdict:
    """The broken invariants of one run (none for a good one) and the digest of its trace."""

    seed: int
    faults: tuple[str, ...]
    trace: str
    seconds: float

    def __str__(self) -> str:
        return f"seed {self.seed}: {'; '.join(self.faults)}\nreplay: python -m tests.simulation {self.seed}"


def judged(
    what: int | Scenario,
    *,
    loss: float | None = None,
    machine_type: type[Consensus] = Consensus,
    set_type: type[ValidatorSet] = ValidatorSet,
    keeps_record: bool = True,
) -> Verdict:
    """Return the verdict on one run of a seed or scenario."""
    chosen = scenario(what, loss=loss) if isinstance(what, int) else what
    world = World(chosen, machine_type, set_type, keeps_record)
    try:
        outcome = world.run()
    except AssertionError as error:
        return Verdict(chosen.seed, (str(error),), "", world.now)
    nodes = {node.index for node in world.honest}
    faults = judge(outcome, world.stakes, nodes, {node.account for node in world.honest})
    if not world.is_done:
        faults.append(f"stuck at heights {[node.height for node in world.nodes]} after {world.now:.0f} s")
    return Verdict(chosen.seed, tuple(faults), world.trace.hexdigest(), world.now)
