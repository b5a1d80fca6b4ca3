"""Validators: how stake becomes power, who joins with which onion, and how the set changes.

The set changes at the first block of an epoch only, and by at most `churn_share` of its power (or the
least stake, so that a small network can grow): power then moves toward stake, everybody's by the same
share of what it wants, so that nobody waits behind a larger one. With a share under a third any quorum
of the new set holds more than a third of the old one's power: whoever verified one can verify the other
(light clients, weak subjectivity). One validator becomes many by a quarter more power an epoch: a newcomer
of equal stake counts fully after five. At most `MAX_VALIDATORS` have power: the strongest by stake, and
a stronger newcomer enters as a weaker one has left.

Losses for cause do not wait: who is jailed, tombstoned or rotates its key is out with the next block, and
slashed stake votes no more; but never the last validator. Leaving stake votes until power has followed,
and is released a whole unbonding period after its last vote: so long it can be slashed.

An onion counts only from a whole epoch after it was registered. Otherwise a proposer-to-be that knows
the seed could try tips until its first reveal gives a seed to its liking.
"""

from msgspec.structs import replace

from chain.blocks import MAX_VALIDATORS
from chain.ledger.book import Book, name
from chain.reasons import Reason, Refused
from chain.records import Validator
from chain.state import Table
from chain.transactions import RegisterValidator

BASIS = 10_000


def register(book: Book, sender: bytes, payload: RegisterValidator) -> None:
    """Register a validator, or the onion that follows its present one."""
    known: Validator | None = book.draft.get(Table.VALIDATORS, sender)
    if known is not None and known.is_tombstoned:
        raise Refused(Reason.TOMBSTONED)
    if known is None:
        fresh = Validator(payload.onion_tip, book.height)
        book.wake(book.height + book.params.epoch_blocks, Table.VALIDATORS, sender)
    else:
        ready = book.height + book.params.epoch_blocks
        fresh = replace(known, next_tip=payload.onion_tip, next_tip_at=ready)
    book.draft.put(Table.VALIDATORS, sender, fresh)


def unjail(book: Book, sender: bytes) -> None:
    """Become able again after jailing; power returns with the epochs."""
    known: Validator | None = book.draft.get(Table.VALIDATORS, sender)
    if known is None:
        raise Refused(Reason.NOT_A_VALIDATOR)
    if known.is_tombstoned:
        raise Refused(Reason.TOMBSTONED)
    if not known.is_jailed:
        raise Refused(Reason.NOT_JAILED)
    if book.height < known.jailed_until:
        raise Refused(Reason.STILL_JAILED)
    book.draft.put(Table.VALIDATORS, sender, replace(known, is_jailed=False, missed=()))
    book.note("unjailed", validator=name(sender))


def count_presence(book: Book, absent: frozenset[bytes]) -> None:
    """Count who did not sign the parent; jail validators that have vanished, never the last one."""
    horizon = book.height - book.params.jail_window
    for account in book.validators.powers:
        validator: Validator = book.draft.get(Table.VALIDATORS, account)
        missed = tuple(height for height in validator.missed if height > horizon)
        if account in absent:
            missed = (*missed, book.height)
        if len(missed) >= book.params.jail_missed and book.has_other_validator(account):
            until = book.height + book.params.jail_blocks
            jailed = replace(validator, missed=(), power=0, is_jailed=True, jailed_until=until)
            book.draft.put(Table.VALIDATORS, account, jailed)
            book.note("jailed", validator=name(account))
        elif missed != validator.missed:
            book.draft.put(Table.VALIDATORS, account, replace(validator, missed=missed))


def begin_epoch(book: Book) -> None:
    """Let power follow stake within the churn limit, and registered onions come into force."""
    rows: dict[bytes, Validator] = dict(book.draft.items(Table.VALIDATORS))
    powers = _moved({account: row.power for account, row in rows.items()}, _targets(book, rows), _limit(book, rows))
    for account, row in rows.items():
        is_due = row.next_tip is not None and row.next_tip_at <= book.height
        if is_due or powers.get(account, row.power) != row.power:
            changed = replace(row, power=powers.get(account, row.power))
            if is_due:
                changed = replace(changed, onion_tip=row.next_tip, onion=row.onion + 1, next_tip=None)
            book.draft.put(Table.VALIDATORS, account, changed)
        _hold(book, account, powers.get(account, row.power) - book.account(account).bonded)


def lapse(book: Book, account: bytes) -> None:
    """Forget a registration that has under half of the least stake an epoch later, and nothing to be slashed."""
    row: Validator | None = book.draft.get(Table.VALIDATORS, account)
    if row is None or row.power or not row.is_able or book.draft.items(Table.UNBONDINGS, account):
        return
    if 2 * book.account(account).bonded < book.params.min_stake:
        book.draft.delete(Table.VALIDATORS, account)


def _targets(book: Book, rows: dict[bytes, Validator]) -> dict[bytes, int]:
    """Return the power that their stake gives the strongest in the end; newcomers only as far as there is room.

    So never more than `MAX_VALIDATORS` have power, and nobody takes another's place but by its leaving.
    """
    able = [
        (stake, account)
        for account, row in rows.items()
        if row.is_able and (stake := book.account(account).bonded) >= book.params.min_stake
        and (row.power or book.height >= row.registered_at + book.params.epoch_blocks)
    ]  # fmt: skip
    room = MAX_VALIDATORS - sum(1 for row in rows.values() if row.power)
    targets = {}
    for stake, account in sorted(able, reverse=True)[:MAX_VALIDATORS]:
        if not rows[account].power:
            room -= 1
        if rows[account].power or room >= 0:
            targets[account] = stake
    return targets


def _hold(book: Book, account: bytes, behind: int) -> None:
    """Let leaving stake that is `behind` votes for another epoch be released an epoch later: it can be slashed."""
    until = book.height + book.params.epoch_blocks + book.params.unbonding_blocks
    leaving = book.draft.items(Table.UNBONDINGS, account) if behind > 0 else []
    for key, unbonding in reversed(leaving):
        if behind <= 0:
            break
        book.draft.delete(Table.UNBONDINGS, key)
        book.release(account, unbonding.amount, max(until, unbonding.release_at))
        behind -= unbonding.amount


def _limit(book: Book, rows: dict[bytes, Validator]) -> int:
    return max(sum(row.power for row in rows.values()) * book.params.churn_share // BASIS, book.params.min_stake)


def _moved(powers: dict[bytes, int], targets: dict[bytes, int], limit: int) -> dict[bytes, int]:
    """Return the powers moved toward their targets, 0 where there is none: all the way, or by equal shares.

    Nobody is moved to nothing while all others are at nothing: the set is never empty.
    """
    wishes = {a: targets.get(a, 0) - power for a, power in powers.items() if targets.get(a, 0) != power}
    wanted = sum(map(abs, wishes.values()))
    moved = {}
    spare = min(limit, wanted)
    for account, wish in wishes.items():
        step = abs(wish) * min(limit, wanted) // wanted
        spare -= step
        moved[account] = powers[account] + (step if wish > 0 else -step)
    for account in sorted(wishes):
        if spare > 0 and moved[account] != targets.get(account, 0):
            moved[account] += 1 if wishes[account] > 0 else -1
            spare -= 1
    return moved if any((powers | moved).values()) else {}
