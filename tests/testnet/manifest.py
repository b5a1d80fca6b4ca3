"""What a testnet is made of, read from TOML or drawn from a seed.

```toml
blocks = 20            # every honest peer reaches this height
deadline = 120         # seconds until it must have
transfers = 2.0        # signed transfers a second, sent through the peers in turn
[[peer]]
stake = 1000000        # 0: a full node
start = 0              # the height at which it is started
snapshot = false       # joins by a state snapshot
attack = ""            # equivocate, two-faced, withhold or invalid: a process that lies
[[peer.faults]]
at = 6                 # height
kind = "kill"          # kill (-9), restart, pause or disconnect
seconds = 3.0          # until it is started, continued or connected again
```
"""

import random
import tomllib
from dataclasses import dataclass
from pathlib import Path

import msgspec

FAULTS = ("kill", "restart", "pause", "disconnect")
ATTACKS = ("", "equivocate", "two-faced", "withhold", "invalid")
MAX_PEERS = 20
EPOCH_BLOCKS = 10
FIRST_SNAPSHOT = EPOCH_BLOCKS + 2
"""The height from which every peer serves a snapshot."""
STAKES = (1_000_000, 1_500_000, 3_000_000)


class ManifestError(ValueError):
    """A manifest that describes no testnet; one sentence."""


class Fault(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What happens to a peer at a height of the chain, and for how long."""

    at: int
    kind: str
    seconds: float = 3.0


class PeerPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One process."""

    stake: int = 1_000_000
    start: int = 0
    snapshot: bool = False
    attack: str = ""
    faults: tuple[Fault, ...] = ()


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One testnet. `deadline` bounds the whole run, in seconds."""

    peer: tuple[PeerPlan, ...]
    blocks: int = 20
    deadline: float = 120.0
    transfers: float = 2.0
    seed: int = 0

    @property
    def honest(self) -> tuple[int, ...]:
        """The peers that do not lie."""
        return tuple(index for index, plan in enumerate(self.peer) if not plan.attack)


def load(path: Path) -> Manifest:
    """Return the manifest in a file; raise `ManifestError`."""
    try:
        manifest = msgspec.convert(tomllib.loads(path.read_text()), Manifest)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise ManifestError(f"{path} is no manifest: {error}") from None
    check(manifest)
    return manifest


def check(manifest: Manifest) -> None:
    """Raise `ManifestError` for a testnet that cannot run, or whose liars could rightly stop it."""
    plans = manifest.peer
    if not 1 <= len(plans) <= MAX_PEERS:
        raise ManifestError(f"a testnet has 1 to {MAX_PEERS} peers, not {len(plans)}")
    if plans[0].start or plans[0].attack or not plans[0].stake:
        raise ManifestError("the first peer founds the network: an honest validator from the start")
    if any(plan.attack not in ATTACKS for plan in plans):
        raise ManifestError(f"attacks are {', '.join(filter(None, ATTACKS))}")
    if any(fault.kind not in FAULTS or fault.seconds <= 0 for plan in plans for fault in plan.faults):
        raise ManifestError(f"faults are {', '.join(FAULTS)}, for more than 0 seconds")
    if any(plan.stake and plan.start for plan in plans):
        raise ManifestError("who starts late has no stake: the chain would wait for it")
    if any(plan.snapshot and plan.start < FIRST_SNAPSHOT for plan in plans):
        raise ManifestError(f"there is no snapshot before height {FIRST_SNAPSHOT}")
    lying = sum(plan.stake for plan in plans if plan.attack)
    if 3 * lying >= sum(plan.stake for plan in plans):
        raise ManifestError("liars with a third of the stake may stop the chain or fork it")


@dataclass(frozen=True)
class Shape:
    """How large a drawn testnet is."""

    validators: int = 4
    others: int = 1
    blocks: int = 60
    deadline: float = 600.0


def drawn(seed: int, shape: Shape) -> Manifest:
    """Return the testnet of a seed: one liar, and faults of one honest validator after the other."""
    rng = random.Random(f"testnet {seed}")
    faults: dict[int, list[Fault]] = {}
    height = 5
    while height < shape.blocks - 10:
        victim = rng.randrange(0, shape.validators - 1)
        kind = rng.choice(FAULTS)
        faults.setdefault(victim, []).append(Fault(height, kind, rng.choice((1.0, 3.0, 8.0))))
        height += rng.randint(6, 12)
    plans = [
        PeerPlan(stake=rng.choice(STAKES), faults=tuple(faults.get(index, ()))) for index in range(shape.validators - 1)
    ]
    plans.append(PeerPlan(attack=rng.choice(ATTACKS[1:])))
    for _ in range(shape.others):
        start, snapshot = rng.randint(1, shape.blocks // 2), rng.random() < 0.5
        plans.append(PeerPlan(stake=0, start=max(start, FIRST_SNAPSHOT) if snapshot else start, snapshot=snapshot))
    manifest = Manifest(tuple(plans), shape.blocks, shape.deadline, rng.choice((0.5, 2.0, 5.0)), seed)
    check(manifest)
    return manifest
