"""The sum of a step's gradients where teams compute every cell: of each team the partial sum of its majority."""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from trainer.content import address_of
from trainer.messages import Reduce
from trainer.reduction import Reduction
from trainer.redundancy import Ballot

if TYPE_CHECKING:
    from torch import Tensor


class TeamReduction(Reduction):
    """A `Reduction` whose owners stand for their teams; each team counts once, with what most of it sent.

    `finished` are the cells that this worker has computed: with one of its team's missing it contributes nothing.
    """

    def __init__(
        self, request: Reduce, me: str, teams: Mapping[str, tuple[str, ...]], finished: Collection[int], quorum: int
    ) -> None:
        super().__init__(request, me)
        self._teams = {owner: teams.get(owner, (owner,)) for owner in self.contributors}
        cells = tuple(c for c, owner in enumerate(request.owners) if me in self._teams[owner])
        self.own_cells = cells if all(cell in finished for cell in cells) else ()
        self.is_summed = not self.own_cells
        self._ballots: dict[str, Ballot[Tensor]] = {owner: Ballot(quorum) for owner in self.contributors}
        self._far_ballot: Ballot[Tensor] = Ballot(quorum)

    @property
    def missing(self) -> tuple[str, ...]:
        """Members of teams without a majority yet: those that have sent nothing, or all if all have."""
        found: list[str] = []
        for owner, team in self._teams.items():
            if owner not in self._partials:
                found += [peer for peer in team if peer not in self._ballots[owner].votes] or team
        return tuple(found)

    def add(self, peer: str, partial: "Tensor", _address: bytes = b"") -> None:
        """Take a member's partial sum; raise `MessageError` for a second one or a stranger's."""
        owner = next((owner for owner, team in self._teams.items() if peer in team), peer)
        self.check_contributor(owner)
        chosen = self._ballots[owner].cast(peer, _address or address_of_tensor(partial), partial)
        if chosen is not None:
            self._partials[owner] = chosen

    def add_far(self, peer: str, part: "Tensor", _address: bytes = b"") -> None:
        """Take the other end's part of the tied gradient, once most sent the same."""
        self.check_far(peer)
        chosen = self._far_ballot.cast(peer, _address or address_of_tensor(part), part)
        if chosen is not None:
            self.far = chosen


def address_of_tensor(tensor: "Tensor") -> bytes:
    """Return the content address of a tensor's raw bytes."""
    from trainer.tensors import buffer_of

    return address_of(buffer_of(tensor))
