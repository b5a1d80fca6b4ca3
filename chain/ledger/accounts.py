"""Balances, stake and the one offence of consensus."""

from msgspec.structs import replace

from chain.blocks import Vote, is_conflict
from chain.codec import DecodeError, decode
from chain.hashing import digest
from chain.keys import verify
from chain.ledger.book import Book, name
from chain.ledger.rotation import refuse_closed
from chain.reasons import Reason, Refused
from chain.records import Conviction, Rotation, Validator
from chain.state import Table
from chain.transactions import Bond, Evidence, Transfer, Unbond


def transfer(book: Book, sender: bytes, payload: Transfer) -> None:
    """Move balance."""
    if payload.amount == 0:
        raise Refused(Reason.ZERO_AMOUNT)
    refuse_closed(book, payload.to)
    book.debit(sender, payload.amount)
    book.credit(payload.to, payload.amount)


def bond(book: Book, sender: bytes, payload: Bond) -> None:
    """Lock balance as stake."""
    if payload.amount == 0:
        raise Refused(Reason.ZERO_AMOUNT)
    book.debit(sender, payload.amount)
    book.set_account(sender, bonded=book.account(sender).bonded + payload.amount)


def unbond(book: Book, sender: bytes, payload: Unbond) -> None:
    """Start to release stake."""
    bonded = book.account(sender).bonded
    if payload.amount == 0:
        raise Refused(Reason.ZERO_AMOUNT)
    if bonded < payload.amount:
        raise Refused(Reason.NO_STAKE)
    _refuse_empty_set(book, sender, bonded - payload.amount)
    book.set_account(sender, bonded=bonded - payload.amount)
    book.release(sender, payload.amount, leaves_at(book, sender) + book.params.unbonding_blocks)


def leaves_at(book: Book, account: bytes) -> int:
    """Return the last height that stake unbonded now can vote at: validators' power follows as an epoch begins."""
    known: Validator | None = book.draft.get(Table.VALIDATORS, account)
    epoch = book.params.epoch_blocks
    is_behind_votes = known is not None and known.power > book.account(account).bonded
    return -(-book.height // epoch) * epoch if is_behind_votes else book.height


def _refuse_empty_set(book: Book, sender: bytes, left: int) -> None:
    """The last validator cannot leave: a chain without validators could never go on."""
    if left < book.params.min_stake and not book.has_other_validator(sender):
        raise Refused(Reason.LAST_VALIDATOR)


def withdraw(book: Book, sender: bytes) -> None:
    """Move released unbondings to the balance."""
    released = [(k, u) for k, u in book.draft.items(Table.UNBONDINGS, sender) if u.release_at <= book.height]
    if not released:
        raise Refused(Reason.NOTHING_RELEASED)
    for key, unbonding in released:
        book.draft.delete(Table.UNBONDINGS, key)
        book.credit(sender, unbonding.amount)


def faucet(book: Book, sender: bytes) -> None:
    """Give the network's grant, once an account."""
    grant = book.params.faucet_grant
    if grant == 0 or book.chain.faucet < grant:
        raise Refused(Reason.NO_FAUCET)
    if book.account(sender).granted:
        raise Refused(Reason.ALREADY_GRANTED)
    book.set_chain(faucet=book.chain.faucet - grant)
    book.set_account(sender, granted=True)
    book.credit(sender, grant)


def evidence(book: Book, sender: bytes, payload: Evidence) -> None:
    """Burn the stake of a validator that signed two conflicting votes, and keep it out for good."""
    vote = _proven(book, payload)
    culprit = book.heir(vote.validator)
    known: Validator = book.draft.get(Table.VALIDATORS, culprit)
    if known.is_tombstoned:
        raise Refused(Reason.EVIDENCE_KNOWN)
    if not book.has_other_validator(culprit):
        raise Refused(Reason.LAST_VALIDATOR)
    slashed = book.account(culprit).bonded + _take_unbondings(book, culprit)
    reward = slashed * book.params.reporter_share // 10_000 if sender != culprit else 0
    book.set_account(culprit, bonded=0)
    book.credit(sender, reward)
    book.burn(slashed - reward)
    book.draft.put(Table.VALIDATORS, culprit, replace(known, power=0, is_tombstoned=True))
    subject = digest("offence", vote.validator, vote.height.to_bytes(8, "big"), vote.view.to_bytes(8, "big"))
    votes = (payload.first, payload.second)
    conviction = Conviction(subject, 1, culprit, None, book.height, slashed, subject, *votes)
    book.draft.put(Table.CONVICTIONS, subject, conviction)
    book.note(
        "equivocation",
        validator=name(culprit),
        height=vote.height,
        slashed=str(slashed),
        evidence=subject.hex(),
    )


def _proven(book: Book, payload: Evidence) -> Vote:
    """Return the first of two authentic, conflicting votes of who can still answer for them; raise `Refused`."""
    try:
        first: Vote = decode(Vote, payload.first)
        second: Vote = decode(Vote, payload.second)
    except DecodeError:
        raise Refused(Reason.BAD_EVIDENCE) from None
    signer = first.validator
    is_known = book.draft.get(Table.VALIDATORS, book.heir(signer)) is not None
    if not is_known or not is_conflict(first, second) or first.chain_id != book.chain.chain_id:
        raise Refused(Reason.BAD_EVIDENCE)
    if first.height > book.height:
        raise Refused(Reason.EVIDENCE_EARLY)
    if first.height + book.params.unbonding_blocks <= book.height:
        raise Refused(Reason.EVIDENCE_OLD)
    rotated: Rotation | None = book.draft.get(Table.ROTATIONS, signer)
    if rotated is not None and 0 < rotated.closed_at < first.height:
        raise Refused(Reason.BAD_EVIDENCE)
    if not all(verify(signer, vote.signing_bytes, vote.signature) for vote in (first, second)):
        raise Refused(Reason.BAD_EVIDENCE)
    return first


def _take_unbondings(book: Book, culprit: bytes) -> int:
    """Return the stake that was on its way out: an offender cannot unbond ahead of the evidence."""
    held = [(k, u) for k, u in book.draft.items(Table.UNBONDINGS, culprit) if u.release_at > book.height]
    for key, _ in held:
        book.draft.delete(Table.UNBONDINGS, key)
    return sum(unbonding.amount for _, unbonding in held)
