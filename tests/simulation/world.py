"""Virtual time: an event queue, an unreliable network and machines that crash."""

import hashlib
import heapq
import random
from collections.abc import Callable
from itertools import count
from typing import Any

from chain.blocks import Block, Certificate, ConsensusMessage, Refused, ValidatorSet, verify_message
from chain.codec import encode
from chain.hashing import digest
from tests.simulation.byzantine import KINDS
from tests.simulation.mutants import Mutation
from tests.simulation.node import Crashed, Node, Outcome, fake_signature
from tests.simulation.scenario import Scenario, next_stakes

STANDSTILL_SECONDS = 2.0
MAX_EVENTS = 600_000
ANY_LIFE = -1


def fake_verify(account: bytes, message: bytes, signature: bytes) -> bool:
    """Whether `signature` is the fake one of `account`."""
    return signature == fake_signature(account, message)


class World:
    """Runs one scenario to its end; the same scenario gives the same trace."""

    def __init__(self, scenario: Scenario, mutation: Mutation | None = None) -> None:
        self.scenario = scenario
        self.mutation = mutation or Mutation()
        self.now = 0.0
        self.rng = random.Random(f"world {scenario.mode} {scenario.seed}")
        self.outcome = Outcome()
        self.writes = 0
        self.trace = hashlib.blake2b(digest_size=16)
        accounts = [digest("simulated account", bytes([i])) for i in range(len(scenario.stakes))]
        self.stakes = dict(zip(accounts, scenario.stakes, strict=True))
        self.genesis = {accounts[i]: scenario.stakes[i] for i in scenario.members}
        self.faulty = frozenset(accounts[i] for i in scenario.faulty)
        self._queue: list[tuple[float, int, Node, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = count()
        self._after: dict[tuple[int, int], ValidatorSet] = {}
        self._sets: dict[tuple[tuple[bytes, int], ...], ValidatorSet] = {}
        self._verified: dict[tuple[int, int], tuple[ConsensusMessage, bool]] = {}
        self._encoded: dict[int, tuple[ConsensusMessage, bytes]] = {}
        first, kinds = self._set(self.genesis), dict(scenario.byzantine)
        self.nodes: list[Node] = [
            KINDS.get(kinds.get(owner, ""), Node)(index, accounts[owner], first, self)
            for index, owner in enumerate(scenario.owners)
        ]
        self.honest = [node for node in self.nodes if node.account not in self.faulty]
        self._unfinished = {node.index for node in self.honest}

    @property
    def is_done(self) -> bool:
        """Whether every honest node has decided every height."""
        return not self._unfinished

    def run(self) -> Outcome:
        """Run until every honest node has decided the scenario's heights, or patience ends."""
        for node in self.nodes:
            self._push(0.0, node, node.life, self._boot, node)
        queue, limit = self._queue, self.scenario.heal + self.scenario.patience
        for _ in range(MAX_EVENTS):
            if not queue or not self._unfinished or self.now > limit:
                break
            self.now, _, node, life, action, arguments = heapq.heappop(queue)
            if life == ANY_LIFE:
                if node.is_down:
                    continue
            elif life != node.life:
                continue
            try:
                action(*arguments)
            except Crashed:
                self._crash(node)
        return self.outcome

    # What nodes ask for.

    def later(self, node: Node, seconds: float, action: Callable[..., None], *arguments: Any) -> None:
        """Run `action` on `node` after `seconds`, unless it crashes before."""
        self._push(self.now + seconds, node, node.life, action, *arguments)

    def broadcast(self, sender: int, message: ConsensusMessage) -> None:
        """Send `message` to every other node, each copy with its own fate."""
        for target in range(len(self.nodes)):
            if target != sender:
                self._deliver(sender, target, self.nodes[target].receive, sender, message)
        self._sent(sender, message)

    def send(self, sender: int, target: int, message: ConsensusMessage) -> None:
        """Send `message` to one node."""
        self._deliver(sender, target, self.nodes[target].receive, sender, message)
        self._sent(sender, message)

    def request_blocks(self, sender: int, target: int, height: int) -> None:
        """Ask `target` for the final blocks from `height` on."""
        self._deliver(sender, target, self._serve, target, sender, height)

    def maybe_crash(self, node: Node) -> None:
        """Raise `Crashed` at the scenario's write, or with its chance while faults last."""
        scenario, self.writes = self.scenario, self.writes + 1
        chance = scenario.crash_chance
        if scenario.crash_at == self.writes - 1 or (chance and self.now < scenario.heal and self.rng.random() < chance):
            raise Crashed

    def record(self, node: Node, what: Any) -> None:
        """Write an entry of the run's log."""
        self.outcome.log.append((self.now, node.index, what))

    def committed(self, node: Node) -> None:
        """A node has decided one more height."""
        self._note(node.index, node.disk.chain[-1][0].hash)
        if len(node.disk.chain) >= self.scenario.heights:
            self._unfinished.discard(node.index)

    def verify(self, sender: int, message: ConsensusMessage, validators: ValidatorSet) -> bool:
        """Whether a message is authentic, which all of an honest node are."""
        key = (id(message), id(validators))
        if key not in self._verified:
            error = ""
            try:
                verify_message(message, validators, fake_verify)
            except Refused as refused:
                error = str(refused)
            assert not error or self.nodes[sender].account in self.faulty, f"node {sender} sent {error}: {message}"
            self._verified[key] = (message, not error)
        return self._verified[key][1]

    def set_after(self, validators: ValidatorSet, number: int) -> ValidatorSet:
        """Return the validator set that follows `validators` after a block with this number."""
        if not self.scenario.churn:
            return validators
        key = (id(validators), number)
        if key not in self._after:
            self._after[key] = self._set(next_stakes(validators.powers, self.stakes, self.faulty, number))
        return self._after[key]

    # The network and the machines.

    def _set(self, stakes: dict[bytes, int]) -> ValidatorSet:
        key = tuple(sorted(stakes.items()))
        return self._sets.setdefault(key, self.mutation.set_type.of(key))

    def _serve(self, target: int, asker: int, height: int) -> None:
        for block, certificate in self.nodes[target].disk.chain[height - 1 :]:
            self._deliver(target, asker, self._adopt, target, asker, block, certificate)

    def _adopt(self, server: int, asker: int, block: Block, certificate: Certificate) -> None:
        self.nodes[asker].adopt(server, block, certificate)

    def _deliver(self, sender: int, target: int, action: Callable[..., None], *arguments: Any) -> None:
        scenario, random_ = self.scenario, self.rng.random
        for partition in scenario.partitions:
            if partition.start <= self.now < partition.end and partition.groups[sender] != partition.groups[target]:
                return
        loss = scenario.loss if self.now < scenario.heal else min(0.1, scenario.loss)
        if loss and random_() < loss:
            return
        low, high = scenario.delay
        for _ in range(2 if scenario.duplication and random_() < scenario.duplication else 1):
            self._push(self.now + low + (high - low) * random_(), self.nodes[target], ANY_LIFE, action, *arguments)

    def _boot(self, node: Node) -> None:
        node.is_down = False
        self.later(node, self.rng.uniform(0, STANDSTILL_SECONDS), self._watch, node)
        node.boot()

    def _watch(self, node: Node) -> None:
        self.later(node, STANDSTILL_SECONDS, self._watch, node)
        if self.now - node.last_progress >= STANDSTILL_SECONDS:
            node.standstill()

    def _crash(self, node: Node) -> None:
        self._note(node.index, b"crash")
        node.is_down = True
        node.life += 1
        if not self.mutation.keeps_record:
            node.disk.votes.clear()
            node.disk.proposals.clear()
        self._push(self.now + self.rng.uniform(0.1, 5.0), node, node.life, self._boot, node)

    def _push(self, time: float, node: Node, life: int, action: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(self._queue, (time, next(self._order), node, life, action, arguments))

    def _sent(self, sender: int, message: ConsensusMessage) -> None:
        self.outcome.log.append((self.now, sender, message))
        known = self._encoded.get(id(message))
        if known is None:
            known = self._encoded[id(message)] = (message, encode(message))
        self._note(sender, known[1])

    def _note(self, node: int, what: bytes) -> None:
        self.trace.update(f"{self.now:.6f} {node} ".encode() + what)
