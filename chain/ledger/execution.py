"""Execution of one block: envelope checks, payloads with receipts, hooks, seed, root, conservation."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from msgspec.structs import replace

from chain.blocks import BlockContext
from chain.ledger.book import Book, Event
from chain.ledger.hooks import after_transactions, before_transactions
from chain.ledger.payloads import apply
from chain.ledger.rotation import refuse_closed
from chain.randomness import next_seed, peel
from chain.reasons import InvalidBlock, Reason, Refused
from chain.records import Account
from chain.state import Changes, Draft, State, Table
from chain.transactions import DUTIES, MAX_TRANSACTION_BYTES, Transaction

__all__ = ["Event", "Executed", "Receipt", "check_envelope", "execute", "is_owed"]


@dataclass(frozen=True)
class Receipt:
    """What became of a transaction: `reason` is empty when it was applied."""

    tx_id: bytes
    reason: str = ""

    @property
    def ok(self) -> bool:
        """Whether the payload was applied."""
        return not self.reason


@dataclass(frozen=True)
class Executed:
    """A block's effect: the state after it, a receipt a transaction, events in order, and changed records."""

    state: State
    receipts: tuple[Receipt, ...]
    events: tuple[Event, ...]
    changes: Changes = field(default_factory=dict)


def check_envelope(state: State, transaction: Transaction, height: int, nonce: int | None = None) -> Reason | None:
    """Return why the envelope is not valid at `height`, its signature left out; None if it is.

    `nonce` is the one to expect, by default the sender's next.
    """
    account = state.account(transaction.body.sender)
    expected = account if nonce is None else replace(account, nonce=nonce)
    return _refusal(state, expected, transaction, height)


def _refusal(state: State, account: Account, transaction: Transaction, height: int) -> Reason | None:
    """Return why an envelope is not valid for `account` as it is within the block on `state`."""
    body = transaction.body
    size = len(transaction.encoded)
    if size > MAX_TRANSACTION_BYTES:
        return Reason.TOO_LARGE
    if body.chain_id != state.chain.chain_id:
        return Reason.WRONG_CHAIN
    if state.is_closed(body.sender):
        return Reason.CLOSED
    if body.nonce != account.nonce:
        return Reason.WRONG_NONCE
    if not body.valid_from <= height <= body.valid_until:
        return Reason.OUTSIDE_WINDOW
    if body.fee < state.params.min_fee_per_byte * size:
        if not isinstance(body.payload, DUTIES):
            return Reason.LOW_FEE
        if not state.is_participant(body.sender):
            return Reason.NOT_OWED
    return Reason.NO_FUNDS if body.fee > account.balance else None


def is_owed(state: State, transaction: Transaction) -> bool:
    """Whether the payload would be applied in a block on `state` before anything else."""
    book = Book(Draft(state), state.height + 1, state.seed, state.validators())
    try:
        apply(book, transaction.body.sender, transaction.body.payload)
    except Refused:
        return False
    return True


def execute(state: State, context: BlockContext, transactions: Sequence[Transaction]) -> Executed:
    """Return the effect of a block on `state`; raise `InvalidBlock`.

    Signatures of transactions are the caller's to check, once each.
    """
    _check_context(state, context)
    if len(transactions) > state.params.max_block_transactions:
        raise InvalidBlock(Reason.TOO_MANY)
    draft = Draft(state)
    book = Book(draft, context.height, context.seed, state.validators())
    _advance(book, state, context)
    before_transactions(book, context.parent_absent)
    receipts = tuple(_run(book, state, transaction) for transaction in transactions)
    after_transactions(book)
    _check_conservation(book, state)
    return Executed(draft.freeze(state), receipts, tuple(draft.events), draft.changes)


def _check_context(state: State, context: BlockContext) -> None:
    if context.chain_id != state.chain.chain_id:
        raise InvalidBlock(Reason.WRONG_CHAIN)
    if context.height != state.height + 1:
        raise InvalidBlock(Reason.WRONG_HEIGHT)
    if context.timestamp <= state.chain.timestamp:
        raise InvalidBlock(Reason.WRONG_TIME)
    validator = state.validator(context.proposer)
    if validator is None or context.proposer not in state.validators():
        raise InvalidBlock(Reason.WRONG_PROPOSER)
    if peel(context.reveal) != validator.onion_tip:
        raise InvalidBlock(Reason.WRONG_REVEAL)
    if context.seed != next_seed(state.seed, context.reveal):
        raise InvalidBlock(Reason.WRONG_SEED)


def _advance(book: Book, state: State, context: BlockContext) -> None:
    """Take the proposer's reveal, the height, the time and the seeds."""
    validator = book.draft.get(Table.VALIDATORS, context.proposer)
    book.draft.put(Table.VALIDATORS, context.proposer, replace(validator, onion_tip=context.reveal))
    chain = state.chain
    is_new_epoch = context.height % state.params.epoch_blocks == 0
    book.set_chain(
        height=context.height,
        timestamp=context.timestamp,
        seed=context.seed,
        leader_seed=chain.epoch_seed if is_new_epoch else chain.leader_seed,
        epoch_seed=context.seed if is_new_epoch else chain.epoch_seed,
    )


def _run(book: Book, state: State, transaction: Transaction) -> Receipt:
    body = transaction.body
    account = book.account(body.sender)
    reason = _refusal(state, account, transaction, book.height)
    if reason is not None:
        raise InvalidBlock(reason, transaction.tx_id.hex())
    book.set_account(body.sender, nonce=account.nonce + 1, balance=account.balance - body.fee)
    book.burn(body.fee)
    fork = book.fork()
    try:
        refuse_closed(book, body.sender)  # rotated earlier in this block
        apply(fork, body.sender, body.payload)
    except Refused as refusal:
        return Receipt(transaction.tx_id, str(refusal.reason))
    book.merge(fork)
    return Receipt(transaction.tx_id)


def _check_conservation(book: Book, state: State) -> None:
    """Raise `AssertionError` unless every base unit is still somewhere."""
    gained = 0
    for table, changed in book.draft.changes.items():
        for key, record in changed.items():
            gained += book.holding(record) - book.holding(state.tables[table].get(key))
    if gained != 0:
        raise AssertionError(f"block {book.height} would create {gained} base units")
