"""Key rotation: an account goes on under a fresh key, with all that it owns and all that it answers for.

Balance, bonded and unbonding stake, bars and the validator's record move; the old account is closed for
good. What others still wait for, or may still take, does not move: a client of a watched task, a worker
and a party of an open audit finish first. Deposits to a closed account are refused where a sender can
learn it (`transfer`), and go to the heir where a hook pays.

A validator leaves the set at once and comes back under its new key as any newcomer does, within the churn
limit and with an onion that is a whole epoch old: until then its owner can start the peer with the new key
and a new signing record. The old key stays liable for what it signed up to its rotation, at the heir's
expense.
"""

from msgspec.structs import replace

from chain.keys import verify
from chain.ledger.book import Book, name
from chain.reasons import Reason, Refused
from chain.records import Rotation, Validator, is_closed
from chain.state import Table
from chain.transactions import RotateKey, rotation_bytes


def rotate(book: Book, sender: bytes, payload: RotateKey) -> None:
    """Move everything of the sender to its successor and close the sender."""
    heir = payload.successor
    if heir == sender or _is_in_use(book, heir):
        raise Refused(Reason.KEY_IN_USE)
    if not verify(heir, rotation_bytes(book.chain.chain_id, sender), payload.proof):
        raise Refused(Reason.BAD_PROOF)
    if is_obliged(book, sender):
        raise Refused(Reason.OBLIGED)
    _move_validator(book, sender, payload)
    account = book.account(sender)
    book.draft.put(
        Table.ACCOUNTS, heir, replace(account, nonce=0, balance=account.balance + book.account(heir).balance)
    )
    book.set_account(sender, balance=0, bonded=0)
    for key, leaving in book.draft.items(Table.UNBONDINGS, sender):
        book.draft.delete(Table.UNBONDINGS, key)
        book.draft.put(Table.UNBONDINGS, heir + key[len(sender) :], leaving)
    _succeed(book, sender, heir)
    book.note("rotated", account=name(sender), successor=name(heir))


def _is_in_use(book: Book, heir: bytes) -> bool:
    """Whether a key has signed or staked anything; being paid, which anybody can do to it, is no use of it."""
    known = book.account(heir)
    return bool(known.nonce or known.bonded) or book.draft.get(Table.ROTATIONS, heir) is not None


def is_obliged(book: Book, account: bytes) -> bool:
    """Whether others wait for the account, or may still charge or pay it, in some task."""
    if account in book.draft.origin.obliged or account in book.draft.summoned:
        return True
    for key, _ in book.draft.items(Table.JOBS, account):
        worker = book.worker(key[len(account) :], account)
        if worker is not None and (worker.is_present or worker.bond or worker.withheld or worker.engaged):
            return True
    return False


def _move_validator(book: Book, sender: bytes, payload: RotateKey) -> None:
    known: Validator | None = book.draft.get(Table.VALIDATORS, sender)
    if known is None:
        return
    if known.is_tombstoned:
        raise Refused(Reason.TOMBSTONED)
    if known.power and not book.has_other_validator(sender):
        raise Refused(Reason.LAST_VALIDATOR)
    fresh = Validator(
        payload.onion_tip,
        registered_at=book.height,
        is_jailed=known.is_jailed,
        jailed_until=known.jailed_until,
    )
    book.draft.delete(Table.VALIDATORS, sender)
    book.draft.put(Table.VALIDATORS, payload.successor, fresh)


def _succeed(book: Book, sender: bytes, heir: bytes) -> None:
    """Write the line of successors so that the heir of any of its accounts is two look-ups away."""
    own: Rotation = book.draft.get(Table.ROTATIONS, sender) or Rotation(sender, sender)
    book.draft.put(Table.ROTATIONS, sender, replace(own, last=heir, closed_at=book.height))
    first: Rotation = book.draft.get(Table.ROTATIONS, own.first)
    book.draft.put(Table.ROTATIONS, own.first, replace(first, last=heir))
    book.draft.put(Table.ROTATIONS, heir, Rotation(own.first, heir))


def refuse_closed(book: Book, account: bytes) -> None:
    """Raise `Refused` for an account whose key was rotated."""
    if is_closed(book.draft.get(Table.ROTATIONS, account)):
        raise Refused(Reason.CLOSED)
