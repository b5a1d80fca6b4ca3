"""Auditors that save the work: what becomes of each at the first audit for which it has a result to show."""

from dataclasses import dataclass, field

from chain.keys import peer_id
from tests.attacks.kit import Character, RealSwarm, outsiders, swarm_of

WAYS = {
    "guesses": "random gradients",
    "commits to nothing": "zero gradients",
    "knows y and gx from the neighbours, guesses gw": "gw skipped",
    "repeats the cell that it computed last": "replayed cell",
    "keeps its old state": "stale weights",
    "computes with fewer bits": "int8 weights",
}
"""The results that a lazy auditor has for nothing, or for less than it owes, by what it does."""

_RATE = 3000
_BLOCKS = 80


@dataclass
class Found:
    """What came of lazy auditors."""

    runs: int = 0
    charged_at_first: int = 0
    """Runs in which the very first audit of the lazy one ended with its charge."""
    honest_losses: int = 0
    """Seats lost and charges paid by anybody else."""
    ends: dict[str, int] = field(default_factory=dict)


def measure_lazy(way: str, runs: int) -> Found:
    """Return what came of an auditor that does this, in `runs` swarms of honest peers, until its first audit's end."""
    found = Found()
    for run in range(runs):
        swarm = swarm_of(f"lazy {way} {run}", _RATE)
        outside = outsiders(swarm)
        lazy = outside[run % len(outside)]
        swarm.characters[lazy] = Character(judges=lambda _, __, ___: WAYS[way])
        _follow(swarm, peer_id(lazy), found)
    return found


def _follow(swarm: RealSwarm, lazy: str, found: Found) -> None:
    for _ in range(_BLOCKS):
        swarm.work(1)
        if (end := _first_end(swarm, lazy)) is not None:
            break
    else:
        end = "never audited"
    charged = swarm.ledger.happened("charged")
    found.runs += 1
    found.ends[end] = found.ends.get(end, 0) + 1
    found.charged_at_first += end == "acquitted" and any(event["auditor"] == lazy for event in charged)
    found.honest_losses += len(swarm.ledger.happened("evicted")) + sum(event["auditor"] != lazy for event in charged)


def _first_end(swarm: RealSwarm, auditor: str) -> str | None:
    """Return how the first audit ended that an auditor was drawn for and has revealed."""
    ends = ("passed", "acquitted", "convicted", "faulted", "withheld", "undecided")
    return next((kind for kind in ends for event in swarm.ledger.happened(kind) if event["auditor"] == auditor), None)
