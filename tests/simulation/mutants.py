"""Consensus with one rule broken each: the simulation must notice every one of them."""

from chain.blocks import Certificate, ValidatorSet, VoteKind
from chain.consensus import Consensus, Effect


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
