"""Who has signed what, over the last heights, and the pairs of votes that convict their signer. Pure.

Every authentic vote that this peer meets is kept once, in a budget of its own signer, so that nobody
can push the votes of others out. The ledger tombstones a validator once: one case a culprit is pursued
until the ledger knows it, by one validator after the other lest all send the same.
"""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from chain.blocks import (
    MAX_VALIDATORS,
    Certificate,
    ConsensusMessage,
    Proposal,
    Reason,
    Refused,
    ValidatorSet,
    Verifier,
    Vote,
    VoteKind,
    chain_of,
    is_conflict,
    verify_vote,
)
from chain.codec import DecodeError, decode, encode
from chain.engine_seam import SubmitRefused, TransactionExpired
from chain.hashing import digest
from chain.keys import peer_id
from chain.ledger import Receipt
from chain.reasons import Reason as LedgerReason
from chain.state import State
from chain.transactions import Evidence, Payload

RECENT = 64
"""Heights below the tip whose certificates are looked at after a restart or after catching up."""
WINDOW = 512
"""Heights below the one under decision whose votes are looked at."""
MAX_VOTES = 32_768
"""Votes kept, of all validators together; about half a kilobyte each."""
TURN_BLOCKS = 2
"""Blocks that each reporter waits longer than the one before it, time enough for evidence to arrive."""
MAX_RANK = 3
MAX_RIVALS = 8
"""Waiting evidence transactions against one culprit that are checked before an own one is sent."""

_log = logging.getLogger("tdml.chain")
_Key = tuple[int, int, VoteKind]


class Sender(Protocol):
    """What the watch needs of this peer's own transactions (`engine_transactions.Transactions`)."""

    def submit(self, payload: Payload, state: State) -> bytes:
        """Send a payload and return its id; raise `SubmitRefused`."""

    def answer(self, tx_id: bytes) -> Receipt | None:
        """Return its receipt, None while it waits; raise `LookupError` or `TransactionExpired`."""

    def evidence(self) -> Iterator[Evidence]:
        """Yield the evidence that waits for a block, of whatever sender."""


@dataclass
class _Case:
    """A pair of votes of `height` that convicts, since when it is known and the transaction that carries it."""

    evidence: Evidence
    height: int
    since: int
    tx_id: bytes | None = None


class Watch:
    """The votes of members at the covered heights and the open cases against them."""

    def __init__(self, check: Verifier, account: bytes | None = None) -> None:
        self._check = check
        self._account = account
        self._sets: dict[int, ValidatorSet] = {}
        self._votes: dict[bytes, dict[_Key, Vote]] = {}
        self._cases: dict[bytes, _Case] = {}
        self._height = 0
        self.has_news = False
        """Whether a case was opened since `pursue` was last called."""

    def __len__(self) -> int:
        return sum(map(len, self._votes.values()))

    def cover(self, height: int, validators: ValidatorSet) -> None:
        """Look at votes of `height`, which these validators decide, from now on."""
        before = self._sets.get(height - 1)
        self._sets[height] = before if before is not None and before.hash == validators.hash else validators
        self._height = max(self._height, height)
        while (oldest := next(iter(self._sets))) < self._height - WINDOW:
            del self._sets[oldest]
        if height % WINDOW == 0:
            self._forget(self._height - WINDOW)

    def _forget(self, height: int) -> None:
        """Drop the votes below `height`."""
        for account, votes in list(self._votes.items()):
            self._votes[account] = {key: vote for key, vote in votes.items() if key[0] >= height}
            if not self._votes[account]:
                del self._votes[account]

    def covers(self, height: int) -> bool:
        """Whether votes of this height are looked at."""
        return height in self._sets

    def examine(self, message: ConsensusMessage, *, is_verified: bool = False) -> bool:
        """Remember the votes in `message`, of a covered height; whether one of them convicts its signer.

        Unless they are verified already, checks every signature that is new here; raises `Refused`
        for a vote that no member signed.
        """
        validators = self._sets.get(chain_of(message)[1])
        if validators is None:
            return False
        news = self._news(message, validators, is_verified=is_verified)
        return sum(self._remember(vote) for vote in news) > 0

    def _news(self, message: ConsensusMessage, validators: ValidatorSet, *, is_verified: bool) -> Iterator[Vote]:
        """Yield the authentic votes in `message` that say something not remembered."""
        for vote in _votes_in(message, validators):
            held = self._votes.get(vote.validator, {}).get((vote.height, vote.view, vote.kind))
            if held is None or held.block_hash != vote.block_hash:
                if not is_verified:
                    verify_vote(vote, validators, self._check)
                yield vote

    def _remember(self, vote: Vote) -> bool:
        votes = self._votes.setdefault(vote.validator, {})
        others = (votes.get((vote.height, vote.view, kind)) for kind in VoteKind)
        rival = next((other for other in others if other is not None and is_conflict(other, vote)), None)
        votes.setdefault((vote.height, vote.view, vote.kind), vote)
        if len(votes) > max(MAX_VOTES // max(len(self._votes), 1), 1):
            del votes[next(iter(votes))]
        return rival is not None and self.accuse(rival, vote)

    def compare(self, validators: ValidatorSet, final: Certificate, foreign: Certificate) -> None:
        """Open cases against who signed both, the certificate that is final here and another of its height.

        Raises `Refused` for a vote in `foreign` that nobody signed.
        """
        theirs = {vote.validator: vote for vote in _votes_in(foreign, validators)}
        for vote in _votes_in(final, validators):
            other = theirs.get(vote.validator)
            if other is not None and is_conflict(vote, other):
                verify_vote(other, validators, self._check)
                self.accuse(vote, other)

    def accuse(self, first: Vote, second: Vote) -> bool:
        """Open a case on two authentic, conflicting votes; whether it is a new one."""
        culprit = first.validator
        if culprit in self._cases or culprit == self._account or len(self._cases) >= MAX_VALIDATORS:
            return False
        _log.warning("%s signed two conflicting votes of height %d", peer_id(culprit), first.height)
        self._cases[culprit] = _Case(Evidence(encode(first), encode(second)), first.height, self._height)
        self.has_news = True
        return True

    def open_cases(self) -> tuple[Evidence, ...]:
        """Return what convicts, of every culprit that the ledger has not punished yet."""
        return tuple(case.evidence for case in self._cases.values())

    def reopen(self, cases: Iterable[Evidence]) -> None:
        """Open the cases again that were open before a restart."""
        for pair in filter(None, map(_pair, cases)):
            self.accuse(*pair)

    def pursue(self, state: State, sender: Sender) -> bool:
        """Send the cases that the ledger lacks and forget those it knows; whether anything was sent."""
        self.has_news = False
        sent = False
        for culprit, case in list(self._cases.items()):
            if _is_known(case, culprit, state) or not _is_open(case, sender):
                del self._cases[culprit]
            elif case.tx_id is None and self._is_turn(culprit, case, state) and not self._rivalled(culprit, sender):
                sent = _submit(case, state, sender) or sent
        return sent

    def _is_turn(self, culprit: bytes, case: _Case, state: State) -> bool:
        """Whether those who report this culprit before this peer have had their time."""
        reporters = [account for account in state.validators().powers if account != culprit]
        reporters.sort(key=lambda account: digest("reporter", culprit, account))
        rank = reporters.index(self._account) if self._account in reporters else MAX_RANK
        return state.height + 1 - case.since >= TURN_BLOCKS * min(rank, MAX_RANK)

    def _rivalled(self, culprit: bytes, sender: Sender) -> bool:
        """Whether sound evidence against the culprit waits in the mempool already."""
        against = [pair for pair in map(_pair, sender.evidence()) if pair and pair[0].validator == culprit]
        return any(
            is_conflict(*pair) and all(self._check(culprit, vote.signing_bytes, vote.signature) for vote in pair)
            for pair in against[:MAX_RIVALS]
        )


def _votes_in(message: ConsensusMessage, validators: ValidatorSet) -> Iterator[Vote]:
    match message:
        case Proposal():
            yield message.vote
        case Vote():
            yield message
        case Certificate():
            accounts = message.accounts(validators)
            if len(accounts) != len(message.signatures):
                raise Refused(Reason.BAD_BITMAP)
            said = (message.kind, message.chain_id, message.height, message.view, message.block_hash)
            for account, signature in zip(accounts, message.signatures, strict=True):
                yield Vote(*said, account, signature)


def _is_known(case: _Case, culprit: bytes, state: State) -> bool:
    """Whether the ledger has punished the culprit, or knows nobody that it could punish."""
    validator = state.validator(state.heir(culprit))
    return state.height >= case.height if validator is None else validator.is_tombstoned


def _is_open(case: _Case, sender: Sender) -> bool:
    """Whether the case needs a transaction still; one that was lost or expired is to be sent again."""
    if case.tx_id is None:
        return True
    try:
        receipt = sender.answer(case.tx_id)
    except (LookupError, TransactionExpired):
        case.tx_id = None
        return True
    if receipt is not None and receipt.reason == LedgerReason.EVIDENCE_EARLY:
        case.tx_id = None
    elif receipt is not None and not receipt.ok:
        _log.warning("the ledger refused evidence: %s", receipt.reason)
        return False
    return True


def _submit(case: _Case, state: State, sender: Sender) -> bool:
    try:
        case.tx_id = sender.submit(case.evidence, state)
    except SubmitRefused as refusal:
        _log.info("evidence waits: %s", refusal)
        return False
    return True


def _pair(evidence: Evidence) -> tuple[Vote, Vote] | None:
    try:
        return decode(Vote, evidence.first), decode(Vote, evidence.second)
    except DecodeError:
        return None
