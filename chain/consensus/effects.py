"""What the consensus machine is given, and what it asks of its driver."""

from dataclasses import dataclass, field

from chain.blocks import Block, Certificate, ConsensusMessage, Proposal, ValidatorSet, Vote


@dataclass(frozen=True, slots=True)
class Timers:
    """View timeouts in seconds: `base` x `growth`^(view - 1), never above `cap`."""

    base: float = 2.0
    growth: float = 1.5
    cap: float = 20.0

    def seconds(self, view: int) -> float:
        """Return how long `view` may last before it is nullified."""
        return float(min(self.cap, self.base * self.growth ** min(view - 1, 64)))


@dataclass(frozen=True, slots=True)
class HeightConfig:
    """What one height's consensus starts from; `restored` are this validator's own durable records."""

    chain_id: bytes
    height: int
    validators: ValidatorSet
    leader_seed: bytes
    account: bytes | None = None
    timers: Timers = field(default_factory=Timers)
    restored_votes: tuple[Vote, ...] = ()
    restored_proposals: tuple[Proposal, ...] = ()


@dataclass(frozen=True, slots=True)
class Build:
    """Make a fresh block for `view` and answer with `on_built`."""

    view: int


@dataclass(frozen=True, slots=True)
class Validate:
    """Execute `block` on its parent and answer with `on_validated`."""

    block: Block


@dataclass(frozen=True, slots=True)
class Sign:
    """Record `vote` durably, sign it and answer with `on_signed`.

    `proposal` is the block that the vote speaks for; it is made durable together with the vote, so
    that a block which may have been finalized cannot be lost by all of its signers at once.
    """

    vote: Vote
    proposal: Proposal | None


@dataclass(frozen=True, slots=True)
class Broadcast:
    """Send `message` to every peer."""

    message: ConsensusMessage


@dataclass(frozen=True, slots=True)
class SetTimer:
    """Call `on_timer(view)` after `seconds`; replaces the timer of an earlier view."""

    view: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Decide:
    """`block` is final by `certificate`; the height is over."""

    block: Block
    certificate: Certificate


@dataclass(frozen=True, slots=True)
class Accuse:
    """Two votes of one validator that no honest validator can both have signed."""

    first: Vote
    second: Vote


Effect = Build | Validate | Sign | Broadcast | SetTimer | Decide | Accuse
