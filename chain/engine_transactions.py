"""Transactions at work: the mempool behind gossip, and this peer's own until they have receipts."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated

from msgspec import Meta

from chain.blocks import Block
from chain.codec import DecodeError, decode, encode
from chain.engine_gate import ACCEPTED, Disposition, ignored, rejected
from chain.engine_outbox import Outbox, Own, Position
from chain.engine_seam import SubmitRefused, TransactionExpired
from chain.engine_threads import Threads
from chain.keys import PrivateKey
from chain.ledger import Executed, Reason, Receipt
from chain.mempool import Mempool
from chain.state import State
from chain.transactions import MAX_TRANSACTION_BYTES, Evidence, Payload, Transaction, decode_transaction

BATCH = 128
BATCH_BYTES = 256 * 1024
MAX_BATCH_BYTES = BATCH_BYTES + MAX_TRANSACTION_BYTES + 1024
LARGE_BATCH = 8
"""Transactions from which signatures are checked in a thread."""
KEPT_RECEIPTS = 4096
FALSE = frozenset((Reason.WRONG_CHAIN, Reason.TOO_LARGE))
"""Refusals that no honest peer's state can explain."""

Batch = Annotated[
    tuple[Annotated[bytes, Meta(max_length=MAX_TRANSACTION_BYTES)], ...], Meta(min_length=1, max_length=BATCH)
]


def pack(transactions: Iterable[Transaction]) -> Iterator[bytes]:
    """Yield gossip messages: arrays of encoded transactions, bounded in count and bytes."""
    batch: list[bytes] = []
    for transaction in transactions:
        data = transaction.encoded
        if batch and (len(batch) == BATCH or sum(map(len, batch)) + len(data) > BATCH_BYTES):
            yield encode(tuple(batch))
            batch = []
        batch.append(data)
    if batch:
        yield encode(tuple(batch))


def _are_signed(transactions: Iterable[Transaction]) -> bool:
    """Whether all signatures are their senders'; the first false one ends the check."""
    return all(transaction.is_signed() for transaction in transactions)


@dataclass
class _Sent:
    """An own transaction; `receipt` once it is included, `lost` when it was given up."""

    own: Own
    receipt: Receipt | None = None
    lost: bool = False


class Transactions:
    """The mempool and the own transactions of one peer."""

    def __init__(self, key: PrivateKey | None, chain_id: bytes) -> None:
        self.mempool = Mempool()
        self.outbox = Outbox(key, chain_id) if key else None
        self._sent: dict[bytes, _Sent] = {}

    async def take(self, data: bytes, state: Callable[[], State], threads: Threads) -> Disposition:
        """Take a gossiped batch: a false transaction condemns it, a new one makes it worth passing on."""
        fresh, refused, disposition = self._sift(data, state())
        checked = fresh or refused[:1]  # whoever sends what is useless signs it at least
        if not await threads.verify(partial(_are_signed, checked), is_large=len(checked) >= LARGE_BATCH):
            return rejected(Reason.BAD_SIGNATURE)
        if not fresh:
            return disposition
        reasons = [self.mempool.add(state(), transaction) for transaction in fresh]
        return ACCEPTED if None in reasons else ignored(reasons[-1] or "known")

    def _sift(self, data: bytes, state: State) -> tuple[list[Transaction], list[Transaction], Disposition]:
        """Return what of a gossiped batch would be taken if signed, what would not, and what the batch is without it.

        What the mempool would refuse, or has already, is not worth a check of its signature.
        """
        try:
            batch: tuple[bytes, ...] = decode(Batch, data, MAX_BATCH_BYTES)
            transactions = [decode_transaction(encoded) for encoded in batch]
        except DecodeError:
            return [], [], rejected("malformed")
        fresh: list[Transaction] = []
        refused: list[Transaction] = []
        disposition = ignored("known")
        for transaction in transactions:
            if transaction.tx_id in self.mempool:
                continue
            reason = self.mempool.refusal(state, transaction)
            if reason in FALSE:
                return [], [], rejected(reason)
            if reason is None:
                fresh.append(transaction)
            else:
                refused.append(transaction)
                disposition = ignored(reason)
        return fresh, refused, disposition

    def select(self, state: State) -> tuple[Transaction, ...]:
        """Return the transactions of the next block."""
        params = state.params
        return self.mempool.select(state, params.max_block_bytes, params.max_block_transactions)

    def unchecked(self, block: Block) -> list[Transaction]:
        """Return the transactions of a block whose signatures have not been checked here."""
        return [transaction for transaction in block.transactions if transaction.tx_id not in self.mempool]

    def evidence(self) -> Iterator[Evidence]:
        """Yield the evidence that waits for a block, of whatever sender."""
        payloads = (transaction.body.payload for transaction in self.mempool)
        return (payload for payload in payloads if isinstance(payload, Evidence))

    def submit(self, payload: Payload, state: State) -> bytes:
        """Sign a payload with the next nonce and return its id; raise `SubmitRefused`."""
        if self.outbox is None:
            raise SubmitRefused("no-key")
        own = self.outbox.add(payload, self._position(state))
        reason = self.mempool.add(state, own.transaction)
        if reason is not None:
            self.outbox.discard(own)
            raise SubmitRefused(reason)
        self._sent[own.names[0]] = _Sent(own)
        return own.names[0]

    def adopt(self, block: Block, executed: Executed) -> None:
        """Take what a final block did: receipts, and own transactions that must be signed again."""
        self.mempool.remove(block.transactions)
        self.mempool.prune(executed.state, {transaction.body.sender for transaction in block.transactions})
        if self.outbox is None:
            return
        receipts = {receipt.tx_id: receipt for receipt in executed.receipts}
        for own in self.outbox.settle(receipts):
            self._sent[own.names[0]].receipt = next(receipts[name] for name in own.names if name in receipts)
        renewed, lost = self.outbox.renew(self._position(executed.state))
        for own in lost:
            self._sent[own.names[0]].lost = True
        for own in renewed:
            self.mempool.add(executed.state, own.transaction)
        self._forget()

    def answer(self, tx_id: bytes) -> Receipt | None:
        """Return the receipt of an own transaction, None while it waits.

        Raises `LookupError` for an id that was not submitted here and `TransactionExpired`.
        """
        sent = self._sent.get(tx_id)
        if sent is None:
            raise LookupError(f"no transaction {tx_id.hex()} was submitted here")
        if sent.lost:
            raise TransactionExpired(tx_id.hex())
        return sent.receipt

    def to_gossip(self, now: float) -> Sequence[bytes]:
        """Return the gossip messages that are due."""
        return list(pack(self.outbox.to_gossip(now))) if self.outbox is not None else []

    def next_gossip(self) -> float:
        """Return when gossip is due."""
        return self.outbox.next_gossip() if self.outbox is not None else float("inf")

    def _position(self, state: State) -> Position:
        account = self.outbox.account if self.outbox is not None else b""
        return Position(state.height, state.account(account).nonce, state.params.min_fee_per_byte)

    def _forget(self) -> None:
        for name in list(self._sent)[: max(0, len(self._sent) - KEPT_RECEIPTS)]:
            if self._sent[name].receipt or self._sent[name].lost:
                del self._sent[name]
