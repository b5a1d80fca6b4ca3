"""What comes of the runs of an attack: convictions, cheated cells until then against theory, who else suffers."""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from chain.keys import account_of, peer_id
from tests.attacks.kit import REPLICAS, Character, RealSwarm, agree, auditors_of, swarm_of

ENDS = ("passed", "convicted", "faulted", "undecided", "withheld", "acquitted", "void")
BLOCKS = 600
"""After which a run ends whose cheat has not lost its seat."""


@dataclass
class Figures:
    """What came of the runs of one attack."""

    attack: str
    theory: float
    """h, the chance that a cheated cell is audited by somebody who does not collude."""
    runs: int = 0
    convicted: int = 0
    unseated: int = 0
    """Runs in which every cheat has lost its seat, for whatever reason."""
    cells: list[int] = field(default_factory=list)
    """Cheated cells up to the first that was disputed or withheld, by run."""
    claimed: list[int] = field(default_factory=list)
    """Cheated cells claimed by the time of the eviction, those in flight included."""
    settled: list[int] = field(default_factory=list)
    """Cheated cells in steps that had settled before the eviction: they stay, and no rollback undoes them."""
    honest_evictions: int = 0
    honest_charges: int = 0
    executions: int = 0
    """Re-executions, of all cells and for the disputes."""
    paid: int = 0
    """Cells of everybody."""
    ends: Counter[str] = field(default_factory=Counter)

    @property
    def mean(self) -> float:
        """Mean cheated cells until the first that is disputed, itself included."""
        return sum(self.cells) / max(1, len(self.cells))

    def quantile(self, share: float) -> int:
        """Return the smallest number of cells that this share of the runs did not exceed."""
        ordered = sorted(self.cells)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0

    def quantile_in_theory(self, share: float) -> int:
        """Return the same of the geometric distribution."""
        return math.ceil(math.log(1 - share) / math.log1p(-self.theory)) if self.theory < 1 else 1

    def bounds(self, deviations: float = 4.0) -> tuple[float, float]:
        """Return the interval around 1/h in which the mean of so many geometric runs lies."""
        spread = deviations * ((1 - self.theory) / self.theory**2 / max(1, len(self.cells))) ** 0.5
        return 1 / self.theory - spread, 1 / self.theory + spread


Prepare = Callable[[RealSwarm, bytes], None]
"""Gives the peers of a new swarm their characters, the cheat's among them."""


def measure(
    attack: str,
    prepare: Prepare,
    runs: int,
    stage: int = 1,
    colluding: int = 0,
    share: float = 1.0,
    blocks: int = BLOCKS,
    **params: Any,
) -> Figures:
    """Return what came of `runs` runs, each until its cheats are out; `colluding` of their auditors are friends.

    `share` is that of the audits' rate at which what the cheat does is drawn.
    """
    figures, rate = Figures(attack, 0.0), 1000
    for run in range(runs):
        swarm = swarm_of(f"{attack} {run}", rate, **params)
        cheat = swarm.seated(stage)[run % REPLICAS]
        pool = auditors_of(swarm, cheat)
        friends = pool[:colluding]
        swarm.characters |= {friend: Character(judges=agree) for friend in friends}
        prepare(swarm, cheat)
        friendly = sum(swarm.character(account).judges is agree for account in pool)
        figures.theory = share * rate / 10_000 * (1 - friendly / len(pool))
        follow(swarm, cheat, figures, blocks)
    return figures


def cheats_of(swarm: RealSwarm, cheat: bytes) -> set[bytes]:
    """Return the cheat, and who else of its stage claims false results."""
    claims = {account for account, character in swarm.characters.items() if character.attack}
    own = swarm.state.worker(swarm.task, cheat)
    beside = {w.account for w in swarm.state.workers(swarm.task) if own is not None and w.stage == own.stage}
    return {cheat} | claims & beside


def follow(swarm: RealSwarm, cheat: bytes, figures: Figures, blocks: int = BLOCKS) -> None:
    """Let a swarm work until its cheats have lost their seats; add what came of it to `figures`."""
    cheats = cheats_of(swarm, cheat)
    for _ in range(blocks):
        swarm.work(1)
        if not _seated(swarm, cheats):
            break
    note(swarm, cheat, figures)


def _seated(swarm: RealSwarm, accounts: Iterable[bytes]) -> list[bytes]:
    workers = [swarm.state.worker(swarm.task, account) for account in accounts]
    return [worker.account for worker in workers if worker is not None and worker.is_seated]


def note(swarm: RealSwarm, cheat: bytes, figures: Figures) -> None:
    """Add what came of a run to `figures`."""
    ledger, cheats = swarm.ledger, cheats_of(swarm, cheat)
    names = {peer_id(account) for account in cheats}
    figures.runs += 1
    figures.convicted += names <= {str(event["worker"]) for event in ledger.happened("slashed")}
    figures.unseated += not _seated(swarm, cheats)
    figures.honest_evictions += sum(1 for event in ledger.happened("evicted") if event["worker"] not in names)
    guilty = {peer_id(a) for a, c in swarm.characters.items() if c.judges or c.accuses or c.misses or c.attack}
    figures.honest_charges += sum(1 for event in ledger.happened("charged") if event["auditor"] not in guilty)
    found = {
        (event["step"], event["stage"], event["cell"], account_of(str(event["worker"])))
        for kind in ("disputed", "withheld")
        for event in ledger.happened(kind)
    }
    order = [place for place in swarm.cheated if swarm.owners[place] in cheats]
    first = next((n for n, place in enumerate(order, 1) if (*place[1:4], swarm.owners[place]) in found), None)
    if first is not None:
        figures.cells.append(first)
    figures.claimed.append(len(order))
    figures.settled.append(sum(1 for place in order if place.step <= swarm.settled))
    figures.executions += swarm.executions
    figures.paid += len(swarm.claimed_as)
    figures.ends.update({kind: len(ledger.happened(kind)) for kind in ENDS})


def cheating(attack: str, **changes: Any) -> Prepare:
    """Return what makes the cheat claim this false result."""

    def prepare(swarm: RealSwarm, cheat: bytes) -> None:
        swarm.characters[cheat] = replace(Character(attack=attack), **changes)

    return prepare


def both(attack: str, **changes: Any) -> Prepare:
    """Return what makes all workers of the cheat's stage do the same, and find each other right."""

    def prepare(swarm: RealSwarm, cheat: bytes) -> None:
        own = swarm.state.worker(swarm.task, cheat)
        assert own is not None
        for account in swarm.seated(own.stage):
            cheating(attack, judges=agree, **changes)(swarm, account)

    return prepare
