"""The engine without I/O: one consensus machine after the other, and the work that they leave to do.

`ChainEngine` feeds it events with the current time and empties its queues: messages to publish,
votes to make durable and sign, blocks to build, validate and commit.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import assert_never

from chain.blocks import (
    MAX_CLOCK_DRIFT_MS,
    Block,
    Certificate,
    ConsensusMessage,
    Proposal,
    Refused,
    ValidatorSet,
    Verifier,
    Vote,
)
from chain.codec import encode
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
from chain.engine_blocks import Draft, Tip
from chain.engine_gate import Disposition, Gate, Taken
from chain.engine_pace import Pace
from chain.evidence import RECENT, Watch
from chain.keys import PrivateKey
from chain.ledger import Executed
from chain.randomness import onion_of
from chain.sync import FinalBlock
from chain.transactions import Evidence

MAX_EXECUTED = 8
"""Executed candidates of one height that are kept."""
MAX_FOREIGN = 16
"""Certificates of heights not reached here that are kept of servers that were refused."""
PATIENCE = 0.25
"""Seconds for which a notarized block that is proposed again is held back: its finalization is usually under way."""
MAX_UNPUBLISHED = 2048
"""Messages that wait for a slow network; the oldest are dropped and come again at a standstill."""


@dataclass(frozen=True)
class BuildJob:
    """Build a fresh block for a view of a machine."""

    machine: Consensus
    view: int


@dataclass(frozen=True)
class ValidateJob:
    """Execute a proposed block for a machine."""

    machine: Consensus
    block: Block


@dataclass(frozen=True)
class CommitJob:
    """Execute if need be, store and adopt a final block."""

    block: Block
    certificate: Certificate


@dataclass(frozen=True)
class KeepJob:
    """Store the open cases of evidence, so that a restart loses none."""

    cases: tuple[Evidence, ...]


@dataclass(frozen=True)
class CompareJob:
    """Compare a served certificate with the stored one of its height, too old for the watch to cover."""

    foreign: Certificate


Job = BuildJob | ValidateJob | CommitJob | KeepJob | CompareJob


@dataclass(frozen=True)
class SignJob:
    """Make a vote of a machine durable and sign it."""

    machine: Consensus
    vote: Vote
    proposal: Proposal | None


@dataclass(frozen=True)
class Restored:
    """Own votes and proposals of one height, from the signing record."""

    votes: tuple[Vote, ...] = ()
    proposals: tuple[Proposal, ...] = ()


@dataclass(frozen=True)
class CoreConfig:
    """What the core starts from. `key` is None for a peer that only follows."""

    key: PrivateKey | None
    timers: Timers
    standstill: float
    verify: Verifier


class Core:
    """Consensus of one height after the other over the final tip."""

    def __init__(self, config: CoreConfig, tip: Tip) -> None:
        params = tip.state.params
        self._config = config
        self.tip = tip
        self.watch = Watch(config.verify, self.account)
        self.gate = Gate(tip.chain_id, config.verify, self.watch)
        self.pace = Pace(params.block_interval_ms / 1000, params.heartbeat_ms / 1000, config.standstill)
        self.previous: Consensus | None = None
        self.executed: dict[bytes, Executed] = {}
        self.publish: deque[tuple[str, bytes]] = deque(maxlen=MAX_UNPUBLISHED)
        self.signing: deque[SignJob] = deque()
        self.jobs: deque[Job] = deque()
        self.began = 0.0
        """When the height under decision began."""
        self._foreign: deque[Certificate] = deque(maxlen=MAX_FOREIGN)
        self._waiting: BuildJob | None = None
        self._held: tuple[float, Proposal] | None = None
        self.machine = self._machine(Restored())

    @property
    def account(self) -> bytes | None:
        """The account that votes, None for a follower."""
        return self._config.key.account if self._config.key else None

    @property
    def validators(self) -> ValidatorSet:
        """The set of the height under decision."""
        return self.machine.config.validators

    @property
    def is_wanting(self) -> bool:
        """Whether the height is final although its block is not here."""
        return self.machine.finalization is not None and not self.machine.is_over

    def is_at_genesis(self) -> bool:
        """Whether there is no final block yet."""
        return self.tip.header is None

    def remember(self, finals: Iterable[tuple[ValidatorSet, Certificate]]) -> None:
        """Take the verified certificates of decided heights, oldest first, as a source of evidence."""
        for validators, certificate in finals:
            self.watch.cover(certificate.height, validators)
            self.watch.examine(certificate, is_verified=True)

    def suspect(self, final: FinalBlock) -> None:
        """Look for evidence in the certificates of a served block that does not follow the tip."""
        for certificate in (final.certificate, final.block.parent_certificate):
            if certificate is not None:
                self.witness(certificate)

    def witness(self, certificate: Certificate) -> None:
        """Look for evidence in a served certificate that was refused, at once or when its height is final here."""
        if certificate.chain_id != self.tip.chain_id:
            return
        if self.watch.covers(certificate.height):
            with suppress(Refused):
                self.watch.examine(certificate)
        elif certificate.height > self.tip.height:
            self._foreign.append(certificate)
        else:
            self.jobs.append(CompareJob(certificate))

    def compare(self, job: CompareJob, decided: tuple[ValidatorSet, Certificate] | None) -> None:
        """Look for evidence in a served certificate, given who made its height final and how, if that is kept."""
        if decided is not None:
            with suppress(Refused):
                self.watch.compare(*decided, job.foreign)

    def begin(self, now: float, restored: Restored, pending: bool) -> None:
        """Start the height after the tip."""
        self.machine = self._machine(restored)
        self.watch.cover(self.machine.config.height, self.validators)
        self.executed.clear()
        self._waiting = self._held = None
        self.began = now
        params = self.tip.state.params
        self.pace.interval, self.pace.heartbeat = params.block_interval_ms / 1000, params.heartbeat_ms / 1000
        self.pace.begin(now, pending)
        self._perform(self.machine, self.machine.start(), now)
        for taken in self.gate.release(self.machine, now):
            self._taken(taken, now)

    def adopt(self, tips: Sequence[Tip], blocks: Sequence[Block] = ()) -> None:
        """Take consecutive final tips, made by these blocks; `begin` must follow."""
        self.machine.close()
        is_next = tips[-1].height == self.machine.config.height
        self.previous = self.machine if is_next else None
        self.tip = tips[-1]
        self.remember((tip.signers, tip.certificate) for tip in tips[-RECENT:] if tip.signers and tip.certificate)
        for block in blocks[-RECENT:]:
            if block.parent_certificate is not None:
                self.watch.examine(block.parent_certificate, is_verified=True)
        foreign = list(self._foreign)
        self._foreign.clear()
        for certificate in foreign:
            self.witness(certificate)

    def deliver(self, data: bytes, now: float) -> Disposition:
        """Take one gossiped consensus message."""
        taken = self.gate.take(data, self.machine, self.previous, now)
        self._taken(taken, now)
        return taken.disposition

    def drop_stale_signing(self) -> None:
        """Sign nothing more of heights that are decided."""
        self.signing = deque(job for job in self.signing if job.vote.height > self.tip.height)

    def signed(self, job: SignJob, vote: Vote, now: float) -> None:
        """A vote is durable."""
        if job.machine in (self.machine, self.previous):
            self._perform(job.machine, job.machine.on_signed(vote), now)

    def built(self, job: BuildJob, block: Block, executed: Executed, now: float) -> None:
        """A block is built."""
        self._remember(block, executed)
        self._perform(job.machine, job.machine.on_built(job.view, block), now)

    def validated(self, job: ValidateJob, executed: Executed | None, now: float) -> None:
        """A proposed block is executed, or refused."""
        if executed is not None:
            self._remember(job.block, executed)
        self._perform(job.machine, job.machine.on_validated(job.block.hash, executed is not None), now)

    def tick(self, now: float) -> None:
        """Act on what is due."""
        if self._waiting is not None and now >= self.pace.due:
            self.jobs.append(self._waiting)
            self._waiting = None
        if self._held is not None and now >= self._held[0]:
            held, self._held = self._held[1], None
            if not self.machine.is_over:
                self._broadcast(held)
        view = self.pace.expired(now)
        if view is not None:
            self._perform(self.machine, self.machine.on_timer(view), now)
        if self.pace.is_still(now):
            self._perform(self.machine, self.machine.on_standstill(), now)
            if self.tip.certificate is not None:
                self._broadcast(self.tip.certificate)

    def deadline(self) -> float:
        """When `tick` has something to do."""
        due = self.pace.due if self._waiting else float("inf")
        held = self._held[0] if self._held else float("inf")
        return min(due, held, self.pace.view_deadline, self.pace.standstill_deadline)

    def draft(self, view: int, now_ms: int) -> Draft:
        """Return the proposer's part of a fresh block.

        Raises `LookupError` when there can be none: the onion is used up, or the clock is behind.
        """
        key = self._config.key
        validator = self.tip.state.validator(key.account) if key else None
        if key is None or validator is None:
            raise LookupError("not a validator")
        timestamp = max(now_ms, self.tip.timestamp + 1)
        if timestamp > now_ms + MAX_CLOCK_DRIFT_MS:
            raise LookupError("this machine's clock is behind the chain's time")
        return Draft(key.account, view, timestamp, onion_of(key, validator.onion).below(validator.onion_tip))

    def build_tip(self) -> Tip:
        """Return the tip with all votes for it that have arrived, so that late ones count as present."""
        tip, previous = self.tip, self.previous
        if previous is None or tip.certificate is None:
            return tip
        return Tip(tip.chain_id, tip.state, tip.header, previous.fullest(tip.certificate), tip.signers)

    def _machine(self, restored: Restored) -> Consensus:
        state = self.tip.state
        return Consensus(
            HeightConfig(
                chain_id=self.tip.chain_id,
                height=self.tip.height + 1,
                validators=state.validators(),
                leader_seed=state.leader_seed,
                account=self.account,
                timers=self._config.timers,
                restored_votes=restored.votes,
                restored_proposals=restored.proposals,
            )
        )

    def _remember(self, block: Block, executed: Executed) -> None:
        if len(self.executed) >= MAX_EXECUTED:
            self.executed.pop(next(iter(self.executed)))
        self.executed[block.hash] = executed

    def _taken(self, taken: Taken, now: float) -> None:
        if taken.machine is not None:
            self._perform(taken.machine, taken.effects, now)

    def _perform(self, machine: Consensus, effects: Iterable[Effect], now: float) -> None:
        for effect in effects:
            match effect:
                case Broadcast(Proposal() as message) if message.parent_view:
                    self._held = (now + PATIENCE, message)
                case Broadcast(message):
                    self._broadcast(message)
                case SetTimer(view, seconds):
                    self.pace.enter(view, seconds, now)
                case Build(view):
                    self._build(BuildJob(machine, view), now)
                case Validate(block):
                    self.jobs.append(ValidateJob(machine, block))
                case Sign(vote, proposal):
                    self.signing.append(SignJob(machine, vote, proposal))
                case Decide(block, certificate):
                    self.jobs.append(CommitJob(block, certificate))
                case Accuse(first, second):
                    self.watch.accuse(first, second)
                case _:
                    assert_never(effect)
        if machine is self.machine and machine.proposals:
            self.pace.proposed(now)

    def _build(self, job: BuildJob, now: float) -> None:
        if job.view == 1 and now < self.pace.due:
            self._waiting = job
        else:
            self.jobs.append(job)

    def _broadcast(self, message: ConsensusMessage) -> None:
        self.publish.append(("block" if isinstance(message, Proposal) else "vote", encode(message)))
