"""Bad machines and links in a swarm of honest peers: what each fault does to all that a peer sends and serves."""

import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from chain.transactions import Payload, RenewLease, SubmitClaims
from tests.attacks.kit import Place, RealSwarm
from tests.chain.ledger_kit import KEYS, Sent, by_account

FOREVER = 1 << 31


class Outage(NamedTuple):
    """Peers that send and serve nothing at heights from `start` to before `end`."""

    accounts: frozenset[bytes]
    start: int
    end: int


@dataclass(eq=False)
class Sending:
    """A payload on its way: it is tried in every block from `due` on until one has it; `duty` is what it answers."""

    account: bytes
    payload: Payload
    due: int
    duty: tuple[object, ...] = ()


@dataclass
class FaultySwarm(RealSwarm):
    """A swarm of which peers crash, hang, are cut off or lose transactions; `faults` counts what went wrong."""

    outages: list[Outage] = field(default_factory=list)
    delays: dict[bytes, int] = field(default_factory=dict)
    """Blocks by which all comes late that a slow peer sends."""
    loss: float = 0.0
    killed_after: dict[bytes, type] = field(default_factory=dict)
    """Peers that are killed for good once a block has their next payload of this kind."""
    dice: random.Random = field(default_factory=random.Random)
    faults: Counter[str] = field(default_factory=Counter)
    _outbox: list[Sending] = field(default_factory=list)

    def is_up(self, account: bytes) -> bool:
        """Whether a peer sends and serves now."""
        height = self.state.height
        return not any(account in one.accounts and one.start <= height < one.end for one in self.outages)

    def signers(self) -> Iterable[bytes]:
        """Return the validators that sign the next block."""
        return [account for account in self.state.validators().powers if self.is_up(account)]

    def claims(self, step: int) -> list[Sent]:
        """Put everybody's claims of one step on their way; the client gives cells only to those who answer it."""
        task = self.state.task(self.task)
        assert task is not None
        teams = [[a for a in self.seated(stage) if self.is_up(a)] for stage in range(task.stages)]
        if not all(teams):
            self.faults["a stage is away"] += 1
            return []
        for stage, workers in enumerate(teams):
            for index, account in enumerate(workers):
                cells = tuple(range(index, task.microbatches, len(workers)))
                self._put(account, SubmitClaims((self._claim_of(account, step, stage, cells),)))
        self.claimed.add((task.generation, step))
        return []

    def answers(self) -> list[Sent]:
        """Return what the next block has of what everybody owes."""
        for key in KEYS:
            if self.is_up(key.account):
                self._take_up(key.account)
            else:
                self.faults["missed"] += len(self.state.duties(key.account))
        now = [sending for sending in self._outbox if sending.due <= self.state.height]
        arrived = {sending for sending in now if self._arrives(sending)}
        self._outbox = [sending for sending in self._outbox if sending not in arrived]
        return [(by_account(one.account), one.payload) for one in now if one in arrived]

    def _take_up(self, account: bytes) -> None:
        """Answer what is newly owed and forget what no longer is."""
        key = by_account(account)
        owed: dict[tuple[object, ...], Callable[[], Payload]] = {
            (duty.kind, duty.audit, duty.round, duty.key): partial(self.answer, key, duty)
            for duty in self.state.duties(account)
        }
        if self._is_lease_due(account):
            owed["lease",] = partial(RenewLease, self.task)
        self._outbox = [s for s in self._outbox if s.account != account or not s.duty or s.duty in owed]
        begun = {sending.duty for sending in self._outbox if sending.account == account}
        for name, answer in owed.items():
            if name not in begun:
                self._put(account, answer(), name)

    def _is_lease_due(self, account: bytes) -> bool:
        worker = self.state.worker(self.task, account)
        if worker is None or not worker.is_seated:
            return False
        return 2 * (worker.lease_until - self.state.height) < self.state.params.lease_blocks

    def _put(self, account: bytes, payload: Payload, duty: tuple[object, ...] = ()) -> None:
        delay = self.delays.get(account, 0)
        if delay:
            self.faults["delayed"] += 1
        self._outbox.append(Sending(account, payload, self.state.height + delay, duty))

    def _arrives(self, sending: Sending) -> bool:
        if not self.is_up(sending.account):
            return False
        if self.dice.random() < self.loss:
            self.faults["lost"] += 1
            return False
        if isinstance(sending.payload, self.killed_after.get(sending.account, ())):
            del self.killed_after[sending.account]
            self.outages.append(Outage(frozenset([sending.account]), self.state.height + 1, FOREVER))
            self.faults["killed"] += 1
        return True

    def served(self, place: Place, wanted: Iterable[str]) -> dict[str, memoryview]:
        """Return the claimed tensors that the worker of a cell gives: none while it is away."""
        if self.is_up(self.owners[place]):
            return super().served(place, wanted)
        self.faults["not served"] += 1
        return {}
