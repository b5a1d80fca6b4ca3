"""One simulated validator: the real consensus machine, a fake disk and a fake key."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, assert_never

from msgspec import structs

from chain.blocks import (
    Block,
    Certificate,
    ConsensusMessage,
    Header,
    Proposal,
    Refused,
    ValidatorSet,
    Vote,
    VoteKind,
    chain_of,
    is_conflict,
    transactions_root,
    verify_message,
)
from chain.consensus import (
    Accuse,
    Broadcast,
    Build,
    Consensus,
    Decide,
    Effect,
    HeightConfig,
    SetTimer,
    Sign,
    Timers,
    Validate,
)
from chain.hashing import ZERO, digest
from tests.simulation.scenario import Scenario

CHAIN_ID = digest("simulated chain")
INVALID = digest("a state root that no execution reaches")
TIMERS = Timers(base=1.0, growth=1.5, cap=8.0)


def fake_signature(account: bytes, message: bytes) -> bytes:
    """Return 64 bytes that only stand for a signature; the simulation forges none."""
    return account + message


def fake_verify(account: bytes, message: bytes, signature: bytes) -> bool:
    """Whether `signature` is the fake one of `account`."""
    return signature == account + message


@dataclass
class Disk:
    """What survives a crash."""

    chain: list[tuple[Block, Certificate]] = field(default_factory=list)
    votes: dict[tuple[int, int, VoteKind], Vote] = field(default_factory=dict)
    proposals: dict[tuple[int, int], Proposal] = field(default_factory=dict)


@dataclass
class Outcome:
    """What the oracle judges, in the order of events."""

    decisions: list[tuple[int, Block, Certificate]] = field(default_factory=list)
    votes: list[tuple[int, Vote]] = field(default_factory=list)
    certificates: list[Certificate] = field(default_factory=list)
    accusations: list[tuple[int, Accuse]] = field(default_factory=list)


class Crashed(Exception):
    """The node dies at this point."""


class Surroundings(Protocol):
    """What a node needs of the world around it."""

    now: float
    rng: random.Random
    scenario: Scenario
    outcome: Outcome
    machine_type: type[Consensus]

    def broadcast(self, sender: int, message: ConsensusMessage) -> None: ...
    def request_blocks(self, sender: int, target: int, height: int) -> None: ...
    def later(self, node: "Node", seconds: float, action: Callable[[], None]) -> None: ...
    def maybe_crash(self, node: "Node") -> None: ...


class Node:
    """Drives one `Consensus` per height. Time and messages come from the world through callbacks."""

    def __init__(self, index: int, account: bytes, validators: ValidatorSet, world: Surroundings) -> None:
        self.index = index
        self.account = account
        self.validators = validators
        self.world = world
        self.disk = Disk()
        self.machine_type = world.machine_type
        self.previous: Consensus | None = None
        self.last_progress = 0.0
        self._position = (0, 0)

    @property
    def height(self) -> int:
        """The height under decision."""
        return len(self.disk.chain) + 1

    def boot(self) -> None:
        """Start, or start again, from the disk alone."""
        self.previous = None
        self._begin()

    def _begin(self) -> None:
        height = self.height
        mine = [vote for (at, _, _), vote in self.disk.votes.items() if at == height]
        self.consensus = self.machine_type(
            HeightConfig(
                chain_id=CHAIN_ID,
                height=height,
                validators=self.validators,
                leader_seed=digest("simulated seed"),
                account=self.account,
                timers=TIMERS,
                restored_votes=tuple(mine),
                restored_proposals=tuple(p for (at, _), p in self.disk.proposals.items() if at == height),
            )
        )
        self.perform(self.consensus.start())

    def receive(self, sender: int, message: ConsensusMessage) -> None:
        """Take a message of any height."""
        _, height = chain_of(message)
        try:
            verify_message(message, self.validators, fake_verify)
        except Refused as error:
            raise AssertionError(f"node {sender} sent something false: {error} {message}") from None
        if height > self.height:
            self.world.request_blocks(self.index, sender, self.height)
        elif height == self.height:
            self.perform(self._feed(self.consensus, message))
        elif self.previous is not None and height == self.height - 1:
            self.perform(self._feed(self.previous, message))

    @staticmethod
    def _feed(consensus: Consensus, message: ConsensusMessage) -> list[Effect]:
        match message:
            case Proposal():
                return consensus.on_proposal(message)
            case Vote():
                return consensus.on_vote(message)
            case Certificate():
                return consensus.on_certificate(message)

    def adopt(self, block: Block, certificate: Certificate) -> None:
        """Take a final block of the next height from another node."""
        parent = self.disk.chain[-1][0].hash if self.disk.chain else CHAIN_ID
        if block.height == self.height and block.header.parent == parent:
            self._commit(block, certificate)

    def perform(self, effects: list[Effect]) -> None:
        """Carry out the effects of one event."""
        for effect in effects:
            self._perform(effect)
        position = (self.height, self.consensus.view)
        if position != self._position:
            self._position, self.last_progress = position, self.world.now

    def _perform(self, effect: Effect) -> None:
        consensus = self.consensus
        match effect:
            case Broadcast(message):
                if isinstance(message, Certificate):
                    self.world.outcome.certificates.append(message)
                self.world.broadcast(self.index, message)
            case SetTimer(view, seconds):
                self.world.later(self, seconds, lambda: self._if_same(consensus, consensus.on_timer, view))
            case Build(view):
                block = self._block(view)
                self._later(consensus, lambda: consensus.on_built(view, block))
            case Validate(block):
                valid = block.header.state_root != INVALID
                self._later(consensus, lambda: consensus.on_validated(block.hash, valid))
            case Sign(vote, proposal):
                signed = self._sign(vote, proposal)
                self._later(consensus, lambda: consensus.on_signed(signed), also_late=True)
            case Decide(block, certificate):
                self._commit(block, certificate)
            case Accuse():
                self.world.outcome.accusations.append((self.index, effect))
            case _:
                assert_never(effect)

    def _later(self, consensus: Consensus, action: Callable[[], list[Effect]], *, also_late: bool = False) -> None:
        delay = self.world.rng.uniform(0.0, 0.03)

        def act() -> None:
            if consensus is self.consensus or (also_late and consensus is self.previous):
                self.perform(action())

        self.world.later(self, delay, act)

    def _if_same(self, consensus: Consensus, action: Callable[..., list[Effect]], *arguments: int) -> None:
        if consensus is self.consensus:
            self.perform(action(*arguments))

    def _sign(self, vote: Vote, proposal: Proposal | None) -> Vote:
        key = (vote.height, vote.view, vote.kind)
        self.world.maybe_crash(self)
        stored = self.disk.votes.get(key)
        if stored is not None:
            assert not is_conflict(stored, vote)
            return stored
        signed = structs.replace(vote, signature=fake_signature(self.account, vote.signing_bytes))
        self.disk.votes[key] = signed
        if proposal is not None:
            if vote.kind == VoteKind.PROPOSE:
                proposal = structs.replace(proposal, vote=signed)
            self.disk.proposals.setdefault((vote.height, vote.view), proposal)
        self.world.outcome.votes.append((self.index, signed))
        self.world.maybe_crash(self)
        return signed

    def _commit(self, block: Block, certificate: Certificate) -> None:
        self.world.maybe_crash(self)
        self.disk.chain.append((block, certificate))
        self.world.outcome.decisions.append((self.index, block, certificate))
        self.world.maybe_crash(self)
        self.consensus.close()
        self.previous = self.consensus
        self._begin()

    def _block(self, view: int) -> Block:
        rng, height = self.world.rng, self.height
        parent, certificate = self.disk.chain[-1] if self.disk.chain else (None, None)
        twin = self.world.scenario.owners.count(self.world.scenario.owners[self.index]) > 1
        invalid = twin and rng.random() < self.world.scenario.invalid_chance
        header = Header(
            CHAIN_ID,
            height,
            parent.hash if parent else CHAIN_ID,
            self.account,
            view,
            rng.getrandbits(48),
            transactions_root(()),
            certificate.hash if certificate else ZERO,
            INVALID if invalid else ZERO,
            self.validators.hash,
            self.validators.hash,
            ZERO,
            ZERO,
            ZERO,
        )
        return Block(header, (), certificate)
