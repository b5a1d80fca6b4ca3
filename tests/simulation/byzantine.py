"""Validators that break the protocol in one way each. They sign whatever they like, and forge nothing."""

from msgspec import structs

from chain.blocks import (
    Block,
    Certificate,
    ConsensusMessage,
    Proposal,
    ValidatorSet,
    Vote,
    VoteKind,
    proposal_subject,
)
from chain.hashing import ZERO
from tests.simulation.node import CHAIN_ID, INVALID, Node, Surroundings, signed

MEMORY = 200
"""Messages that a byzantine node remembers."""


class Byzantine(Node):
    """Knows all blocks that it has met and can sign anything with its own key."""

    def __init__(self, index: int, account: bytes, genesis: ValidatorSet, world: Surroundings) -> None:
        super().__init__(index, account, genesis, world)
        self.met: dict[int, dict[bytes, Block]] = {}
        self.heard: list[ConsensusMessage] = []

    def receive(self, sender: int, message: ConsensusMessage) -> None:
        """Remember the message besides taking it as an honest node would."""
        if isinstance(message, Proposal):
            self.met.setdefault(message.block.height, {})[message.block.hash] = message.block
        if len(self.heard) < MEMORY:
            self.heard.append(message)
        else:
            self.heard[self.world.rng.randrange(MEMORY)] = message
        super().receive(sender, message)

    def vote(self, kind: VoteKind, height: int, view: int, block_hash: bytes) -> Vote:
        """Return a signed vote, whatever was signed before."""
        return signed(Vote(kind, CHAIN_ID, height, view, block_hash, self.account, bytes(64)))

    def proposal(self, view: int, parent_view: int, block: Block) -> Proposal:
        """Return a signed proposal, whatever was proposed before."""
        subject = proposal_subject(block.hash, parent_view)
        return Proposal(self.vote(VoteKind.PROPOSE, block.height, view, subject), parent_view, block)

    def scatter(self, *messages: ConsensusMessage) -> None:
        """Send each other node one of the messages."""
        for target in range(len(self.world.nodes)):
            if target != self.index:
                self.world.send(self.index, target, self.world.rng.choice(messages))


class Silent(Byzantine):
    """Never says anything."""

    def emit(self, message: ConsensusMessage) -> None:
        """Keep it."""


class Withholds(Byzantine):
    """Leads without ever showing its proposal."""

    def emit(self, message: ConsensusMessage) -> None:
        """Send all but proposals."""
        if not isinstance(message, Proposal) or message.vote.validator != self.account:
            super().emit(message)


class Selective(Byzantine):
    """Sends each message to about half of the others."""

    def emit(self, message: ConsensusMessage) -> None:
        """Send to some."""
        for target in range(len(self.world.nodes)):
            if target != self.index and self.world.rng.random() < 0.5:
                self.world.send(self.index, target, message)


class Equivocates(Byzantine):
    """Proposes two blocks, and votes for every block it knows, a different one to each."""

    def emit(self, message: ConsensusMessage) -> None:
        """Send different things to different nodes."""
        match message:
            case Proposal(vote=own, parent_view=0, block=block) if own.validator == self.account:
                other = self.block(own.view)
                for either in (block, other):
                    self.met.setdefault(block.height, {})[either.hash] = either
                self.scatter(message, self.proposal(own.view, 0, other))
            case Vote(kind=VoteKind.NOTARIZE | VoteKind.FINALIZE):
                hashes = {message.block_hash, *self.met.get(message.height, {})}
                votes = [self.vote(message.kind, message.height, message.view, h) for h in sorted(hashes)]
                self.scatter(*votes)
            case _:
                super().emit(message)


class Invalid(Byzantine):
    """Proposes blocks that break one rule each."""

    def emit(self, message: ConsensusMessage) -> None:
        """Spoil an own proposal, send the rest as it is."""
        if not isinstance(message, Proposal) or message.vote.validator != self.account:
            super().emit(message)
            return
        view, header, rng = message.vote.view, message.block.header, self.world.rng
        spoiled = rng.choice(
            (
                structs.replace(header, state_root=INVALID),
                structs.replace(header, next_validators_hash=INVALID),
                structs.replace(header, parent=INVALID),
                structs.replace(header, proposer=rng.choice(self.world.nodes).account),
                structs.replace(header, view=view + 1),
            )
        )
        self.scatter(self.proposal(view, message.parent_view, structs.replace(message.block, header=spoiled)))


class Stale(Byzantine):
    """Proposes other blocks again than the highest notarized one, and fresh ones over a notarized view."""

    def emit(self, message: ConsensusMessage) -> None:
        """Send an own proposal of something else than is due."""
        if not isinstance(message, Proposal) or message.vote.validator != self.account:
            super().emit(message)
            return
        view, rng = message.vote.view, self.world.rng
        fresh = self.proposal(view, 0, self.block(view))
        old = [block for hash_, block in sorted(self.met.get(self.height, {}).items()) if hash_ != message.block.hash]
        again = [self.proposal(view, parent, rng.choice(old)) for parent in range(1, view) if old]
        self.scatter(*again, fresh)


class Replays(Byzantine):
    """Sends what it heard long ago again and again."""

    def receive(self, sender: int, message: ConsensusMessage) -> None:
        """Take the message and say something old."""
        super().receive(sender, message)
        if self.world.rng.random() < 0.1:
            self.scatter(*(self.world.rng.choice(self.heard) for _ in range(3)))


class SignsEverything(Byzantine):
    """Nullifies, notarizes and finalizes whatever view and block it hears of."""

    def receive(self, sender: int, message: ConsensusMessage) -> None:
        """Take the message and contradict it."""
        super().receive(sender, message)
        if isinstance(message, Certificate | Proposal) or self.world.rng.random() > 0.2:
            return
        hashes = sorted(self.met.get(message.height, {}))
        kinds = (VoteKind.NOTARIZE, VoteKind.FINALIZE)
        votes = [self.vote(kind, message.height, message.view, h) for kind in kinds for h in hashes]
        self.scatter(self.vote(VoteKind.NULLIFY, message.height, message.view, ZERO), *votes)


KINDS: dict[str, type[Node]] = {
    "silent": Silent,
    "withholds": Withholds,
    "selective": Selective,
    "equivocates": Equivocates,
    "invalid": Invalid,
    "stale": Stale,
    "replays": Replays,
    "signs-everything": SignsEverything,
}
