"""Parameters changed by stake: one standing vote a validator, counted as each epoch begins.

A vote names all parameters. It takes effect at the first block of an epoch once more than two thirds of
the active power stand behind the very same ones, unless their least stake would leave the set without a
quorum of those that have it; the next block runs on them. Every change ends all votes,
which were about the parameters that went before. Only the power of the set that decided the epoch counts:
whoever has left the set, for any reason, has no say. What is stored as a height (releases, deadlines,
leases, draws waiting) stays as it was promised.
"""

from collections import Counter

from msgspec.structs import replace

from chain.bounds import changes, vote_problem
from chain.ledger.book import Book, name
from chain.params import Params
from chain.reasons import Reason, Refused
from chain.records import Validator
from chain.state import Table
from chain.transactions import VoteParams


def vote(book: Book, sender: bytes, payload: VoteParams) -> None:
    """Set the sender's standing vote, or end it with a vote for the parameters in force."""
    known: Validator | None = book.draft.get(Table.VALIDATORS, sender)
    if known is None or sender not in book.validators or not known.power:
        raise Refused(Reason.NOT_A_VALIDATOR)
    wish = None if payload.params == book.params else payload.params
    if wish is not None and vote_problem(book.params, wish) is not None:
        raise Refused(Reason.BAD_PARAMS)
    book.draft.put(Table.VALIDATORS, sender, replace(known, wish=wish))
    book.note("params-vote", validator=name(sender), changes=changes(book.params, payload.params))


def enact(book: Book) -> None:
    """Put the parameters in force that more than two thirds of the active power stand behind."""
    rows: list[tuple[bytes, Validator]] = book.draft.items(Table.VALIDATORS)
    members = [row for account, row in rows if account in book.validators]
    behind: Counter[Params] = Counter()
    for row in members:
        if row.wish is not None:
            behind[row.wish] += row.power
    total = sum(row.power for row in members)
    chosen = next((params for params, power in behind.items() if 3 * power > 2 * total), None)
    if chosen is not None and 3 * _power_above(book, rows, chosen.min_stake) <= 2 * total:
        chosen = None  # the set would lose its quorum at once
    for account, row in rows:
        if row.wish is not None and (chosen is not None or not row.power):
            book.draft.put(Table.VALIDATORS, account, replace(row, wish=None))
    if chosen is not None:
        book.draft.put(Table.PARAMS, b"", chosen)
        book.note("params-changed", changes=changes(book.params, chosen))


def _power_above(book: Book, rows: list[tuple[bytes, Validator]], stake: int) -> int:
    """Return the active power of members that have bonded at least `stake`."""
    return sum(
        row.power for account, row in rows if account in book.validators and book.account(account).bonded >= stake
    )
