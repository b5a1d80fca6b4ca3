"""What a gossip validator answers about chain messages, and what they tell about the others. Pure."""

from collections import Counter, deque
from dataclasses import dataclass, field
from enum import StrEnum

from chain.blocks import (
    Certificate,
    ConsensusMessage,
    Proposal,
    Reason,
    Refused,
    ValidatorSet,
    Verifier,
    Vote,
    chain_of,
    decode_message,
    verify_message,
)
from chain.codec import DecodeError
from chain.consensus import HORIZON, Consensus, Effect
from chain.evidence import Watch
from chain.keys import peer_id

MAX_BUFFERED = 512
MAX_BUFFERED_BY_ONE = 32
"""Messages of the next heights that are kept of one signer."""
MAX_BUFFERED_BYTES = 8 * 1024 * 1024
MAX_BYTES_OF_ONE = 2 * 1024 * 1024 + 64 * 1024
"""Bytes of them of one signer: room for a full block of each height."""
MAX_AHEAD = 2
"""Heights beyond the one under decision whose messages are kept."""
SILENCE_SECONDS = 12.0
UNEXPLAINED_SECONDS = 90.0
"""How long a height may stand still although a quorum is heard before that is said."""


class Action(StrEnum):
    """What gossip does with a message."""

    ACCEPT = "accept"  # "New and authentic: pass it on."
    IGNORE = "ignore"  # "Of no use here: drop it, blame nobody."
    REJECT = "reject"  # "False: drop it and blame the sender."


@dataclass(frozen=True)
class Disposition:
    """An action and, unless the message was taken, its named reason."""

    action: Action
    reason: str = ""


ACCEPTED = Disposition(Action.ACCEPT)
FUTURE = Disposition(Action.IGNORE, "future-height")


def ignored(reason: str) -> Disposition:
    """Return the disposition of a useless message."""
    return Disposition(Action.IGNORE, reason)


def rejected(reason: str) -> Disposition:
    """Return the disposition of a false message."""
    return Disposition(Action.REJECT, reason)


@dataclass(frozen=True)
class Taken:
    """A message's disposition, the machine that took it and what that machine asks for."""

    disposition: Disposition
    machine: Consensus | None = None
    effects: tuple[Effect, ...] = ()


def feed(machine: Consensus, message: ConsensusMessage) -> list[Effect]:
    """Give an authentic message to a machine of its height."""
    match message:
        case Proposal():
            return machine.on_proposal(message)
        case Vote():
            return machine.on_vote(message)
        case Certificate():
            return machine.on_certificate(message)


@dataclass
class Gate:
    """Sorts consensus messages by height, authenticates them and feeds them to the machines."""

    chain_id: bytes
    check: Verifier
    watch: Watch
    counts: Counter[str] = field(default_factory=Counter)
    heard: dict[bytes, float] = field(default_factory=dict)
    _buffer: deque[tuple[ConsensusMessage, int]] = field(default_factory=deque)
    _buffered: int = 0
    _kept: Counter[bytes] = field(default_factory=Counter)
    _kept_bytes: Counter[bytes] = field(default_factory=Counter)

    @property
    def buffered(self) -> tuple[int, int]:
        """How many messages of the next heights are kept, and their bytes."""
        return len(self._buffer), self._buffered

    def count(self, topic: str, disposition: Disposition) -> Disposition:
        """Count a disposition under "topic action reason"."""
        self.counts[" ".join(filter(None, (topic, disposition.action, disposition.reason)))] += 1
        return disposition

    def take(self, data: bytes, machine: Consensus, previous: Consensus | None, now: float) -> Taken:
        """Decode, authenticate and feed one gossiped message."""
        try:
            message = decode_message(data)
        except DecodeError:
            return Taken(rejected(Reason.MALFORMED))
        chain_id, height = chain_of(message)
        current = machine.config.height
        if chain_id != self.chain_id:
            return Taken(rejected(Reason.WRONG_CHAIN))
        if height > current:
            return Taken(self._keep_early(message, machine, len(data)))
        if height < current and (previous is None or height != current - 1):
            return Taken(self._look_back(message))
        return self._feed(message, machine if height == current else previous or machine, now)

    def release(self, machine: Consensus, now: float) -> list[Taken]:
        """Feed what was kept for the height of `machine`."""
        kept, self._buffer, self._buffered = self._buffer, deque(), 0
        self._kept.clear()
        self._kept_bytes.clear()
        taken = []
        for message, size in kept:
            height = chain_of(message)[1]
            if height == machine.config.height:
                taken.append(self._feed(message, machine, now))
            elif height > machine.config.height:
                self._keep(message, size)
        return taken

    def _keep_early(self, message: ConsensusMessage, machine: Consensus, size: int) -> Disposition:
        """Keep a message of one of the next heights if a member, as far as is known, signed it.

        What is false under any set of validators is refused by name: else it would cost nothing but our checks.
        """
        if chain_of(message)[1] > machine.config.height + MAX_AHEAD or _view(message) > HORIZON:
            return FUTURE
        try:
            verify_message(message, machine.config.validators, self.check)
        except Refused as refusal:
            is_forged = refusal.reason is Reason.BAD_SIGNATURE and not isinstance(message, Certificate)
            is_false = is_forged or refusal.reason in (Reason.WRONG_KIND, Reason.WRONG_BLOCK)
            return rejected(refusal.reason) if is_false else FUTURE
        self._keep(message, size)
        return FUTURE

    def _keep(self, message: ConsensusMessage, size: int) -> None:
        signer = _signer(message)
        full = len(self._buffer) >= MAX_BUFFERED or self._buffered + size > MAX_BUFFERED_BYTES
        enough = self._kept[signer] >= MAX_BUFFERED_BY_ONE or self._kept_bytes[signer] + size > MAX_BYTES_OF_ONE
        if not full and not enough:
            self._kept[signer] += 1
            self._kept_bytes[signer] += size
            self._buffer.append((message, size))
            self._buffered += size

    def _look_back(self, message: ConsensusMessage) -> Disposition:
        """Take from a message of a decided height what convicts; only that is worth passing on."""
        try:
            return ACCEPTED if self.watch.examine(message) else ignored("past-height")
        except Refused as refusal:
            return rejected(refusal.reason)

    def _feed(self, message: ConsensusMessage, machine: Consensus, now: float) -> Taken:
        if _is_known(message, machine):
            disposition = self._look_back(message)
            if disposition.action is not Action.REJECT:
                self._hear(message, machine.config.validators, now)
            return Taken(ignored("known") if disposition.action is Action.IGNORE else disposition)
        if not isinstance(message, Certificate) and _view(message) > machine.view + HORIZON:
            return Taken(ignored("far-view"))
        if isinstance(message, Proposal) and message.vote.validator != machine.leader(message.vote.view):
            return Taken(rejected("wrong-leader"))
        try:
            verify_message(message, machine.config.validators, self.check)
        except Refused as refusal:
            return Taken(rejected(refusal.reason))
        self._hear(message, machine.config.validators, now)
        self.watch.examine(message, is_verified=True)
        parent = message.block.parent_certificate if isinstance(message, Proposal) else None
        if parent is not None:
            self._look_back(parent)
        return Taken(ACCEPTED, machine, tuple(feed(machine, message)))

    def _hear(self, message: ConsensusMessage, validators: ValidatorSet, now: float) -> None:
        if isinstance(message, Certificate):
            for account in message.accounts(validators):
                self.heard.setdefault(account, now)
        else:
            self.heard[_signer(message)] = now


def _view(message: ConsensusMessage) -> int:
    return message.vote.view if isinstance(message, Proposal) else message.view


def _signer(message: ConsensusMessage) -> bytes:
    """Return who signed a message, empty for a certificate."""
    match message:
        case Proposal():
            return message.vote.validator
        case Vote():
            return message.validator
        case Certificate():
            return b""


def _is_known(message: ConsensusMessage, machine: Consensus) -> bool:
    match message:
        case Proposal():
            return machine.proposals.get(message.vote.view) == message
        case Vote():
            return machine.tally.vote_of(message.view, message.kind, message.validator) == message
        case Certificate():
            held = machine.tally.certificates.get((message.view, message.kind))
            return held is not None and held.block_hash == message.block_hash


def power_heard(gate: Gate, validators: ValidatorSet, own: bytes | None, now: float) -> int:
    """Return the power of the validators heard from lately; one's own counts."""
    return sum(
        power
        for account, power in validators.members
        if account == own or now - gate.heard.get(account, float("-inf")) < SILENCE_SECONDS
    )


def halted_reason(gate: Gate, validators: ValidatorSet, own: bytes | None, now: float, stalled: float) -> str | None:
    """Return in a sentence why no block has become final for `stalled` seconds, None while that is no wonder.

    Validators that wait say the same again and again, and anybody can repeat it for one that is gone: hearing
    a quorum explains a short wait only.
    """
    power = power_heard(gate, validators, own, now)
    if power >= validators.quorum:
        if stalled < UNEXPLAINED_SECONDS:
            return None
        return (
            f"The chain waits: no block has become final for {stalled:.0f} seconds although validators with enough "
            "stake are heard. Some of them cannot reach each other, or others repeat what they said."
        )
    silent = [
        peer_id(account)
        for account, _ in validators.members
        if account != own and now - gate.heard.get(account, float("-inf")) >= SILENCE_SECONDS
    ]
    share = 100 * (validators.total - power) // validators.total
    names = ", ".join(silent[:3]) + (f" and {len(silent) - 3} more" if len(silent) > 3 else "")
    return (
        f"The chain waits: validators with {share} % of the stake are silent ({names}). "
        "It goes on by itself when enough of them return."
    )
