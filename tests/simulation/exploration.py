"""Every reachable state of a small world: four validators of equal stake, one of them a Twin, two views.

The bound: one height, views 1 and 2; what is signed in view 3 or later never arrives. Each of the three
honest machines may see, in any order, any subset of what exists: the timer of its view, any proposal, any
certificate, and a restart from its own record (which loses the rest). The Twin's two halves are taken
together and made stronger: every vote that its key can sign exists from the beginning, and where it leads
it has proposed two fresh blocks and every other one again.

What makes this finite and small, without leaving out a behaviour of the machine:
- votes arrive as whole quorums, since fewer change nothing but the count (a leader's lone Nullify does what
  the timer does), and a certificate counts as what it says, whoever signed it;
- validation, building and signing answer at once; the order in which they do matters to one node only;
- honest validators that lead neither view are interchangeable;
- what a machine sees without signing is its own affair and messages never vanish, so that it may as well see
  it right before its next signature or decision: only these are steps of the small world;
- a machine is run once for each of its own states and events; the product of the three is then walked in
  integers, with a set of the states already met.
"""

from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

from msgspec import structs

from chain.blocks import Block, Header, Proposal, ValidatorSet, Vote, VoteKind, proposal_subject, transactions_root
from chain.consensus import Broadcast, Build, Decide, Effect, HeightConfig, Sign, Validate
from chain.hashing import ZERO, digest
from chain.randomness import leader
from tests.simulation.mutants import Mutation
from tests.simulation.node import CHAIN_ID, SEED, signed
from tests.simulation.oracle import FINALIZE, NOTARIZE, NULLIFY, contradicts

T = TypeVar("T")
VIEWS = 2
ACCOUNTS = tuple(sorted(digest("small account", bytes([i])) for i in range(4)))
Statement = tuple[int, int, bytes]
"""(view, kind, block hash)."""
Event = tuple[str, int] | tuple[str, Proposal] | tuple[str, Statement]
TIMER, PROPOSED, CERTIFIED, RESTART = "timer", "proposed", "certified", "restart"


@dataclass(frozen=True)
class Local:
    """One state of one honest machine, as far as it can matter, and the events that lead to it."""

    key: tuple[object, ...]
    path: tuple[Event, ...] = field(compare=False)
    view: int = field(compare=False)
    said: frozenset[Statement] = field(compare=False)
    proposals: frozenset[Proposal] = field(compare=False)
    """What it has proposed."""
    decided: bytes | None = field(compare=False)


class Machine:
    """Runs one honest machine along a path of events; everything that it asks for happens at once."""

    def __init__(self, account: bytes, validators: ValidatorSet, mutation: Mutation) -> None:
        self.account = account
        self.validators = validators
        self.mutation = mutation
        self.votes: dict[Statement, Vote] = {}
        self.kept: dict[int, Proposal] = {}
        self.proposed: set[Proposal] = set()
        self.decided: bytes | None = None
        self._boot()

    def _boot(self) -> None:
        votes, kept = tuple(self.votes.values()), tuple(self.kept.values())
        record = (votes, kept) if self.mutation.keeps_record else ((), ())
        self.consensus = self.mutation.machine_type(
            HeightConfig(
                CHAIN_ID, 1, self.validators, SEED, self.account, restored_votes=record[0], restored_proposals=record[1]
            )
        )
        self._perform(self.consensus.start())

    def copy(self) -> "Machine":
        """Return an independent machine in the same state."""
        twin = _copied(self)
        twin.consensus = _copied(self.consensus)
        twin.consensus.tally = tally = _copied(self.consensus.tally)
        for view, votes in tally._votes.items():
            tally._votes[view] = dict(votes)
        return twin

    def apply(self, event: Event) -> None:
        """Let one event happen."""
        match event:
            case (str(), Proposal() as proposal):
                self._perform(self.consensus.on_proposal(proposal))
            case (str(), (int(view), int(kind), bytes(block_hash))):
                others = [account for account in ACCOUNTS if account != self.account]
                for account in others:
                    vote = Vote(VoteKind(kind), CHAIN_ID, 1, view, block_hash, account, bytes(64))
                    self._perform(self.consensus.on_vote(signed(vote)))
            case (str() as what, int(view)) if what == TIMER:
                self._perform(self.consensus.on_timer(view))
            case _:
                self._boot()

    def _perform(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Sign(vote, proposal) if vote.view <= VIEWS:
                    self._perform(self.consensus.on_signed(self._sign(vote, proposal)))
                case Validate(of):
                    self._perform(self.consensus.on_validated(of.hash, True))
                case Build(view) if view <= VIEWS:
                    self._perform(self.consensus.on_built(view, block(view, self.account)))
                case Broadcast(Proposal() as proposal) if proposal.vote.validator == self.account:
                    self.proposed.add(proposal)
                case Decide(of, _):
                    self.decided = of.hash

    def _sign(self, vote: Vote, proposal: Proposal | None) -> Vote:
        result = signed(vote)
        self.votes[vote.view, int(vote.kind), vote.block_hash] = result
        if proposal is not None:
            mine = vote.kind == VoteKind.PROPOSE
            self.kept.setdefault(vote.view, structs.replace(proposal, vote=result) if mine else proposal)
        return result

    def local(self, path: tuple[Event, ...]) -> Local:
        """Return the state reached."""
        machine = self.consensus
        held = {(view, int(kind), c.block_hash) for (view, kind), c in machine.tally.certificates.items()}
        shown = {(view, p.block.hash, p.parent_view) for view, p in machine.proposals.items() if view <= VIEWS}
        asked = {(view, int(kind), hash_) for (view, kind), hash_ in machine._asked.items()}
        said, proposed = frozenset(self.votes), frozenset(self.proposed)
        knowledge = (machine.view, frozenset(held), frozenset(shown), frozenset(asked), frozenset(machine._blocks))
        key = (said, proposed, self.decided, knowledge if self.decided is None else None)
        return Local(key, path, machine.view, said, proposed, self.decided)


def _copied(thing: T) -> T:
    """Return a copy of an object, and of the containers that it holds directly."""
    result = copy(thing)
    for name, value in vars(result).items():
        if isinstance(value, dict | set | list):
            setattr(result, name, copy(value))
    return result


def block(view: int, proposer: bytes, salt: int = 0) -> Block:
    """Return a fresh block."""
    header = Header(CHAIN_ID, 1, CHAIN_ID, proposer, view, salt, transactions_root(()), *[ZERO] * 7)
    return Block(header, (), None)


@dataclass
class Report:
    """How many states there are, and the first that breaks an invariant with the events that lead to it."""

    states: int = 0
    transitions: int = 0
    machines: int = 0
    """States of single machines."""
    broken: str = ""
    decisions: int = 0
    """States in which somebody has decided."""


class Exploration:
    """All states of one casting: the Twin leads view 1, or view 2, or neither."""

    def __init__(self, twin_leads: int, mutation: Mutation | None = None, *, restarts: bool = False) -> None:
        self.mutation = mutation or Mutation()
        self.validators = self.mutation.set_type.of((account, 1) for account in ACCOUNTS)
        order = [leader(self.validators, SEED, 1, view) for view in range(1, 5)]
        self.twin = order[twin_leads - 1]
        leaders = [account for account in order[:VIEWS] if account != self.twin]
        self.honest = [*leaders, *(account for account in order[VIEWS:] if account != self.twin)]
        self.leaders = len(leaders)
        self.restarts = restarts
        self.twin_leads = twin_leads
        self._locals: list[Local] = []
        self._ids: dict[tuple[bytes, Local], int] = {}
        self._steps: dict[tuple[int, Event], int] = {}
        self._machines: list[Machine] = []
        self._futures: dict[tuple[int, int], tuple[int, ...]] = {}
        self._events: dict[frozenset[Event], int] = {}
        self._shown: dict[tuple[int, ...], tuple[int, str, bool]] = {}
        self._public: list[int] = []
        self._regained: dict[tuple[int, int], set[int]] = {}
        self._publics: dict[tuple[object, ...], int] = {}

    def run(self, limit: int = 5_000_000) -> Report:
        """Walk all states, or until one is broken; raise `OverflowError` beyond `limit`."""
        report = Report()
        roles = map(self._role, range(len(self.honest)))
        start = self._canonical([self._enter(Machine(role, self.validators, self.mutation), ()) for role in roles])
        seen, stack = {start}, [start]
        while stack and not report.broken:
            state = stack.pop()
            report.states += 1
            events, broken, decided = self._shown_by(state)
            report.decisions += decided
            if broken:
                report.broken = f"{broken}: {self._story(state)}"
            for place, local in enumerate(state):
                for after in self._visible(local, events):
                    report.transitions += 1
                    rest = self._rest(after)
                    reached = self._canonical([*state[:place], rest, *state[place + 1 :]])
                    if rest != after:
                        number = self._shown_by(reached)[0]
                        self._visible(rest, number)
                        assert after in self._regained[rest, number], "a restart lost what cannot be seen again"
                    if reached not in seen:
                        seen.add(reached)
                        stack.append(reached)
            if len(seen) > limit:
                raise OverflowError(f"more than {limit} states")
        report.machines = len(self._locals)
        return report

    def _shown_by(self, state: tuple[int, ...]) -> tuple[int, str, bool]:
        """What exists in a state, by its number in `_events`; the invariant it breaks; whether one has decided."""
        key = tuple(self._public[local] for local in state)
        known = self._shown.get(key)
        if known is None:
            nodes = [self._locals[local] for local in state]
            formable = self._formable(nodes)
            proposals = self._lies.union(*(node.proposals for node in nodes))
            events = frozenset((PROPOSED, proposal) for proposal in proposals) | {
                (CERTIFIED, said) for said in formable
            }
            number = self._events.setdefault(events, len(self._events))
            known = number, self._broken(nodes, formable), any(node.decided for node in nodes)
            self._shown[key] = known
        return known

    def _role(self, place: int) -> bytes:
        """The account whose machine stands for all that play the same part."""
        return self.honest[min(place, self.leaders)]

    def _canonical(self, state: list[int]) -> tuple[int, ...]:
        return (*state[: self.leaders], *sorted(state[self.leaders :]))

    def _enter(self, machine: Machine, path: tuple[Event, ...]) -> int:
        local = machine.local(path)
        role = machine.account
        known = self._ids.setdefault((role, local), len(self._locals))
        if known == len(self._locals):
            self._locals.append(local)
            self._machines.append(machine)
            shown = (local.said, local.proposals, local.decided)
            self._public.append(self._publics.setdefault(shown, len(self._publics)))
        return known

    def _visible(self, local: int, events: int) -> tuple[int, ...]:
        """The states of a machine after its next signature or decision, whatever it sees before of the events."""
        known = self._futures.get((local, events))
        if known is not None:
            return known
        before, shared = self._locals[local], list(self._events)[events]
        reached, open_, found = {local}, [local], set()
        while open_ and before.decided is None:
            at = open_.pop()
            view = self._locals[at].view
            own: list[Event] = [(TIMER, view)] if view <= VIEWS else []
            own += [(RESTART, 0)] if self.restarts else []
            for event in (*shared, *own):
                after = self._step(at, event)
                node = self._locals[after]
                if (node.said, node.decided) != (before.said, before.decided):
                    found.add(after)
                elif after not in reached:
                    reached.add(after)
                    open_.append(after)
        self._regained[local, events] = reached
        self._futures[local, events] = tuple(sorted(found))
        return self._futures[local, events]

    def _rest(self, local: int) -> int:
        if not self.restarts or self._locals[local].decided is not None:
            return local
        return self._step(local, (RESTART, 0))

    def _step(self, local: int, event: Event) -> int:
        known = self._steps.get((local, event))
        if known is None:
            machine = self._machines[local].copy()
            machine.apply(event)
            known = self._enter(machine, (*self._locals[local].path, event))
            self._steps[local, event] = known
        return known

    @cached_property
    def _lies(self) -> frozenset[Proposal]:
        """What the Twin proposes where it leads: two fresh blocks, and in view 2 the block of view 1 again."""
        view = self.twin_leads
        if view > VIEWS:
            return frozenset()
        fresh = [(block(view, self.twin, salt), 0) for salt in (1, 2)]
        again = [(block(1, leader(self.validators, SEED, 1, 1)), 1)] if view == VIEWS else []
        return frozenset(self._proposal(view, of, parent) for of, parent in [*fresh, *again])

    def _proposal(self, view: int, of: Block, parent_view: int) -> Proposal:
        subject = proposal_subject(of.hash, parent_view)
        vote = signed(Vote(VoteKind.PROPOSE, CHAIN_ID, 1, view, subject, self.twin, bytes(64)))
        return Proposal(vote, parent_view, of)

    def _formable(self, nodes: list[Local]) -> set[Statement]:
        """The certificates that the honest votes make with the Twin's help."""
        said = [statement for node in nodes for statement in node.said if statement[1] != VoteKind.PROPOSE]
        return {statement for statement in set(said) if said.count(statement) + 1 >= self.validators.quorum}

    def _broken(self, nodes: list[Local], formable: set[Statement]) -> str:
        if len({node.decided for node in nodes} - {None}) > 1:
            return "fork"
        for node in nodes:
            placed = [(1, *statement) for statement in node.said]
            if any(contradicts(a, b) for a in placed for b in placed):
                return "honest conflict"
        for view, kind, final in formable:
            if kind != FINALIZE:
                continue
            if (view, NULLIFY, ZERO) in formable:
                return "final and nullified"
            if any(k in (NOTARIZE, FINALIZE) and v >= view and h != final for v, k, h in formable):
                return "final against another block"
        return ""

    def _story(self, state: tuple[int, ...]) -> str:
        def told(event: Event) -> str:
            what, subject = event
            if isinstance(subject, Proposal):
                return f"{what} {subject.block.hash.hex()[:4]} in {subject.vote.view} from {subject.parent_view}"
            return f"{what} {subject if isinstance(subject, int) else (*subject[:2], subject[2].hex()[:4])}"

        return "; ".join(" > ".join(map(told, self._locals[local].path)) for local in state)
