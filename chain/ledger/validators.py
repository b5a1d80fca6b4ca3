"""Validators: how stake becomes power, who joins with which onion, and how the set changes.

The set changes at the first block of an epoch only, and by at most `churn_share` of its power (or the
least stake, so that a small network can grow): power then moves toward stake, everybody's by the same
share of what it wants. So two sets an epoch apart differ by less than a third of their power, and
whoever verified one can verify the other (light clients, weak subjectivity). Losses for cause do not
wait: who is jailed or tombstoned is out with the next block. Leaving stake counts until the epoch ends,
and can be slashed for as long: it is unbonding.

An onion counts only from a whole epoch after it was registered. Otherwise a proposer-to-be that knows
the seed could try tips until its first reveal gives a seed to its liking.
"""

from msgspec.structs import replace

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
    rows: list[tuple[bytes, Validator]] = book.draft.items(Table.VALIDATORS)
    powers = _moved({account: (row.power, _target(book, account, row)) for account, row in rows}, _limit(book, rows))
    for account, row in rows:
        changed = replace(row, power=powers[account])
        if row.next_tip is not None and row.next_tip_at <= book.height:
            changed = replace(changed, onion_tip=row.next_tip, onion=row.onion + 1, next_tip=None)
        if changed != row:
            book.draft.put(Table.VALIDATORS, account, changed)


def _target(book: Book, account: bytes, row: Validator) -> int:
    """Return the power that a validator's stake gives it in the end."""
    bonded = book.account(account).bonded
    is_new = row.power == 0 and book.height < row.registered_at + book.params.epoch_blocks
    return bonded if row.is_able and bonded >= book.params.min_stake and not is_new else 0


def _limit(book: Book, rows: list[tuple[bytes, Validator]]) -> int:
    total = sum(row.power for _, row in rows)
    return max(total * book.params.churn_share // BASIS, book.params.min_stake)


def _moved(wishes: dict[bytes, tuple[int, int]], limit: int) -> dict[bytes, int]:
    """Return powers moved from (now) toward (wanted): all the way, or by equal shares of the limit.

    Nobody is moved to nothing while all others are at nothing: the set is never empty.
    """
    wanted = sum(abs(target - power) for power, target in wishes.values())
    powers = {}
    for account, (power, target) in wishes.items():
        step = abs(target - power) if wanted <= limit else abs(target - power) * limit // wanted
        powers[account] = power + step if target > power else power - step
    spare = limit - sum(abs(powers[account] - power) for account, (power, _) in wishes.items())
    for account, (_, target) in sorted(wishes.items()):
        if spare > 0 and powers[account] != target:
            powers[account] += 1 if target > powers[account] else -1
            spare -= 1
    return powers if any(powers.values()) else {account: power for account, (power, _) in wishes.items()}
