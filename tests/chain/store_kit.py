"""A ledger's life written to a database as real blocks with real certificates."""

from collections.abc import Iterator
from pathlib import Path

from chain.blocks import Block, Certificate, Vote, VoteKind, certify, vote_bytes
from chain.engine_blocks import Draft, Tip, assemble
from chain.ledger import Executed
from chain.state import State, genesis_state
from chain.store import Store
from tests.chain.ledger_kit import Ledger, by_account


def certificate_of(block: Block, before: State) -> Certificate:
    """Return the finalization of a block by all validators."""
    validators = before.validators()
    said = (VoteKind.FINALIZE, block.header.chain_id, block.height, 1, block.hash)
    message = vote_bytes(*said)
    votes = [Vote(*said, account, by_account(account).sign(message)) for account in validators.powers]
    return certify(votes, validators)


def final_blocks(ledger: Ledger) -> Iterator[tuple[Block, Certificate, State, Executed]]:
    """Yield the blocks of a ledger's life with their certificates, the states before, and what they do."""
    tip = Tip(ledger.genesis.chain_id, genesis_state(ledger.genesis))
    for context, transactions, _, _ in ledger.blocks:
        before = tip.state
        draft = Draft(context.proposer, 1, context.timestamp, context.reveal)
        block, executed = assemble(tip, draft, transactions)
        certificate = certificate_of(block, before)
        yield block, certificate, before, executed
        tip = Tip(tip.chain_id, executed.state, block.header, certificate, before.validators())


def write(ledger: Ledger, path: Path) -> Store:
    """Return an open store that holds the blocks of a ledger."""
    store = Store.open(path, ledger.genesis)
    for block, certificate, before, executed in final_blocks(ledger):
        store.commit(block, certificate, before, executed)
    return store
