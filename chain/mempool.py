"""Transactions waiting for a block: bounded, one queue of nonces an account, a lane kept for duties."""

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from chain.ledger import check_envelope
from chain.reasons import Reason
from chain.state import State
from chain.transactions import DUTIES, Bond, Payload, PostTask, TopUp, Transaction, Transfer

DEFAULT_BYTES = 16 << 20
DUTY_SHARE = 4
"""One part in four of the bytes is kept for duties."""
MAX_QUEUE = 256
"""Transactions of one account."""
ACCOUNT_SHARE = 16
"""No account fills more than one part in sixteen of a lane."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A waiting transaction with its size and whether it is a duty."""

    transaction: Transaction
    tx_id: bytes
    size: int
    is_duty: bool

    @property
    def price(self) -> float:
        """Fee per byte."""
        return self.transaction.body.fee / self.size


class Mempool:
    """Waiting transactions whose signatures have been checked; `add` says why it refuses one."""

    def __init__(self, max_bytes: int = DEFAULT_BYTES) -> None:
        self._max = {True: max_bytes // DUTY_SHARE, False: max_bytes - max_bytes // DUTY_SHARE}
        self._held = {True: 0, False: 0}
        self._queues: dict[bytes, dict[int, Entry]] = {}
        self._by_id: dict[bytes, Entry] = {}
        self._cheapest: dict[bool, list[tuple[float, bytes]]] = {True: [], False: []}
        """Heaps of (price, id) by lane; ids that have gone are skipped when they surface."""

    def __len__(self) -> int:
        return len(self._by_id)

    def __contains__(self, tx_id: bytes) -> bool:
        return tx_id in self._by_id

    def __iter__(self) -> Iterator[Transaction]:
        return (entry.transaction for entry in self._by_id.values())

    def add(self, state: State, transaction: Transaction) -> Reason | None:
        """Take a transaction; return why not, or None. The signature is the caller's to check."""
        body = transaction.body
        entry = Entry(transaction, transaction.tx_id, len(transaction.encoded), isinstance(body.payload, DUTIES))
        nonce = state.account(body.sender).nonce
        if entry.tx_id in self._by_id:
            return None
        if not nonce <= body.nonce < nonce + MAX_QUEUE:
            return Reason.WRONG_NONCE
        reason = check_envelope(state, transaction, max(state.height + 1, body.valid_from), body.nonce)
        if reason is not None:
            return reason
        return self._place(entry)

    def _place(self, entry: Entry) -> Reason | None:
        body = entry.transaction.body
        queue = self._queues.get(body.sender, {})
        present = queue.get(body.nonce)
        if present is not None and body.fee <= present.transaction.body.fee:
            return Reason.LOW_FEE
        own = sum(other.size for other in queue.values() if other.is_duty == entry.is_duty and other is not present)
        if (own + entry.size) * ACCOUNT_SHARE > self._max[entry.is_duty] or not self._make_room(entry):
            return Reason.MEMPOOL_FULL
        if present is not None:
            self._drop(present)
        self._queues.setdefault(body.sender, {})[body.nonce] = entry
        self._by_id[entry.tx_id] = entry
        self._held[entry.is_duty] += entry.size
        heapq.heappush(self._cheapest[entry.is_duty], (entry.price, entry.tx_id))
        return None

    def _make_room(self, entry: Entry) -> bool:
        """Evict the cheapest of the entry's lane, each cheaper than it, until it fits."""
        heap = self._cheapest[entry.is_duty]
        room = self._max[entry.is_duty] - self._held[entry.is_duty]
        victims: dict[bytes, Entry] = {}
        while room < entry.size and heap and heap[0][0] < entry.price:
            victim = self._by_id.get(heapq.heappop(heap)[1])
            if victim is not None and victim.tx_id not in victims:
                victims[victim.tx_id] = victim
                room += victim.size
        if room < entry.size:
            for victim in victims.values():
                heapq.heappush(heap, (victim.price, victim.tx_id))
            return False
        for victim in victims.values():
            self._drop(victim)
        return True

    def _drop(self, entry: Entry) -> None:
        body = entry.transaction.body
        if self._by_id.pop(entry.tx_id, None) is None:
            return
        self._held[entry.is_duty] -= entry.size
        queue = self._queues.get(body.sender, {})
        if queue.get(body.nonce) is entry:
            del queue[body.nonce]
        if not queue:
            self._queues.pop(body.sender, None)

    def select(self, state: State, max_bytes: int, max_count: int) -> tuple[Transaction, ...]:
        """Return transactions for the next block: duties first, then by fee per byte, nonces in order."""
        ready = [self._runnable(state, sender) for sender in sorted(self._queues)]
        ready.sort(key=lambda run: (-any(e.is_duty for e in run), -max((e.price for e in run), default=0.0)))
        chosen: list[Transaction] = []
        for run in ready:
            for entry in run:
                if entry.size > max_bytes or len(chosen) >= max_count:
                    break
                chosen.append(entry.transaction)
                max_bytes -= entry.size
        return tuple(chosen)

    def _runnable(self, state: State, sender: bytes) -> list[Entry]:
        queue = self._queues[sender]
        nonce = state.account(sender).nonce
        balance = state.account(sender).balance
        run = []
        while (entry := queue.get(nonce)) is not None:
            body = entry.transaction.body
            if body.fee > balance or check_envelope(state, entry.transaction, state.height + 1, nonce) is not None:
                break
            balance = max(0, balance - body.fee - _spent(body.payload))
            run.append(entry)
            nonce += 1
        return run

    def remove(self, transactions: Iterable[Transaction]) -> None:
        """Drop transactions that a block has included."""
        for transaction in transactions:
            entry = self._by_id.get(transaction.tx_id)
            if entry is not None:
                self._drop(entry)

    def prune(self, state: State) -> None:
        """Drop what can no longer be included: old nonces and ended windows."""
        for entry in list(self._by_id.values()):
            body = entry.transaction.body
            if body.nonce < state.account(body.sender).nonce or body.valid_until <= state.height:
                self._drop(entry)
        for is_duty, heap in self._cheapest.items():
            if len(heap) > 2 * len(self._by_id) + 64:
                self._cheapest[is_duty] = [item for item in heap if item[1] in self._by_id]
                heapq.heapify(self._cheapest[is_duty])


def _spent(payload: Payload) -> int:
    """Return the most that a payload takes from its sender's balance."""
    match payload:
        case Transfer() | Bond() | TopUp():
            return payload.amount
        case PostTask():
            return payload.escrow
        case _:
            return 0
