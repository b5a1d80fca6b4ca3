"""Consensus with one rule broken each: the simulation must notice every one of them."""

from dataclasses import dataclass, replace

from chain.blocks import Certificate, Proposal, ValidatorSet, Vote, VoteKind
from chain.consensus import Consensus, Effect, HeightConfig
from chain.consensus.tally import Tally


@dataclass(frozen=True)
class Mutation:
    """What differs from the real thing, the mode whose seeds show it, and within how many of them."""

    machine_type: type[Consensus] = Consensus
    set_type: type[ValidatorSet] = ValidatorSet
    keeps_record: bool = True
    keeps_proposals: bool = True
    mode: str = "mixed"
    symptom: str = ""
    """A word of the oracle's complaint."""
    budget: int = 100
    """The mutant must be killed by one of the seeds below this."""


class LowQuorumSet(ValidatorSet, frozen=True):
    """A quorum of floor(2W/3), one too little."""

    @property
    def quorum(self) -> int:
        return 2 * self.total // 3


class FinalizesWhatItDidNotNotarize(Consensus):
    """Signs Finalize for every notarized block."""

    def _has_notarized(self, view: int, block_hash: bytes) -> bool:
        return True


class SkipsNullifications(Consensus):
    """Proposes a fresh block over views that are not known to be nullified, and accepts such proposals."""

    def _base(self, view: int) -> tuple[int, bytes | None] | None:
        return (0, None)

    def _is_passable(self, view: int) -> bool:
        return True


class NeverRebroadcasts(Consensus):
    """Sends own votes once, and nobody's certificates."""

    def _rebroadcast(self, certificate: Certificate) -> None:
        pass

    def on_standstill(self) -> list[Effect]:
        return []


class NullifiesWhatItFinalized(Consensus):
    """Forgets on the timer that it has signed Finalize in the view."""

    def _nullify(self, view: int) -> None:
        self._asked.pop((view, VoteKind.FINALIZE), None)
        super()._nullify(view)


class FinalizesWhatItNullified(Consensus):
    """Forgets on a late notarization that it has signed Nullify in the view."""

    def _finalize(self, view: int) -> None:
        self._asked.pop((view, VoteKind.NULLIFY), None)
        super()._finalize(view)


class IgnoresTheParent(Consensus):
    """Accepts a proposal without looking whether its parent view notarized that block."""

    def _acceptable(self, proposal: Proposal) -> bool | None:
        view, parent_view = proposal.vote.view, proposal.parent_view
        if parent_view == 0:
            return super()._acceptable(proposal)
        return all(map(self._is_passable, range(parent_view + 1, view))) or None


class NotarizesTwice(Consensus):
    """Notarizes every acceptable proposal of a view, not only the first."""

    def _keep(self, proposal: Proposal) -> None:
        view = proposal.vote.view
        if self.proposals.get(view, proposal) != proposal:
            del self.proposals[view]
            self._asked.pop((view, VoteKind.NOTARIZE), None)
        super()._keep(proposal)


class ProposesSomethingElse(Consensus):
    """Proposes a fresh block although an earlier view is notarized."""

    def _base(self, view: int) -> tuple[int, bytes | None] | None:
        base = super()._base(view)
        return base and (0, None)


class ProposesTheFirstAgain(Consensus):
    """Proposes the lowest instead of the highest notarized block again."""

    def _base(self, view: int) -> tuple[int, bytes | None] | None:
        base = super()._base(view)
        if base is None or base[0] == 0:
            return base
        return next((v, h) for v in range(1, view) if (h := self.tally.notarized(v)) is not None)


class ImpatientForEver(Consensus):
    """Gives every view the time of the first."""

    def __init__(self, config: HeightConfig) -> None:
        super().__init__(replace(config, timers=replace(config.timers, growth=1.0)))


class NeverJumps(Consensus):
    """Enters the next view by the certificate of the current one only."""

    def _enter(self, view: int) -> None:
        if view <= self.view + 1:
            super()._enter(view)


class ProposesTwice(Consensus):
    """Proposes again after a restart, as if it had not before."""

    def __init__(self, config: HeightConfig) -> None:
        super().__init__(config)
        self._restored = {vote.view for vote in config.restored_votes if vote.kind == VoteKind.PROPOSE}

    def _enter(self, view: int) -> None:
        if view in self._restored:
            self._asked.pop((view, VoteKind.PROPOSE), None)
        super()._enter(view)


class CountsRepeats(Tally):
    """Counts a vote as often as it arrives."""

    def add(self, vote: Vote) -> bool:
        self._votes[vote.view].pop((vote.kind, vote.validator), None)
        return super().add(vote)


class RepeatsCount(Consensus):
    """Takes a vote that arrives twice for two."""

    def __init__(self, config: HeightConfig) -> None:
        super().__init__(config)
        self.tally = CountsRepeats(config.validators)


MUTANTS: dict[str, Mutation] = {
    "quorum-of-2W//3": Mutation(set_type=LowQuorumSet, symptom="quorum"),
    "quorum-of-2W//3-forks": Mutation(set_type=LowQuorumSet, symptom="fork"),
    "finalizes-unnotarized": Mutation(FinalizesWhatItDidNotNotarize, symptom="accused"),
    "skips-nullifications": Mutation(SkipsNullifications, symptom="fork"),
    "nullifies-finalized": Mutation(NullifiesWhatItFinalized, symptom="accused"),
    "finalizes-nullified": Mutation(FinalizesWhatItNullified, symptom="accused"),
    "never-rebroadcasts": Mutation(NeverRebroadcasts, mode="lossy", symptom="stuck"),
    "record-lost-at-crash": Mutation(keeps_record=False, symptom="accused"),
    "proposal-not-durable": Mutation(keeps_proposals=False, symptom="stuck"),
    "ignores-the-parent": Mutation(IgnoresTheParent, mode="byzantine", symptom="unfounded"),
    "notarizes-twice": Mutation(NotarizesTwice, mode="byzantine", symptom="conflict"),
    "proposes-something-else": Mutation(ProposesSomethingElse, symptom="unfounded"),
    "proposes-the-first-again": Mutation(ProposesTheFirstAgain, symptom="unfounded"),
    "impatient-for-ever": Mutation(ImpatientForEver, mode="slow", symptom="stuck"),
    "never-jumps": Mutation(NeverJumps, symptom="stuck"),
    "proposes-twice": Mutation(ProposesTwice, symptom="conflict"),
    "repeats-count": Mutation(RepeatsCount, symptom="quorum"),
}
