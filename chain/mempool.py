"""Transactions waiting for a block: bounded, one queue of nonces an account, a lane kept for duties."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from chain.codec import encode
from chain.ledger import check_envelope
from chain.reasons import Reason
from chain.state import State
from chain.transactions import DUTIES, Transaction

DEFAULT_BYTES = 16 << 20
DUTY_SHARE = 4
"""One part in four of the bytes is kept for duties."""
MAX_QUEUE = 256
"""Transactions of one account."""


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

    def __len__(self) -> int:
        return len(self._by_id)

    def __contains__(self, tx_id: bytes) -> bool:
        return tx_id in self._by_id

    def __iter__(self) -> Iterator[Transaction]:
        return (entry.transaction for entry in self._by_id.values())

    def add(self, state: State, transaction: Transaction) -> Reason | None:
        """Take a transaction; return why not, or None. The signature is the caller's to check."""
        body = transaction.body
        entry = Entry(transaction, transaction.tx_id, len(encode(transaction)), isinstance(body.payload, DUTIES))
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
        queue = self._queues.setdefault(body.sender, {})
        present = queue.get(body.nonce)
        if present is not None and body.fee <= present.transaction.body.fee:
            return Reason.LOW_FEE
        if not self._make_room(entry):
            return Reason.TOO_MANY
        if present is not None:
            self._drop(present)
        self._queues.setdefault(body.sender, {})[body.nonce] = entry
        self._by_id[entry.tx_id] = entry
        self._held[entry.is_duty] += entry.size
        return None

    def _make_room(self, entry: Entry) -> bool:
        """Evict the cheapest of the entry's lane, each cheaper than it, until it fits."""
        room = self._max[entry.is_duty] - self._held[entry.is_duty]
        if room >= entry.size:
            return True
        lane = sorted((e for e in self._by_id.values() if e.is_duty == entry.is_duty), key=lambda e: e.price)
        victims: list[Entry] = []
        for victim in lane:
            if room >= entry.size:
                break
            if victim.price >= entry.price:
                return False
            victims.append(victim)
            room += victim.size
        if room < entry.size:
            return False
        for victim in victims:
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
            if not body.valid_from <= state.height + 1 <= body.valid_until or body.fee > balance:
                break
            balance -= body.fee
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
