"""The judge of a run. It recomputes digests, weights, sets and conflicts itself and shares no code with `chain`.

Records are read through their fields only; encodings and hashes follow docs/design/contract.md.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import msgspec
from blake3 import blake3

from tests.simulation.scenario import Scenario, next_stakes

PROPOSE, NOTARIZE, NULLIFY, FINALIZE = range(4)
VIEWS_AFTER_HEALING = 24
"""Views beyond one lap of leaders within which a height is decided once the network has healed."""
Said = tuple[int, int, int, bytes]
"""(height, view, kind, block hash)."""


@dataclass(frozen=True)
class Cast:
    """Who is who: accounts by node, and the stakes that each account brings."""

    scenario: Scenario
    chain_id: bytes
    accounts: tuple[bytes, ...]
    """By node; nodes of one account are Twins."""

    @property
    def joining(self) -> dict[bytes, int]:
        """The stake of each validator when it joins."""
        return dict(zip(self.accounts, self.scenario.stakes, strict=False))

    @property
    def genesis(self) -> dict[bytes, int]:
        """The set that decides height 1."""
        return {self.accounts[i]: self.scenario.stakes[i] for i in self.scenario.members}

    @property
    def faulty(self) -> frozenset[bytes]:
        """The accounts that are not honest."""
        return frozenset(self.accounts[i] for i in self.scenario.faulty)


@dataclass
class Judgement:
    """What a run broke, in words, and what it measured."""

    faults: list[str] = field(default_factory=list)
    forked_at: int | None = None
    guilty: frozenset[bytes] = frozenset()
    """Whom the certificates of honest nodes convict at the height of the fork."""
    guilty_share: float = 0.0
    """Their share of that height's stake."""
    views: int = 0
    """The most views that an honest node entered at one height after the healing."""
    lag: float = 0.0
    """Seconds after the healing until every honest node was where the first one was at the healing."""


def _hash(domain: str, data: bytes) -> bytes:
    return blake3(data, derive_key_context=f"tdml 1 {domain}").digest()


@lru_cache(maxsize=65_536)
def _message(chain_id: bytes, said: Said) -> bytes:
    height, view, kind, block_hash = said
    return _hash("vote", chain_id + bytes([kind]) + height.to_bytes(8, "big") + view.to_bytes(8, "big") + block_hash)


def hash_of(block: Any) -> bytes:
    """Return the hash of a block's header."""
    return _hash("header", msgspec.msgpack.encode(msgspec.structs.astuple(block.header)))


def said_by(vote: Any) -> Said:
    """Return what a vote or certificate says."""
    return vote.height, vote.view, int(vote.kind), vote.block_hash


def signers(certificate: Any, stakes: Mapping[bytes, int]) -> frozenset[bytes]:
    """Return the accounts whose bits are set; none when a bit or a signature is false."""
    ordered = sorted(stakes)
    bits = int.from_bytes(certificate.signers, "little")
    chosen = [account for i, account in enumerate(ordered) if bits >> i & 1]
    message = _message(certificate.chain_id, said_by(certificate))
    genuine = [account + message for account in chosen]
    return frozenset(chosen if not bits >> len(ordered) and genuine == list(certificate.signatures) else ())


def contradicts(first: Said, second: Said) -> bool:
    """Whether no honest validator says both."""
    if first[:2] != second[:2] or first == second:
        return False
    kinds = {first[2], second[2]}
    if len(kinds) == 1 or kinds == {NOTARIZE, FINALIZE}:
        return first[3] != second[3]
    return kinds == {NULLIFY, FINALIZE}


def incriminated(statements: Iterable[tuple[bytes, Said]]) -> frozenset[bytes]:
    """Return the accounts that said two things which contradict each other."""
    seen: defaultdict[tuple[bytes, int, int], set[Said]] = defaultdict(set)
    for account, said in statements:
        seen[account, said[0], said[1]].add(said)
    return frozenset(
        account for (account, _, _), all_ in seen.items() if any(contradicts(a, b) for a in all_ for b in all_)
    )


class Oracle:
    """Reads the log of one run from its beginning to its end."""

    def __init__(self, cast: Cast) -> None:
        self.cast = cast
        self.result = Judgement()
        self._honest = {i for i, account in enumerate(cast.accounts) if account not in cast.faulty}
        self._after = {cast.chain_id: cast.genesis}
        self._sets = {1: cast.genesis}
        self._tips = dict.fromkeys(self._honest, (0, cast.chain_id))
        self._finals: defaultdict[int, set[bytes]] = defaultdict(set)
        self._signed: dict[tuple[int, Said], None] = {}
        self._held: defaultdict[int, set[Said]] = defaultdict(set)
        self._certificates: dict[tuple[Said, frozenset[bytes]], None] = {}
        self._checked: dict[int, tuple[Any, bool]] = {}
        self._positions = dict.fromkeys(self._honest, (0, 0))
        self._goal: tuple[int, int] | None = None

    def judge(self, log: Iterable[tuple[float, int, Any]]) -> Judgement:
        """Return the judgement on a run."""
        for time, node, what in log:
            getattr(self, f"_on_{type(what).__name__.lower()}")(time, node, what)
        self._judge_votes()
        self._judge_certificates()
        self._judge_fork()
        wanted = self.cast.scenario.heights
        heights = [self._tips[node][0] for node in sorted(self._honest)]
        if min(heights, default=wanted) < wanted and self.result.forked_at is None:
            self._fault(f"stuck with {heights} of {wanted} heights decided")
        return self.result

    def _fault(self, text: str) -> None:
        if text not in self.result.faults:
            self.result.faults.append(text)

    # The log's entries, by the name of their type.

    def _on_signed(self, time: float, node: int, entry: Any) -> None:
        if node not in self._honest:
            return
        said = said_by(entry.vote)
        self._signed[node, said] = None
        if said[2] == NOTARIZE:
            self._judge_base(node, said[:2], entry.parent_view, said[3])
        if said[2] == FINALIZE and (*said[:3], said[3]) not in self._held[node]:
            notarized = (said[0], said[1], NOTARIZE, said[3])
            if notarized not in self._held[node] or (node, notarized) not in self._signed:
                self._fault(f"node {node} finalized unfounded in {said[:2]}")

    def _on_proposal(self, time: float, node: int, proposal: Any) -> None:
        if node in self._honest and proposal.vote.validator == self.cast.accounts[node]:
            self._sent(node, proposal.vote)
            place = proposal.vote.height, proposal.vote.view
            if place[0] == self._tips[node][0] + 1:
                self._judge_base(node, place, proposal.parent_view, hash_of(proposal.block))

    def _on_vote(self, time: float, node: int, vote: Any) -> None:
        if node in self._honest:
            self._sent(node, vote)

    def _on_certificate(self, time: float, node: int, certificate: Any) -> None:
        if id(certificate) not in self._checked:
            self._checked[id(certificate)] = (certificate, self._is_sound(certificate))
        if node in self._honest:
            self._held[node].add(said_by(certificate))
            if not self._checked[id(certificate)][1]:
                self._fault(f"node {node} sent a certificate for {said_by(certificate)[:3]} without a quorum")

    def _on_decide(self, time: float, node: int, decision: Any) -> None:
        if node not in self._honest:
            return
        block, certificate = decision.block, decision.certificate
        hash_, parent, height = hash_of(block), block.header.parent, block.header.height
        if (height, parent) != (self._tips[node][0] + 1, self._tips[node][1]):
            self._fault(f"node {node}: block {height} does not follow its chain")
            return
        self._tips[node] = (height, hash_)
        self._finals[height].add(hash_)
        stakes = self._after[parent]
        weight = sum(stakes[account] for account in signers(certificate, stakes))
        said = said_by(certificate)
        if 3 * weight <= 2 * sum(stakes.values()) or (said[0], *said[2:]) != (height, FINALIZE, hash_):
            self._fault(f"node {node}: height {height} rests on no quorum")
        scenario = self.cast.scenario
        if scenario.quiet and scenario.quiet[0] < time < scenario.quiet[1]:
            self._fault(f"node {node} decided height {height} at {time:.1f} s, while a third of the stake was away")
        after = stakes
        if scenario.churn:
            after = next_stakes(stakes, self.cast.joining, self.cast.faulty, block.header.timestamp)
        self._after[hash_] = after
        self._sets.setdefault(height + 1, after)

    def _on_accuse(self, time: float, node: int, accusation: Any) -> None:
        culprit = accusation.first.validator
        if node in self._honest and culprit not in self.cast.faulty:
            self._fault(f"honest {culprit.hex()[:8]} was accused by node {node}")
        if not contradicts(said_by(accusation.first), said_by(accusation.second)):
            self._fault(f"node {node} accused without a reason")

    def _on_tuple(self, time: float, node: int, position: tuple[int, int]) -> None:
        """An honest node enters a view of a height."""
        if node not in self._honest:
            return
        heal = self.cast.scenario.heal
        if time > heal:
            if self._goal is None:
                self._goal = max(self._positions.values())
            if position >= self._goal > self._positions[node]:
                self.result.lag = max(self.result.lag, time - heal)
            before = self._goal[1] if position[0] == self._goal[0] else 0
            self.result.views = max(self.result.views, position[1] - before)
            lap = len(self._sets.get(position[0], self.cast.joining))
            if position[1] - before > lap + VIEWS_AFTER_HEALING:
                self._fault(f"no progress at height {position[0]} within {position[1] - before} views after healing")
        self._positions[node] = position

    # Invariants.

    def _sent(self, node: int, vote: Any) -> None:
        if vote.validator == self.cast.accounts[node] and (node, said_by(vote)) not in self._signed:
            self._fault(f"node {node} sent a vote of {said_by(vote)[:3]} that it had not recorded")

    def _is_sound(self, certificate: Any) -> bool:
        stakes = self._sets.get(certificate.height)
        if stakes is None:
            return False
        accounts = signers(certificate, stakes)
        if 3 * sum(stakes[account] for account in accounts) <= 2 * sum(stakes.values()):
            return False
        self._certificates[said_by(certificate), accounts] = None
        return True

    def _judge_base(self, node: int, place: tuple[int, int], parent_view: int, block: bytes) -> None:
        """What an honest node proposes or notarizes stands on certificates that it holds."""
        (height, view), held = place, self._held[node]
        founded = parent_view == 0 or (height, parent_view, NOTARIZE, block) in held
        passed = ((height, between, NULLIFY, bytes(32)) in held for between in range(parent_view + 1, view))
        if not founded or not all(passed):
            self._fault(f"node {node} supported an unfounded proposal in {place}")

    def _judge_votes(self) -> None:
        statements = ((self.cast.accounts[node], said) for node, said in self._signed)
        for account in sorted(incriminated(statements)):
            self._fault(f"honest {account.hex()[:8]} signed a conflict")

    def _judge_certificates(self) -> None:
        """Where a block is final, that view has no other outcome, and no later one notarizes another block."""
        said = sorted({statement for statement, _ in self._certificates})
        for height, view, _, block in [statement for statement in said if statement[2] == FINALIZE]:
            for other in said:
                if other[0] != height:
                    continue
                if (other[1] == view and other[2] == NULLIFY) or (
                    other[1] >= view and other[2] != NULLIFY and other[3] != block
                ):
                    self._fault(f"final {(height, view)} against {other[:3]}")

    def _judge_fork(self) -> None:
        forks = sorted(height for height, hashes in self._finals.items() if len(hashes) > 1)
        if not forks:
            return
        self.result.forked_at = forks[0]
        self._fault(f"fork at height {forks[0]}")
        relevant = [(said, accounts) for said, accounts in self._certificates if said[0] == forks[0]]
        statements = [(account, said) for said, accounts in relevant for account in accounts]
        self.result.guilty = incriminated(statements)
        stakes = self._sets[forks[0]]
        self.result.guilty_share = sum(stakes[account] for account in self.result.guilty) / sum(stakes.values())


def judge(cast: Cast, log: Iterable[tuple[float, int, Any]]) -> Judgement:
    """Return every broken invariant of a run, and its figures."""
    return Oracle(cast).judge(log)
