"""The consensus state machine of one height: single-shot Simplex weighted by stake, without I/O.

Safety. W is the total power, q = floor(2W/3) + 1 the power of a certificate. Two quorums share more
than W/3 of the power, hence an honest member while the faulty hold at most W/3. An honest member
notarizes one block per view, and never both nullifies and finalizes one view. So when block B is
finalized in view v, no other block is notarized in v and v has no nullification. A proposal of a
later view must name a notarized parent view with nullifications for every view between; it cannot
pass over v, so by induction over the views every block notarized after v is B again.

Accountability. A fork needs two quorums that contradict each other in one view, and their common
members of more than W/3 of the power have then signed two conflicting votes (`blocks.is_conflict`):
the certificates themselves name them. An honest member finalizes only what it notarized and what it
has not nullified, so nothing that it signs ever conflicts; that holds across crashes because the
driver makes every vote durable before it answers `Sign`. Liveness: every certificate is sent on by
everyone who obtains it, so honest members enter the same views; the timers grow until one honest
leader's proposal is notarized and finalized within its view.

Sources: Simplex Consensus (ePrint 2023/463); its single-shot form with re-proposals.
"""

from typing import Final

from msgspec import structs

from chain.blocks import Block, Certificate, Proposal, Vote, VoteKind, proposal_subject
from chain.consensus.effects import (
    Accuse,
    Broadcast,
    Build,
    Decide,
    Effect,
    HeightConfig,
    SetTimer,
    Sign,
    Validate,
)
from chain.consensus.standstill import Standstill
from chain.consensus.tally import Tally
from chain.hashing import ZERO
from chain.randomness import leader

HORIZON: Final = 32
"""Votes and proposals of views further ahead (or forgotten views further back) are not kept."""
_UNSIGNED: Final = bytes(64)
_NO_VIEW: Final = (0, None)


class Consensus:
    """Single-shot Simplex for one height. Messages must be authentic (`blocks.verify_message`)."""

    def __init__(self, config: HeightConfig) -> None:
        self.config = config
        self.view = 0
        self.is_over = False
        self.tally = Tally(config.validators)
        self.proposals: dict[int, Proposal] = {}
        self._blocks: dict[bytes, Block] = {}
        self._valid: dict[bytes, bool | None] = {}
        self._asked: dict[tuple[int, VoteKind], bytes] = {}
        self._own: dict[tuple[int, VoteKind], Vote] = {}
        self._drafts: dict[int, Proposal] = {}
        self._building = 0
        self._accused: set[bytes] = set()
        place = config.validators.positions.get(config.account or ZERO, 0)
        self._standstill = Standstill(place, len(config.validators))
        self._out: list[Effect] = []

    @property
    def is_voter(self) -> bool:
        """Whether this peer is a member of the height's set."""
        return self.config.account is not None and self.config.account in self.config.validators

    @property
    def finalization(self) -> Certificate | None:
        """The finalization certificate, which may be held before its block is known."""
        return next((c for (_, kind), c in self.tally.certificates.items() if kind == VoteKind.FINALIZE), None)

    def leader(self, view: int) -> bytes:
        """Return the account that leads `view`."""
        return leader(self.config.validators, self.config.leader_seed, self.config.height, view)

    # Events. Each returns the effects for the driver, in order.

    def start(self) -> list[Effect]:
        """Enter view 1 after repeating what this validator signed before a restart."""
        for proposal in self.config.restored_proposals:
            self._keep(proposal)
        for vote in self.config.restored_votes:
            self._asked[vote.view, vote.kind] = vote.block_hash
            self._own[vote.view, vote.kind] = vote
        self._enter(1)
        for vote in self.config.restored_votes:
            self._publish(vote)
        return self._drain()

    def on_proposal(self, proposal: Proposal) -> list[Effect]:
        """Take a proposal of this height."""
        self._propose_received(proposal)
        return self._drain()

    def on_vote(self, vote: Vote) -> list[Effect]:
        """Take a vote of this height."""
        forgotten = vote.view < self.view - HORIZON and self.tally.is_nullified(vote.view)
        if vote.view <= self.view + HORIZON and not forgotten:
            self._record(vote)
        return self._drain()

    def on_certificate(self, certificate: Certificate) -> list[Effect]:
        """Take a certificate of this height, of any view."""
        held = self.tally.certificates.get((certificate.view, certificate.kind))
        if held is None or held.block_hash != certificate.block_hash:
            self._absorb(certificate)
            self._certified(certificate)
        return self._drain()

    def on_timer(self, view: int) -> list[Effect]:
        """The time of `view` is over."""
        if view == self.view:
            self._nullify(view)
        return self._drain()

    def on_built(self, view: int, block: Block) -> list[Effect]:
        """A fresh block is ready for `view`; it is valid by construction."""
        self._valid[block.hash] = True
        if view == self.view and self._base(view) == _NO_VIEW:
            self._propose_block(block, 0)
        return self._drain()

    def on_validated(self, block_hash: bytes, ok: bool) -> list[Effect]:
        """A block was executed; `ok` when it is valid and reaches its state root."""
        self._valid[block_hash] = ok
        self._consider()
        return self._drain()

    def on_signed(self, vote: Vote) -> list[Effect]:
        """The vote of a `Sign` effect is durable and signed."""
        self._own[vote.view, vote.kind] = vote
        self._publish(vote)
        if vote.kind == VoteKind.NOTARIZE:
            self._finalize(vote.view)
        return self._drain()

    def on_standstill(self) -> list[Effect]:
        """Nothing progresses: resend what others may lack, within a byte cap."""
        messages = self._standstill.messages(self.tally.certificates, self._own, self._telling_proposals())
        self._out += map(Broadcast, messages)
        return self._drain()

    def fullest(self, certificate: Certificate) -> Certificate:
        """Return `certificate` with every vote for the same that has arrived since."""
        return self.tally.fullest(certificate)

    def close(self) -> None:
        """The height was decided elsewhere: sign and decide nothing more, only watch for conflicts."""
        self.is_over = True

    # Rules.

    def _enter(self, view: int) -> None:
        self.view = view
        self._forget(view - HORIZON)
        # A block whose time had not come here is looked at again where a quorum notarized it.
        self._valid = {block_hash: ok for block_hash, ok in self._valid.items() if ok is not False}
        self._out.append(SetTimer(view, self.config.timers.seconds(view)))
        if self.tally.vote_of(view, VoteKind.NULLIFY, self.leader(view)):
            self._nullify_early(view)
        self._propose()
        self._consider()

    def _forget(self, view: int) -> None:
        """Drop the votes and the block of a view that came to nothing."""
        if self.tally.is_nullified(view) and self.tally.notarized(view) is None:
            self.tally.forget_votes(view)
            proposal = self.proposals.pop(view, None)
            if proposal is not None and proposal.parent_view == 0:
                self._blocks.pop(proposal.block.hash, None)

    def _propose(self) -> None:
        view = self.view
        if not self._may_sign(view, VoteKind.PROPOSE) or self.leader(view) != self.config.account:
            return
        base = self._base(view)
        if base is None:
            return
        parent_view, block_hash = base
        if block_hash is None:
            if self._building != view:
                self._building = view
                self._out.append(Build(view))
        elif block_hash in self._blocks:
            self._propose_block(self._blocks[block_hash], parent_view)

    def _propose_block(self, block: Block, parent_view: int) -> None:
        view = self.view
        if not self._may_sign(view, VoteKind.PROPOSE):
            return
        subject = proposal_subject(block.hash, parent_view)
        draft = Proposal(self._unsigned(VoteKind.PROPOSE, view, subject), parent_view, block)
        self._drafts[view] = draft
        self._ask(draft.vote, draft)

    def _base(self, view: int) -> tuple[int, bytes | None] | None:
        """Return what a proposal of `view` must build on: (view, block hash), (0, None) or not known yet."""
        for earlier in range(view - 1, 0, -1):
            block_hash, passable = self.tally.notarized(earlier), self._is_passable(earlier)
            # A block that is not here may be withheld for ever; past a nullified view nobody needs it.
            if block_hash is not None and (block_hash in self._blocks or not passable):
                return earlier, block_hash
            if not passable:
                return None
        return _NO_VIEW

    def _is_passable(self, view: int) -> bool:
        return self.tally.is_nullified(view)

    def _propose_received(self, proposal: Proposal) -> None:
        vote = proposal.vote
        if vote.view > self.view + HORIZON or vote.validator != self.leader(vote.view):
            return
        self._record(vote)
        self._keep(proposal)
        self._decide()
        self._propose()
        self._consider()

    def _keep(self, proposal: Proposal) -> None:
        block, view = proposal.block, proposal.vote.view
        if view not in self.proposals:
            self.proposals[view] = proposal
        certified = any(c.block_hash == block.hash for c in self.tally.certificates.values())
        if certified or self.proposals[view] == proposal:
            self._blocks.setdefault(block.hash, block)

    def _consider(self) -> None:
        """Notarize the current view's proposal once it is acceptable; nullify when it never can be."""
        view, proposal = self.view, self.proposals.get(self.view)
        if proposal is None or not self._may_sign(view, VoteKind.NOTARIZE):
            return
        block = proposal.block
        acceptable = self._acceptable(proposal)
        if acceptable and block.hash not in self._valid:
            self._valid[block.hash] = None
            self._out.append(Validate(block))
        elif acceptable is False or (acceptable and self._valid[block.hash] is False):
            self._nullify_early(view)
        elif acceptable and self._valid[block.hash]:
            self._ask(self._unsigned(VoteKind.NOTARIZE, view, block.hash), proposal)

    def _acceptable(self, proposal: Proposal) -> bool | None:
        """Whether the proposal follows the rules; None while certificates are missing."""
        view, parent_view, header = proposal.vote.view, proposal.parent_view, proposal.block.header
        origin = view if parent_view == 0 else header.view
        if parent_view >= view or header.view != origin or header.proposer != self.leader(origin):
            return False
        if parent_view and header.view > parent_view:
            return False
        if parent_view:
            block_hash = self.tally.notarized(parent_view)
            if block_hash is None:
                return None
            if block_hash != proposal.block.hash:
                return False
        return all(map(self._is_passable, range(parent_view + 1, view))) or None

    def _nullify(self, view: int) -> None:
        if self._may_sign(view, VoteKind.NULLIFY):
            self._ask(self._unsigned(VoteKind.NULLIFY, view, ZERO), None)

    def _nullify_early(self, view: int) -> None:
        """Give up a hopeless view at once, until each has led; later ones take their time, lest views race."""
        if view <= len(self.config.validators):
            self._nullify(view)

    def _finalize(self, view: int) -> None:
        block_hash = self.tally.notarized(view)
        if block_hash and self._may_sign(view, VoteKind.FINALIZE) and self._has_notarized(view, block_hash):
            self._ask(self._unsigned(VoteKind.FINALIZE, view, block_hash), None)

    def _has_notarized(self, view: int, block_hash: bytes) -> bool:
        own = self._own.get((view, VoteKind.NOTARIZE))
        return own is not None and own.block_hash == block_hash

    def _may_sign(self, view: int, kind: VoteKind) -> bool:
        """Whether this validator has signed nothing in `view` that forbids a vote of this kind."""
        forbids = {
            VoteKind.PROPOSE: (VoteKind.PROPOSE, VoteKind.NULLIFY),
            VoteKind.NOTARIZE: (VoteKind.NOTARIZE, VoteKind.NULLIFY, VoteKind.FINALIZE),
            VoteKind.NULLIFY: (VoteKind.NULLIFY, VoteKind.FINALIZE),
            VoteKind.FINALIZE: (VoteKind.NULLIFY, VoteKind.FINALIZE),
        }[kind]
        return self.is_voter and not self.is_over and not any((view, other) in self._asked for other in forbids)

    def _record(self, vote: Vote) -> None:
        held = self.tally.vote_of(vote.view, vote.kind, vote.validator)
        if held is not None and held.block_hash == vote.block_hash:
            return
        other = self.tally.conflict(vote)
        if other is not None and vote.validator not in self._accused:
            self._accused.add(vote.validator)
            self._out.append(Accuse(other, vote))
        if not self.tally.add(vote) or vote.kind == VoteKind.PROPOSE:
            return
        key = (vote.view, vote.kind)
        certificate = None if key in self.tally.certificates else self.tally.certificate_for(vote)
        if certificate is not None:
            self._certified(certificate)
        elif (vote.view, vote.kind, vote.validator) == (self.view, VoteKind.NULLIFY, self.leader(self.view)):
            self._nullify_early(vote.view)

    def _absorb(self, certificate: Certificate) -> None:
        """Count the votes inside a certificate: contradicting certificates name their culprits."""
        if certificate.view > self.view + HORIZON:
            return
        accounts = certificate.accounts(self.config.validators)
        for account, signature in zip(accounts, certificate.signatures, strict=True):
            vote = self._unsigned(certificate.kind, certificate.view, certificate.block_hash)
            self._record(structs.replace(vote, validator=account, signature=signature))

    def _certified(self, certificate: Certificate) -> None:
        view, kind = certificate.view, certificate.kind
        if (view, kind) in self.tally.certificates or self.is_over:
            return
        self.tally.certificates[view, kind] = certificate
        self._rebroadcast(certificate)
        if kind == VoteKind.FINALIZE:
            self._decide()
            return
        if kind == VoteKind.NOTARIZE:
            self._finalize(view)
        if view >= self.view:
            self._enter(view + 1)
        else:
            self._propose()
            self._consider()

    def _rebroadcast(self, certificate: Certificate) -> None:
        self._out.append(Broadcast(certificate))

    def _decide(self) -> None:
        certificate = self.finalization
        if certificate is not None and not self.is_over and certificate.block_hash in self._blocks:
            self._attend(certificate)
            self.is_over = True
            self._out.append(Decide(self._blocks[certificate.block_hash], certificate))

    def _attend(self, certificate: Certificate) -> None:
        """Sign what a quorum has finalized already, so that being late does not count as being absent."""
        view, block_hash = certificate.view, certificate.block_hash
        notarized = self._asked.get((view, VoteKind.NOTARIZE), block_hash)
        if notarized == block_hash and self._may_sign(view, VoteKind.FINALIZE):
            self._ask(self._unsigned(VoteKind.FINALIZE, view, block_hash), None)

    # Own signatures and resending.

    def _unsigned(self, kind: VoteKind, view: int, block_hash: bytes) -> Vote:
        config = self.config
        return Vote(kind, config.chain_id, config.height, view, block_hash, config.account or ZERO, _UNSIGNED)

    def _ask(self, vote: Vote, proposal: Proposal | None) -> None:
        self._asked[vote.view, vote.kind] = vote.block_hash
        self._out.append(Sign(vote, proposal))

    def _publish(self, vote: Vote) -> None:
        """Send an own signed vote and count it."""
        if vote.kind != VoteKind.PROPOSE:
            self._out.append(Broadcast(vote))
            self._record(vote)
            return
        draft = self._drafts.pop(vote.view, None) or self.proposals.get(vote.view)
        if draft is not None and proposal_subject(draft.block.hash, draft.parent_view) == vote.block_hash:
            proposal = Proposal(vote, draft.parent_view, draft.block)
            self._out.append(Broadcast(proposal))
            self._propose_received(proposal)

    def _telling_proposals(self) -> list[Proposal]:
        """The proposals without which others cannot vote or decide: the current one and the notarized one."""
        views = {self.view}
        notarized = [view for view, kind in self.tally.certificates if kind == VoteKind.NOTARIZE]
        if notarized:
            views.add(max(notarized))
        own = {view for view, kind in self._own if kind == VoteKind.FINALIZE}
        views.update(sorted(own)[-1:])
        return [self.proposals[view] for view in sorted(views) if view in self.proposals]

    def _drain(self) -> list[Effect]:
        out, self._out = self._out, []
        return out
