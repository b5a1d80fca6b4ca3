"""A ledger's life written to a database as real blocks with real certificates."""

from pathlib import Path

from chain.blocks import Block, Certificate, Vote, VoteKind, certify, vote_bytes
from chain.engine_blocks import Draft, Tip, assemble
from chain.state import State
from chain.store import Store
from tests.chain.ledger_kit import Ledger, by_account


def certificate_of(block: Block, before: State) -> Certificate:
    """Return the finalization of a block by all validators."""
    validators = before.validators()
    said = (VoteKind.FINALIZE, block.header.chain_id, block.height, 1, block.hash)
    message = vote_bytes(*said)
    votes = [Vote(*said, account, by_account(account).sign(message)) for account in validators.powers]
    return certify(votes, validators)


def write(ledger: Ledger, path: Path) -> Store:
    """Return an open store that holds the blocks of a ledger."""
    store = Store.open(path, ledger.genesis)
    tip = Tip(ledger.genesis.chain_id, ledger.state)
    for context, transactions, before, _ in ledger.blocks:
        tip = Tip(tip.chain_id, before, tip.header, tip.certificate, tip.signers)
        draft = Draft(context.proposer, 1, context.timestamp, context.reveal)
        block, executed = assemble(tip, draft, transactions)
        certificate = certificate_of(block, before)
        store.commit(block, certificate, before, executed)
        tip = Tip(tip.chain_id, executed.state, block.header, certificate, before.validators())
    return store
