"""One simulated validator: the real consensus machine, a fake disk and a fake key."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, assert_never

from msgspec import structs

from chain.blocks import (
    Block,
    Certificate,
    ConsensusMessage,
    Header,
    Proposal,
    ValidatorSet,
    Vote,
    VoteKind,
    chain_of,
    transactions_root,
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
from tests.simulation.mutants import Mutation

CHAIN_ID = digest("simulated chain")
SEED = digest("simulated seed")
INVALID = digest("a state root that no execution reaches")
NO_TRANSACTIONS = transactions_root(())
TIMERS = Timers(base=1.0, growth=1.5, cap=15.0)
REQUEST_SECONDS = 0.5


def fake_signature(account: bytes, message: bytes) -> bytes:
    """Return 64 bytes that only stand for a signature; the simulation forges none."""
    return account + message


def signed(vote: Vote) -> Vote:
    """Return `vote` with the fake signature of its validator."""
    return structs.replace(vote, signature=fake_signature(vote.validator, vote.signing_bytes))


@dataclass
class Disk:
    """What survives a crash."""

    chain: list[tuple[Block, Certificate]] = field(default_factory=list)
    votes: dict[tuple[int, int, VoteKind, bytes], Vote] = field(default_factory=dict)
    proposals: dict[tuple[int, int], Proposal] = field(default_factory=dict)


@dataclass(frozen=True)
class Signed:
    """A vote that became durable; `parent_view` is that of the proposal it speaks for."""

    vote: Vote
    parent_view: int | None


@dataclass
class Outcome:
    """What the oracle judges: (seconds, node, what happened), in the order of events.

    Votes made durable (`Signed`), messages sent, decisions, accusations, and views entered as
    (height, view).
    """

    log: list[tuple[float, int, Signed | ConsensusMessage | Decide | Accuse | tuple[int, int]]] = field(
        default_factory=list
    )


class Crashed(Exception):
    """The node dies at this point."""


class Surroundings(Protocol):
    """What a node needs of the world around it."""

    now: float
    rng: random.Random
    mutation: Mutation
    nodes: list["Node"]

    def broadcast(self, sender: int, message: ConsensusMessage) -> None: ...
    def send(self, sender: int, target: int, message: ConsensusMessage) -> None: ...
    def request_blocks(self, sender: int, target: int, height: int) -> None: ...
    def later(self, node: "Node", seconds: float, action: Callable[..., None], *arguments: Any) -> None: ...
    def maybe_crash(self, node: "Node") -> None: ...
    def record(self, node: "Node", what: Any) -> None: ...
    def committed(self, node: "Node") -> None: ...
    def verify(self, sender: int, message: ConsensusMessage, validators: ValidatorSet) -> bool: ...
    def set_after(self, validators: ValidatorSet, number: int) -> ValidatorSet: ...


class Node:
    """Drives one `Consensus` per height. Time and messages come from the world through callbacks."""

    def __init__(self, index: int, account: bytes, genesis: ValidatorSet, world: Surroundings) -> None:
        self.index = index
        self.account = account
        self.world = world
        self.disk = Disk()
        self.sets = [genesis]
        self.height = 1
        self.life = 0
        self.is_down = False
        self.previous: Consensus | None = None
        self.last_progress = 0.0
        self._requested = -REQUEST_SECONDS
        self._position = (0, 0)

    def boot(self) -> None:
        """Start, or start again, from the disk alone."""
        self.previous = None
        self._position = (0, 0)
        self._requested = -REQUEST_SECONDS
        self._begin()

    def _begin(self) -> None:
        height = self.height = len(self.disk.chain) + 1
        del self.sets[height:]
        for block, _ in self.disk.chain[len(self.sets) - 1 :]:
            self.sets.append(self.world.set_after(self.sets[-1], block.header.timestamp))
        self.consensus = self.world.mutation.machine_type(
            HeightConfig(
                chain_id=CHAIN_ID,
                height=height,
                validators=self.sets[-1],
                leader_seed=SEED,
                account=self.account,
                timers=TIMERS,
                restored_votes=tuple(vote for key, vote in self.disk.votes.items() if key[0] == height),
                restored_proposals=tuple(p for (at, _), p in self.disk.proposals.items() if at == height),
            )
        )
        self.perform(self.consensus.start())

    def receive(self, sender: int, message: ConsensusMessage) -> None:
        """Take a message of any height."""
        _, height = chain_of(message)
        if height > self.height:
            self.request(sender)
            return
        consensus = self.consensus if height == self.height else self.previous
        if consensus is None or height != consensus.config.height:
            return
        if not self.world.verify(sender, message, consensus.config.validators):
            return
        match message:
            case Proposal():
                effects = consensus.on_proposal(message)
            case Vote():
                effects = consensus.on_vote(message)
            case Certificate():
                effects = consensus.on_certificate(message)
        self.perform(effects)
        if self.consensus.finalization is not None:
            self.request(sender)

    def request(self, sender: int) -> None:
        """Ask one who is ahead for what it has decided, now and then."""
        if self.world.now - self._requested >= REQUEST_SECONDS:
            self._requested = self.world.now
            self.world.request_blocks(self.index, sender, self.height)

    def adopt(self, sender: int, block: Block, certificate: Certificate) -> None:
        """Take a final block of the next height from another node."""
        follows = block.height == self.height and block.header.parent == self._tip
        if follows and self.world.verify(sender, certificate, self.sets[-1]):
            self._commit(block, certificate)

    @property
    def _tip(self) -> bytes:
        return self.disk.chain[-1][0].hash if self.disk.chain else CHAIN_ID

    def emit(self, message: ConsensusMessage) -> None:
        """Send a message to every other node."""
        self.world.broadcast(self.index, message)

    def standstill(self) -> None:
        """Nothing has moved for a while: say again what others may lack."""
        self.perform(self.consensus.on_standstill())
        if self.disk.chain:
            self.emit(self.disk.chain[-1][1])

    def perform(self, effects: list[Effect]) -> None:
        """Carry out the effects of one event."""
        for effect in effects:
            self._perform(effect)
        position = (self.height, self.consensus.view)
        if position != self._position:
            self._position, self.last_progress = position, self.world.now
            self.world.record(self, position)

    def _perform(self, effect: Effect) -> None:
        consensus = self.consensus
        match effect:
            case Broadcast(message):
                self.emit(message)
            case SetTimer(view, seconds):
                self.world.later(self, seconds, self._answer, consensus, consensus.on_timer, view)
            case Build(view):
                self._soon(consensus, consensus.on_built, view, self.block(view))
            case Validate(block):
                self._soon(consensus, consensus.on_validated, block.hash, self._is_valid(block))
            case Sign(vote, proposal):
                self._soon(consensus, consensus.on_signed, self.sign(vote, proposal))
            case Decide(block, certificate):
                self._commit(block, certificate)
            case Accuse():
                self.world.record(self, effect)
            case _:
                assert_never(effect)

    def _soon(self, consensus: Consensus, event: Callable[..., list[Effect]], *arguments: Any) -> None:
        delay = 0.03 * self.world.rng.random()
        self.world.later(self, delay, self._answer, consensus, event, *arguments)

    def _answer(self, consensus: Consensus, event: Callable[..., list[Effect]], *arguments: Any) -> None:
        if consensus is self.consensus or (consensus is self.previous and event == consensus.on_signed):
            self.perform(event(*arguments))

    def sign(self, vote: Vote, proposal: Proposal | None) -> Vote:
        """Return the vote signed, durable like its proposal."""
        key = (vote.height, vote.view, vote.kind, vote.block_hash)
        self.world.maybe_crash(self)
        if key in self.disk.votes:
            return self.disk.votes[key]
        result = signed(vote)
        self.disk.votes[key] = result
        if proposal is not None and self.world.mutation.keeps_proposals:
            if vote.kind == VoteKind.PROPOSE:
                proposal = structs.replace(proposal, vote=result)
            self.disk.proposals.setdefault((vote.height, vote.view), proposal)
        self.world.record(self, Signed(result, proposal.parent_view if proposal else None))
        self.world.maybe_crash(self)
        return result

    def _commit(self, block: Block, certificate: Certificate) -> None:
        self.world.maybe_crash(self)
        self.disk.chain.append((block, certificate))
        self.world.record(self, Decide(block, certificate))
        self.world.maybe_crash(self)
        self.consensus.close()
        self.previous = self.consensus
        self.world.committed(self)
        self._begin()

    def _is_valid(self, block: Block) -> bool:
        header, own = block.header, self.sets[-1]
        expected = (self._tip, own.hash, self.world.set_after(own, header.timestamp).hash, ZERO)
        return expected == (header.parent, header.validators_hash, header.next_validators_hash, header.state_root)

    def block(self, view: int) -> Block:
        """Return a fresh block of this node for `view`."""
        number, own = self.world.rng.getrandbits(48), self.sets[-1]
        certificate = self.disk.chain[-1][1] if self.disk.chain else None
        header = Header(
            CHAIN_ID,
            self.height,
            self._tip,
            self.account,
            view,
            number,
            NO_TRANSACTIONS,
            certificate.hash if certificate else ZERO,
            ZERO,
            own.hash,
            self.world.set_after(own, number).hash,
            ZERO,
            ZERO,
            SEED,
        )
        return Block(header, (), certificate)
