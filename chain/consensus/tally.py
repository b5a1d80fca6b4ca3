"""The votes and certificates of one height: weights, certificates and conflicts."""

from collections import defaultdict

from chain.blocks import Certificate, ValidatorSet, Vote, VoteKind, certify, is_conflict

Key = tuple[int, VoteKind]


class Tally:
    """Counts authentic votes of one height by (view, kind, block) and keeps the certificates."""

    def __init__(self, validators: ValidatorSet) -> None:
        self._validators = validators
        self._weights: defaultdict[tuple[int, VoteKind, bytes], int] = defaultdict(int)
        self._votes: defaultdict[int, dict[tuple[VoteKind, bytes], Vote]] = defaultdict(dict)
        self.certificates: dict[Key, Certificate] = {}

    def vote_of(self, view: int, kind: VoteKind, validator: bytes) -> Vote | None:
        """Return the first vote of this kind that `validator` was seen to sign in `view`."""
        votes = self._votes.get(view)
        return votes.get((kind, validator)) if votes else None

    def votes(self, view: int) -> tuple[Vote, ...]:
        """Return the votes of a view that are counted."""
        return tuple(self._votes.get(view, {}).values())

    def add(self, vote: Vote) -> bool:
        """Count `vote`; False when a vote of this kind and validator is counted already."""
        votes, key = self._votes[vote.view], (vote.kind, vote.validator)
        if key in votes:
            return False
        votes[key] = vote
        self._weights[vote.view, vote.kind, vote.block_hash] += self._validators.power(vote.validator)
        return True

    def conflict(self, vote: Vote) -> Vote | None:
        """Return a counted vote that convicts the signer of `vote`, if there is one."""
        for kind in VoteKind:
            other = self.vote_of(vote.view, kind, vote.validator)
            if other is not None and is_conflict(other, vote):
                return other
        return None

    def certificate_for(self, vote: Vote) -> Certificate | None:
        """Return the certificate that the votes equal to `vote` make, when their weight is a quorum."""
        if self._weights[vote.view, vote.kind, vote.block_hash] < self._validators.quorum:
            return None
        return self._certify(vote)

    def fullest(self, certificate: Certificate) -> Certificate:
        """Return the certificate of all counted votes for what `certificate` says, never a lighter one."""
        wanted = (certificate.kind, certificate.block_hash)
        for vote in self._votes.get(certificate.view, {}).values():
            if (vote.kind, vote.block_hash) == wanted:
                full = self._certify(vote)
                return full if len(full.signatures) > len(certificate.signatures) else certificate
        return certificate

    def _certify(self, example: Vote) -> Certificate:
        said = (example.kind, example.block_hash)
        votes = self._votes[example.view].values()
        return certify((vote for vote in votes if (vote.kind, vote.block_hash) == said), self._validators)

    def notarized(self, view: int) -> bytes | None:
        """Return the block hash that is notarized in `view`."""
        certificate = self.certificates.get((view, VoteKind.NOTARIZE))
        return certificate.block_hash if certificate else None

    def is_nullified(self, view: int) -> bool:
        """Whether a nullification of `view` is held."""
        return (view, VoteKind.NULLIFY) in self.certificates

    def forget_votes(self, view: int) -> None:
        """Drop the votes of a view; what its certificates say stays."""
        for kind, block_hash in {(vote.kind, vote.block_hash) for vote in self._votes.pop(view, {}).values()}:
            self._weights.pop((view, kind, block_hash), None)
