"""An executed block as the oracles of the ledger see it: records before and after, and what was applied."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from chain.blocks import BlockContext
from chain.ledger import Executed
from chain.state import State, Table
from chain.transactions import Transaction

T = Table
LIVE = {"drawn", "committed", "opened", "opinion", "voting"}
KEPT = {"convicted", "withheld", "faulted", "refuted"}


@dataclass(frozen=True)
class Block:
    """One executed block."""

    before: State
    context: BlockContext
    transactions: tuple[Transaction, ...]
    executed: Executed

    @property
    def after(self) -> State:
        """The state that it made."""
        return self.executed.state

    @property
    def height(self) -> int:
        """Its height."""
        return self.context.height

    def applied(self) -> list[tuple[bytes, Any]]:
        """Return (sender, payload) of what was not refused."""
        pairs = zip(self.transactions, self.executed.receipts, strict=True)
        return [(t.body.sender, t.body.payload) for t, receipt in pairs if not receipt.reason]


def rows(state: State, table: Table) -> Mapping[bytes, Any]:
    """Return the records of a table by key."""
    return state.tables[table]


def claims_of(state: State) -> Iterable[Any]:
    """Return the claims that still await pay: not settled, and of their task's present generation."""
    now = {key: task.generation for key, task in rows(state, T.TASKS).items()}
    claims = rows(state, T.CLAIMS).values()
    return (c for c in claims if not c.is_settled and not c.is_void and c.claim.generation == now[c.claim.task])


def owner(state: State, account: bytes) -> bytes:
    """Return the account that has what was another's before its key was rotated."""
    lines = rows(state, T.ROTATIONS)
    return lines[lines[account].first].last if account in lines else account


def ended(block: Block) -> list[Any]:
    """Return the audits that ended in the block, as they are now."""
    before = rows(block.before, T.AUDITS)
    found = [a for key, a in rows(block.after, T.AUDITS).items() if key in before and before[key].state in LIVE]
    return [audit for audit in found if audit.state not in LIVE]
