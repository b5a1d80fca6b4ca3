"""`db check`: the whole chain executed again from its genesis, every hash, root and certificate compared."""

from typing import Any

from chain.blocks import BlockContext, Refused, ValidatorSet, VerifiedSignatures, VoteKind, verify_certificate
from chain.ledger import InvalidBlock, execute
from chain.state import State, genesis_state
from chain.store import Store


def replay(store: Store) -> dict[str, Any]:
    """Return {"ok", "height", "problem"}: the first thing that is wrong, if any."""
    state = genesis_state(store.genesis)
    parent = store.genesis.chain_id
    signers: ValidatorSet | None = None
    check = VerifiedSignatures()
    tip = store.tip()
    last = tip[0].height if tip else 0
    for height in range(1, last + 1):
        try:
            parent, signers, state = _step(store, state, parent, signers, height, check)
        except (Refused, InvalidBlock, AssertionError) as error:
            return {"ok": False, "height": height, "problem": f"block {height}: {error}"}
    if store.load_state().root != state.root:
        return {"ok": False, "height": last, "problem": "the stored state is not what the blocks lead to"}
    return {"ok": True, "height": last, "problem": None}


def _step(
    store: Store,
    state: State,
    parent: bytes,
    signers: ValidatorSet | None,
    height: int,
    check: VerifiedSignatures,
) -> tuple[bytes, ValidatorSet, State]:
    pair = store.block(height)
    if pair is None:
        raise AssertionError("the block is missing")
    block, certificate = pair
    header = block.header
    _expect(header.height == height and header.parent == parent, "not linked to its parent")
    _expect(block.is_consistent, "the body is not the header's")
    validators = state.validators()
    said = (certificate.kind, certificate.height, certificate.block_hash)
    _expect(said == (VoteKind.FINALIZE, height, header.hash), "the certificate is of another block")
    verify_certificate(certificate, validators, check)
    _expect(all(transaction.is_signed() for transaction in block.transactions), "a transaction is not signed")
    signed = block.parent_certificate.accounts(signers) if block.parent_certificate and signers else None
    context = BlockContext(
        header.chain_id, height, header.timestamp, header.proposer, header.reveal, header.seed, signed
    )
    executed = execute(state, context, block.transactions)
    _expect(executed.state.root == header.state_root, "the state root differs")
    return header.hash, validators, executed.state


def _expect(condition: bool, problem: str) -> None:
    if not condition:
        raise AssertionError(problem)
