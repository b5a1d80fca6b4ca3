"""Virtual time: an event queue, an unreliable network and machines that crash."""

import hashlib
import heapq
import random
from collections.abc import Callable, Iterable
from itertools import count

from chain.blocks import Block, Certificate, ConsensusMessage, ValidatorSet
from chain.codec import encode
from chain.consensus import Consensus
from chain.hashing import digest
from tests.simulation.node import Crashed, Node, Outcome
from tests.simulation.scenario import Scenario

STANDSTILL_SECONDS = 2.0
MAX_EVENTS = 400_000


class World:
    """Runs one scenario to its end; the same scenario gives the same trace."""

    def __init__(
        self,
        scenario: Scenario,
        machine_type: type[Consensus] = Consensus,
        set_type: type[ValidatorSet] = ValidatorSet,
        keeps_record: bool = True,
    ) -> None:
        self.scenario = scenario
        self.machine_type = machine_type
        self.now = 0.0
        self.rng = random.Random(f"world {scenario.seed}")
        self.outcome = Outcome()
        self.stakes = {digest("simulated account", bytes([i])): stake for i, stake in enumerate(scenario.stakes)}
        self.trace = hashlib.blake2b(digest_size=16)
        self._accounts = tuple(self.stakes)
        self._keeps_record = keeps_record
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._lives: dict[int, int] = {}
        self._down: set[int] = set()
        validators = set_type.of(self.stakes.items())
        self.nodes = [
            Node(index, self._accounts[owner], validators, self) for index, owner in enumerate(scenario.owners)
        ]

    @property
    def honest(self) -> Iterable[Node]:
        """The nodes whose key runs once."""
        owners = self.scenario.owners
        return (node for node in self.nodes if owners.count(owners[node.index]) == 1)

    def run(self) -> Outcome:
        """Run until every honest node has decided the scenario's heights, or patience ends."""
        for node in self.nodes:
            self._at(0.0, lambda node=node: self._boot(node))  # type: ignore[misc]
        for _ in range(MAX_EVENTS):
            if not self._queue or self.is_done or self.now > self.scenario.heal + self.scenario.patience:
                break
            self.now, _, action = heapq.heappop(self._queue)
            action()
        return self.outcome

    @property
    def is_done(self) -> bool:
        """Whether every honest node has decided every height."""
        return all(node.height > self.scenario.heights for node in self.honest)

    def later(self, node: Node, seconds: float, action: Callable[[], None]) -> None:
        """Run `action` on `node` after `seconds`, unless it crashes before."""
        life = self._lives[node.index]
        self._at(self.now + seconds, lambda: self._alive(node, life, action))

    def broadcast(self, sender: int, message: ConsensusMessage) -> None:
        """Send `message` to every other node, each copy with its own fate."""
        for node in self.nodes:
            if node.index != sender:
                self._send(sender, node, lambda node=node: node.receive(sender, message))  # type: ignore[misc]
        self._note(sender, encode(message)[:64])

    def request_blocks(self, sender: int, target: int, height: int) -> None:
        """Ask `target` for the final blocks from `height` on."""
        self._send(sender, self.nodes[target], lambda: self._answer(target, sender, height))

    def maybe_crash(self, node: Node) -> None:
        """Raise `Crashed` with the scenario's chance while faults last."""
        if self.now < self.scenario.heal and self.rng.random() < self.scenario.crash_chance:
            raise Crashed

    def _answer(self, target: int, asker: int, height: int) -> None:
        for block, certificate in self.nodes[target].disk.chain[height - 1 :]:
            self._send(target, self.nodes[asker], self._adoption(asker, block, certificate))

    def _adoption(self, asker: int, block: Block, certificate: Certificate) -> Callable[[], None]:
        return lambda: self.nodes[asker].adopt(block, certificate)

    def _send(self, sender: int, target: Node, action: Callable[[], None]) -> None:
        loss = self.scenario.loss if self.now < self.scenario.heal else min(0.1, self.scenario.loss)
        if not self._connected(sender, target.index) or self.rng.random() < loss:
            return
        copies = 2 if self.rng.random() < self.scenario.duplication else 1
        for _ in range(copies):
            delay = self.rng.uniform(0.001, self.scenario.delay)
            self._at(self.now + delay, lambda: self._alive(target, self._lives[target.index], action))

    def _connected(self, first: int, second: int) -> bool:
        return all(
            partition.groups[first] == partition.groups[second]
            for partition in self.scenario.partitions
            if partition.start <= self.now < partition.end
        )

    def _boot(self, node: Node) -> None:
        self._lives[node.index] = life = self._lives.get(node.index, 0) + 1
        self._down.discard(node.index)
        self._alive(node, life, node.boot)
        self._at(self.now + self.rng.uniform(0, STANDSTILL_SECONDS), lambda: self._watch(node, life))

    def _watch(self, node: Node, life: int) -> None:
        if self._lives[node.index] != life or node.index in self._down:
            return
        if self.now - node.last_progress >= STANDSTILL_SECONDS:
            self._alive(node, life, lambda: node.perform(node.consensus.on_standstill()))
            if node.disk.chain:
                self.broadcast(node.index, node.disk.chain[-1][1])
        self._at(self.now + STANDSTILL_SECONDS, lambda: self._watch(node, life))

    def _alive(self, node: Node, life: int, action: Callable[[], None]) -> None:
        if node.index in self._down or self._lives[node.index] != life:
            return
        try:
            action()
        except Crashed:
            self._note(node.index, b"crash")
            self._down.add(node.index)
            if not self._keeps_record:
                node.disk.votes.clear()
                node.disk.proposals.clear()
            self._at(self.now + self.rng.uniform(0.1, 5.0), lambda: self._boot(node))

    def _at(self, time: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (time, next(self._order), action))

    def _note(self, node: int, what: bytes) -> None:
        self.trace.update(f"{self.now:.6f} {node} ".encode() + what)
