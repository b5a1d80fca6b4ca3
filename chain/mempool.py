"""Transactions waiting for a block: bounded, one queue of nonces an account, a lane kept for duties."""

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from chain.genesis import MAX_ISSUED
from chain.hashing import digest
from chain.ledger import check_envelope, is_owed
from chain.reasons import Reason
from chain.state import State
from chain.transactions import DUTIES, Bond, Payload, PostTask, RotateKey, TopUp, Transaction, Transfer

DEFAULT_BYTES = 64 << 20
DUTY_SHARE = 4
"""One part in four of the bytes is kept for duties."""
OVERHEAD = 1280
"""Bytes of memory that a waiting transaction takes beside its encoding (*measured*)."""
MAX_QUEUE = 256
"""Transactions of one account."""
KEPT_BLOCKS = 300
"""Heights for which a transaction may wait, however long it would be valid."""
ACCOUNT_SHARE = 16
"""No account fills more than one part in sixteen of a lane."""
DUTIES_A_BLOCK = 64
"""Duties of one account in a block: each carries up to 32 entries."""
MAX_TRIED = 4096
"""Duties that the choice of one block tries."""
MAX_REFUSED = 128
"""Duties that nobody waits for in a block: stale ones use up their nonce, a flood of them takes no more room."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A waiting transaction: its encoded size, whether it is a duty, and its fee per byte."""

    transaction: Transaction
    size: int
    is_duty: bool
    price: float

    @classmethod
    def of(cls, transaction: Transaction) -> "Entry":
        """Return the entry of a transaction."""
        size = len(transaction.encoded)
        return cls(transaction, size, isinstance(transaction.body.payload, DUTIES), transaction.body.fee / size)

    @property
    def tx_id(self) -> bytes:
        """The id of the transaction."""
        return self.transaction.tx_id

    @property
    def weight(self) -> int:
        """Bytes of memory."""
        return self.size + OVERHEAD


@dataclass(slots=True)
class _Queue:
    """What waits of one account, by nonce, and its weight by lane."""

    entries: dict[int, Entry] = field(default_factory=dict)
    held: dict[bool, int] = field(default_factory=lambda: {True: 0, False: 0})

    def put(self, entry: Entry) -> None:
        self.entries[entry.transaction.body.nonce] = entry
        self.held[entry.is_duty] += entry.weight

    def drop(self, entry: Entry) -> None:
        del self.entries[entry.transaction.body.nonce]
        self.held[entry.is_duty] -= entry.weight

    def rank(self) -> tuple[bool, float]:
        """Return where the account stands in line: the least comes first."""
        return not self.held[True], -max(entry.price for entry in self.entries.values())


class Mempool:
    """Waiting transactions whose signatures have been checked; `add` says why it refuses one."""

    def __init__(self, max_bytes: int = DEFAULT_BYTES) -> None:
        self._max = {True: max_bytes // DUTY_SHARE, False: max_bytes - max_bytes // DUTY_SHARE}
        self._held = {True: 0, False: 0}
        self._queues: dict[bytes, _Queue] = {}
        self._by_id: dict[bytes, Entry] = {}
        self._cheapest: dict[bool, list[tuple[float, bytes]]] = {True: [], False: []}
        """Heaps of (price, id) by lane; ids that have gone are skipped when they surface."""
        self._ending: list[tuple[float, bytes]] = []
        """A heap of (last height, id), likewise."""

    def __len__(self) -> int:
        return len(self._by_id)

    def __contains__(self, tx_id: bytes) -> bool:
        return tx_id in self._by_id

    def __iter__(self) -> Iterator[Transaction]:
        return (entry.transaction for entry in self._by_id.values())

    def add(self, state: State, transaction: Transaction) -> Reason | None:
        """Take a transaction; return why not, or None. The signature is the caller's to check."""
        if transaction.tx_id in self._by_id:
            return None
        checked = self._checked(state, transaction)
        if isinstance(checked, Reason):
            return checked
        self._place(checked, state.height + KEPT_BLOCKS)
        return None

    def refusal(self, state: State, transaction: Transaction) -> Reason | None:
        """Return why a transaction that is not here would not be taken, whatever its signature; None if it would."""
        checked = self._checked(state, transaction)
        return checked if isinstance(checked, Reason) else None

    def _checked(self, state: State, transaction: Transaction) -> Entry | Reason:
        body = transaction.body
        nonce = state.account(body.sender).nonce
        if not nonce <= body.nonce < nonce + MAX_QUEUE:
            return Reason.WRONG_NONCE
        reason = check_envelope(state, transaction, max(state.height + 1, body.valid_from), body.nonce)
        if reason is not None:
            return reason
        entry, queue, taken = Entry.of(transaction), self._queues.get(body.sender), 0
        if queue is not None:
            present = queue.entries.get(body.nonce)
            if present is not None and body.fee <= present.transaction.body.fee:
                return Reason.LOW_FEE
            replaced = present.weight if present is not None and present.is_duty == entry.is_duty else 0
            taken = queue.held[entry.is_duty] - replaced
        is_too_much = (taken + entry.weight) * ACCOUNT_SHARE > self._max[entry.is_duty]
        return Reason.MEMPOOL_FULL if is_too_much or not self._has_room(state, entry, taken) else entry

    def _has_room(self, state: State, entry: Entry, taken: int) -> bool:
        """Whether the entry fits, or would once cheaper ones of its lane have been evicted.

        In a full lane of duties what is owed now takes the place of what whoever holds most there sent last.
        """
        room = self._max[entry.is_duty] - self._held[entry.is_duty]
        if room >= entry.weight or self._evict(entry, room, really=False):
            return True
        if not entry.is_duty or not is_owed(state, entry.transaction):
            return False
        return self._greediest().held[True] > taken + entry.weight

    def _greediest(self) -> _Queue:
        return max(self._queues.values(), key=lambda queue: queue.held[True])

    def _evict(self, entry: Entry, room: int, *, really: bool) -> bool:
        """Drop the cheapest of the entry's lane, each cheaper than it, until it fits; or only say whether it would."""
        heap = self._cheapest[entry.is_duty]
        victims: dict[bytes, Entry] = {}
        while room < entry.weight and heap and heap[0][0] < entry.price:
            victim = self._by_id.get(heapq.heappop(heap)[1])
            if victim is not None and victim.tx_id not in victims:
                victims[victim.tx_id] = victim
                room += victim.weight
        for victim in victims.values():
            if really:
                self._drop(victim)
            else:
                heapq.heappush(heap, (victim.price, victim.tx_id))
        return room >= entry.weight

    def _place(self, entry: Entry, last: int) -> None:
        self._evict(entry, self._max[entry.is_duty] - self._held[entry.is_duty], really=True)
        while entry.is_duty and self._max[True] - self._held[True] < entry.weight:
            held = self._greediest().entries
            self._drop(held[max(nonce for nonce, other in held.items() if other.is_duty)])
        body = entry.transaction.body
        queue = self._queues.setdefault(body.sender, _Queue())
        present = queue.entries.get(body.nonce)
        if present is not None:
            self._drop(present)
            self._queues[body.sender] = queue
        queue.put(entry)
        self._by_id[entry.tx_id] = entry
        self._held[entry.is_duty] += entry.weight
        heapq.heappush(self._cheapest[entry.is_duty], (entry.price, entry.tx_id))
        heapq.heappush(self._ending, (min(body.valid_until, last), entry.tx_id))

    def _drop(self, entry: Entry) -> None:
        sender = entry.transaction.body.sender
        del self._by_id[entry.tx_id]
        self._held[entry.is_duty] -= entry.weight
        queue = self._queues[sender]
        queue.drop(entry)
        if not queue.entries:
            del self._queues[sender]

    def select(self, state: State, max_bytes: int, max_count: int) -> tuple[Transaction, ...]:
        """Return transactions for the next block: duties first, then by fee per byte, nonces in order."""
        line = [(queue.rank(), digest("line", state.seed, sender), sender) for sender, queue in self._queues.items()]
        heapq.heapify(line)
        chosen: list[Transaction] = []
        tries, refused = iter(range(MAX_TRIED)), iter(range(MAX_REFUSED))
        while line and len(chosen) < max_count:
            for entry in self._runnable(state, heapq.heappop(line)[2], tries, refused):
                if entry.size > max_bytes or len(chosen) == max_count:
                    break
                chosen.append(entry.transaction)
                max_bytes -= entry.size
        return tuple(chosen)

    def _runnable(self, state: State, sender: bytes, tries: Iterator[int], refused: Iterator[int]) -> Iterator[Entry]:
        """Yield what an account can have in the next block; duties that would be refused use up `refused`."""
        entries = self._queues[sender].entries
        nonce, balance = state.account(sender).nonce, state.account(sender).balance
        duties = 0
        while (entry := entries.get(nonce)) is not None:
            body = entry.transaction.body
            if body.fee > balance or check_envelope(state, entry.transaction, state.height + 1, nonce) is not None:
                return
            duties += entry.is_duty
            if entry.is_duty and (duties > DUTIES_A_BLOCK or next(tries, None) is None):
                return
            if entry.is_duty and not is_owed(state, entry.transaction) and next(refused, None) is None:
                return
            balance = max(0, balance - body.fee - _spent(body.payload))
            yield entry
            nonce += 1

    def remove(self, transactions: Iterable[Transaction]) -> None:
        """Drop transactions that a block has included."""
        for transaction in transactions:
            entry = self._by_id.get(transaction.tx_id)
            if entry is not None:
                self._drop(entry)

    def prune(self, state: State, senders: Iterable[bytes] | None = None) -> None:
        """Drop ended windows, what waited too long, and old nonces of `senders`, or of all."""
        for sender in set(self._queues if senders is None else senders):
            queue, nonce = self._queues.get(sender), state.account(sender).nonce
            for entry in [e for n, e in queue.entries.items() if n < nonce] if queue is not None else ():
                self._drop(entry)
        while self._ending and self._ending[0][0] <= state.height:
            ended = self._by_id.get(heapq.heappop(self._ending)[1])
            if ended is not None:
                self._drop(ended)
        for heap in (*self._cheapest.values(), self._ending):
            self._forget_gone(heap)

    def _forget_gone(self, heap: list[tuple[float, bytes]]) -> None:
        if len(heap) > 2 * len(self._by_id) + 64:
            heap[:] = [item for item in heap if item[1] in self._by_id]
            heapq.heapify(heap)


def _spent(payload: Payload) -> int:
    """Return the most that a payload takes from its sender's balance."""
    match payload:
        case Transfer() | Bond() | TopUp():
            return payload.amount
        case PostTask():
            return payload.escrow
        case RotateKey():
            return MAX_ISSUED
        case _:
            return 0
