"""Who may be drawn to re-execute a cell, and draws by stake from such a pool."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from functools import cached_property
from itertools import accumulate

from chain.hashing import digest
from chain.ledger.book import Book, step_key
from chain.randomness import uniform
from chain.records import ClaimRecord, StepProgress
from chain.state import Table
from chain.transactions import Claim

OUTSIDERS = 3
"""Peers outside a stage and its neighbours that are enough for its audits."""


class Pool:
    """Accounts with weights, made once and drawn from often: a draw costs two binary searches."""

    def __init__(self, weights: Iterable[tuple[bytes, int]]) -> None:
        entries = sorted(entry for entry in weights if entry[1] > 0)
        self._names = [name for name, _ in entries]
        self._ends = list(accumulate(weight for _, weight in entries))

    def draw(self, seed: bytes, excluded: Iterable[bytes]) -> bytes | None:
        """Return the account that `randomness.weighted_draw` draws first when `excluded` are left out."""
        places = sorted(place for account in set(excluded) if (place := self._place(account)) is not None)
        total = (self._ends[-1] if self._ends else 0) - sum(map(self._weight, places))
        if total <= 0:
            return None
        ticket = uniform(digest("draw", seed, bytes(8)), total)
        for place in places:
            if ticket >= self._ends[place] - self._weight(place):
                ticket += self._weight(place)
        return self._names[bisect_right(self._ends, ticket)]

    def number(self, excluded: Iterable[bytes]) -> int:
        """Return how many accounts may be drawn when `excluded` are left out."""
        return len(self._names) - sum(self._place(account) is not None for account in set(excluded))

    def _place(self, account: bytes) -> int | None:
        place = bisect_left(self._names, account)
        return place if place < len(self._names) and self._names[place] == account else None

    def _weight(self, place: int) -> int:
        return self._ends[place] - (self._ends[place - 1] if place else 0)


class Pools:
    """The pools of one moment of a block, by task and stage; accounts and seats must not change meanwhile."""

    def __init__(self, book: Book) -> None:
        self.book = book
        self.cost = 0
        """Rows of workers looked through so far."""
        self._away: dict[tuple[bytes, int, tuple[int, ...]], Pool] = {}

    @cached_property
    def _validators(self) -> list[tuple[bytes, int]]:
        return self._weighed(self.book.validators.powers)

    @cached_property
    def _plain(self) -> Pool:
        return Pool(self._validators)

    def _weighed(self, accounts: Iterable[bytes]) -> list[tuple[bytes, int]]:
        return [(account, self.book.account(account).bonded) for account in accounts if is_fit(self.book, account)]

    def _pool(self, seated: dict[bytes, int], beside: set[bytes]) -> Pool:
        """Return the pool of validators and of workers with stake, without those `beside`."""
        others = self._weighed(account for account in seated if account not in self.book.validators)
        if not others and beside.isdisjoint(self.book.validators.powers):
            return self._plain
        self.cost += len(self._validators) // 4
        return Pool(entry for entry in self._validators + others if entry[0] not in beside)

    def _seated(self, task: bytes) -> dict[bytes, int]:
        workers = self.book.workers(task)
        self.cost += len(workers)
        return {worker.account: worker.stage for worker in workers if worker.is_seated}

    def _pool_away(self, claim: Claim, near: tuple[int, ...]) -> Pool:
        """Return the pool without those whose stage is one of these distances from the claim's."""
        place = claim.task, claim.stage, near
        if place not in self._away:
            seated = self._seated(claim.task)
            beside = {account for account, stage in seated.items() if abs(stage - claim.stage) in near}
            self._away[place] = self._pool(seated, beside)
        return self._away[place]

    def draw(self, record: ClaimRecord, cell: int, seed: bytes, excluded: tuple[bytes, ...]) -> bytes | None:
        """Return who re-executes a cell: not the worker, nor, if others can, who works beside it.

        Replicas of a stage may be of one owner, and hold the same state: they audit each other only where fewer than
        `OUTSIDERS` outside the stage and its neighbours can, who would have all the work, and be all that has to be
        bribed. Of a claim of one cell they would even know the weight gradient, which is its partial sum: there they
        come no sooner than the neighbours whose claims do not cover the cell.
        """
        claim = record.claim
        left_out = (*excluded, record.worker)
        pool = self._pool_away(claim, (0, 1))
        if len(claim.cells) != 1 and pool.number(left_out) < OUTSIDERS:
            pool = self._pool_away(claim, (1,))
        if (drawn := pool.draw(seed, left_out)) is not None:
            return drawn
        touching = _touching(self.book, claim, cell)
        return self._pool(self._seated(claim.task), set()).draw(seed, (*left_out, *touching))

    def draw_absent(self, record: ClaimRecord, cell: int, seed: bytes) -> bytes | None:
        """Return who re-executes a cell of those who lately missed a duty, for when nobody else is left."""
        seated = self._seated(record.claim.task)
        left_out = {record.worker, *_touching(self.book, record.claim, cell)}
        able = {*self.book.validators.powers, *seated} - left_out
        self.cost += len(able)
        accounts = ((account, self.book.account(account)) for account in able)
        return Pool((account, found.bonded) for account, found in accounts if not found.barred).draw(seed, ())


def is_fit(book: Book, account: bytes) -> bool:
    """Whether an account may be drawn: neither barred nor absent, and with stake."""
    record = book.account(account)
    return not record.barred and record.absent_until <= book.height and record.bonded > 0


def _touching(book: Book, claim: Claim, cell: int) -> set[bytes]:
    """Return the workers whose claims cover the cell in an adjacent stage."""
    progress: StepProgress | None = book.draft.get(Table.STEPS, step_key(claim.task, claim.generation, claim.step))
    found = set()
    for identity in progress.claims if progress else ():
        other: ClaimRecord = book.claim(identity)
        if abs(other.claim.stage - claim.stage) == 1 and cell in other.claim.cells:
            found.add(other.worker)
    return found
