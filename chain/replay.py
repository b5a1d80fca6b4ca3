"""`db check`: the whole chain executed again from its genesis, every hash, root and certificate compared."""

from typing import Any

from chain.blocks import (
    Block,
    Certificate,
    Header,
    Refused,
    ValidatorSet,
    VerifiedSignatures,
    Verifier,
    VoteKind,
    verify_certificate,
)
from chain.engine_blocks import Tip, check
from chain.ledger import Executed, InvalidBlock
from chain.state import State, genesis_state, holdings
from chain.store import Store, StoreCorrupt


class _Problem(Exception):
    """What is wrong with a stored block, in words."""


def replay(store: Store) -> dict[str, Any]:
    """Return {"ok", "from", "height", "problem"}: the first thing that is wrong, if any.

    A store that begins above height 1 (pruned, or joined by a snapshot) has no genesis to begin with: from its
    first block on links, validators and certificates are checked, and what follows the oldest state that the
    undo journal leads back to is executed again.
    """
    with store.snapshot():
        base = store.base
        found = _replay(store) if base == 1 else _follow(store, base)
    return {"from": base} | found


def _follow(store: Store, base: int) -> dict[str, Any]:
    signatures, parent, height = VerifiedSignatures(), None, base
    newest = store.load_state()
    try:
        for height in range(base, newest.height + 1):
            parent = _linked(store, height, parent, signatures)
    except (Refused, _Problem) as error:
        return {"ok": False, "height": height, "problem": f"block {height}: {error}"}
    try:
        oldest = _oldest(store, newest)
    except StoreCorrupt as error:
        return {"ok": False, "height": newest.height, "problem": str(error)}
    return _execute(store, oldest, signatures)


def _oldest(store: Store, newest: State) -> Tip:
    """Return the oldest tip whose state can be rebuilt; raise `StoreCorrupt`."""
    height = store.oldest_state(newest)
    pair = store.block(height)
    assert pair is not None
    block, certificate = pair
    state, signers = store.state_at(height, newest), store.validators(block.header.validators_hash)
    return Tip(store.genesis.chain_id, state, block.header, certificate, signers)


def _linked(store: Store, height: int, parent: Header | None, signatures: Verifier) -> Header:
    """Check a block against its parent's header as a follower without the state can; return its header."""
    pair = store.block(height)
    if pair is None:
        raise _Problem("it is missing")
    block, certificate = pair
    header = block.header
    validators = store.validators(header.validators_hash)
    if validators is None:
        raise _Problem("its validators are missing")
    _expect(validators.hash == header.validators_hash, "its validators are not those of the header")
    _expect((header.chain_id, header.height) == (store.genesis.chain_id, height), "it belongs elsewhere")
    _expect(parent is None or header.parent == parent.hash, "it does not follow the block before")
    following = parent is None or header.validators_hash == parent.next_validators_hash
    _expect(following, "its validators are not those that the block before names")
    _expect(block.is_consistent, "its body is not the header's")
    _check_certificate(validators, block, certificate, signatures)
    return header


def _replay(store: Store) -> dict[str, Any]:
    return _execute(store, Tip(store.genesis.chain_id, genesis_state(store.genesis)), VerifiedSignatures())


def _execute(store: Store, tip: Tip, signatures: VerifiedSignatures) -> dict[str, Any]:
    newest = store.tip()
    last = newest[0].height if newest else 0
    for height in range(tip.height + 1, last + 1):
        try:
            tip = _next(store, tip, signatures)
        except (Refused, InvalidBlock, _Problem, AssertionError) as error:
            return {"ok": False, "height": height, "problem": f"block {height}: {error}"}
    if store.load_state().root != tip.state.root:
        return {"ok": False, "height": last, "problem": "the stored state is not what the blocks lead to"}
    return {"ok": True, "height": last, "problem": None}


def _next(store: Store, tip: Tip, signatures: VerifiedSignatures) -> Tip:
    pair = store.block(tip.height + 1)
    if pair is None:
        raise _Problem("it is missing")
    block, certificate = pair
    _expect(all(transaction.is_signed() for transaction in block.transactions), "a transaction is not signed")
    executed = check(tip, block, None, signatures)
    _check_certificate(tip.state.validators(), block, certificate, signatures)
    _check_records(store, block, executed)
    return Tip(tip.chain_id, executed.state, block.header, certificate, tip.state.validators())


def _check_certificate(validators: ValidatorSet, block: Block, certificate: Certificate, signatures: Verifier) -> None:
    said = (certificate.kind, certificate.chain_id, certificate.height, certificate.block_hash)
    expected = (VoteKind.FINALIZE, block.header.chain_id, block.height, block.hash)
    _expect(said == expected, "the certificate is not its finalization")
    verify_certificate(certificate, validators, signatures)


def _check_records(store: Store, block: Block, executed: Executed) -> None:
    """Compare what is stored beside the block with what the execution gave."""
    _expect(store.receipts(block.height) == executed.receipts, "the stored receipts differ")
    stored = tuple(event for _, event in store.events(block.height, block.height))
    _expect(stored == executed.events, "the stored events differ")
    held = sum(holdings(executed.state).values())
    _expect(held == executed.state.chain.issued, f"{held} base units of {executed.state.chain.issued} are held")


def _expect(condition: bool, problem: str) -> None:
    if not condition:
        raise _Problem(problem)
