"""Making and checking one block on top of the final state, without I/O."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from msgspec import structs

from chain.blocks import (
    MAX_CLOCK_DRIFT_MS,
    Block,
    BlockContext,
    Certificate,
    Header,
    Reason,
    Refused,
    ValidatorSet,
    Verifier,
    VoteKind,
    transactions_root,
    verify_certificate,
)
from chain.engine_seam import ChainBroken
from chain.hashing import ZERO
from chain.ledger import Executed, InvalidBlock, execute
from chain.randomness import next_seed
from chain.state import PREFIX, State, Table
from chain.sync import FinalBlock, check_final
from chain.transactions import Transaction
from chain.trusted_path import TrustedPath

LARGE_BLOCK = 32
"""Transactions from which a block is checked and executed in a thread."""


@dataclass(frozen=True)
class Tip:
    """The final chain that the next block stands on; header and certificate are None at genesis."""

    chain_id: bytes
    state: State
    header: Header | None = None
    certificate: Certificate | None = None
    signers: ValidatorSet | None = None
    """The set that `certificate` is a bitmap over."""

    @property
    def height(self) -> int:
        """The latest final height, 0 at genesis."""
        return self.header.height if self.header else 0

    @property
    def hash(self) -> bytes:
        """The parent hash of the next block."""
        return self.header.hash if self.header else self.chain_id

    @property
    def timestamp(self) -> int:
        """The least timestamp of the next block, minus one."""
        return self.header.timestamp if self.header else self.state.chain.timestamp


@dataclass(frozen=True)
class Step:
    """A final block, the tip below it and what it does."""

    final: FinalBlock
    before: Tip
    executed: Executed

    @property
    def after(self) -> Tip:
        """The tip that it makes."""
        before, block = self.before, self.final.block
        signers = before.state.validators()
        return Tip(before.chain_id, self.executed.state, block.header, self.final.certificate, signers)


@dataclass(frozen=True)
class Draft:
    """What a proposer decides about its block."""

    proposer: bytes
    view: int
    timestamp: int
    reveal: bytes


def is_heavy(state: State, transactions: Sequence[Transaction]) -> bool:
    """Whether a block after `state` may take long to execute: its transactions are many, or hooks have work."""
    due = state.tables[Table.WAKE].groups.get((state.height + 1).to_bytes(PREFIX, "big"))
    return len(transactions) >= LARGE_BLOCK or bool(due) or state.is_busy()


def assemble(tip: Tip, draft: Draft, transactions: Sequence[Transaction]) -> tuple[Block, Executed]:
    """Return the block of these transactions and what it does; raises what `execute` raises."""
    context = _context(tip, draft, tip.certificate)
    executed = execute(tip.state, context, tuple(transactions))
    header = Header(
        chain_id=tip.chain_id,
        height=context.height,
        parent=tip.hash,
        proposer=draft.proposer,
        view=draft.view,
        timestamp=draft.timestamp,
        transactions_root=transactions_root(transactions),
        certificate_hash=tip.certificate.hash if tip.certificate else ZERO,
        state_root=executed.state.root,
        validators_hash=tip.state.validators().hash,
        next_validators_hash=executed.state.validators().hash,
        reveal=draft.reveal,
        seed=context.seed,
        leader_seed=tip.state.leader_seed,
    )
    return Block(header, tuple(transactions), tip.certificate), executed


def check_proposal(tip: Tip, block: Block, unchecked: Sequence[Transaction], now_ms: int, verify: Verifier) -> Executed:
    """Return what a proposed block does, after checking the signatures of `unchecked`; see `check`."""
    for transaction in unchecked:
        if not transaction.is_signed():
            raise Refused(Reason.BAD_SIGNATURE, transaction.tx_id.hex())
    return check(tip, block, now_ms, verify)


def check(tip: Tip, block: Block, now_ms: int | None, verify: Verifier) -> Executed:
    """Return what a proposed (or, without `now_ms`, a final) block does.

    Raises `Refused` for a header that says anything else than the rules and the execution do, and
    what `execute` raises. The transactions' signatures must have been checked before.
    """
    header, certificate = block.header, block.parent_certificate
    _check_limits(tip, block, now_ms)
    if certificate is not None:
        _check_parent(tip, certificate, verify)
    draft = Draft(header.proposer, header.view, header.timestamp, header.reveal)
    executed = execute(tip.state, _context(tip, draft, certificate), block.transactions)
    expected = structs.replace(
        header,
        chain_id=tip.chain_id,
        height=tip.height + 1,
        parent=tip.hash,
        state_root=executed.state.root,
        validators_hash=tip.state.validators().hash,
        next_validators_hash=executed.state.validators().hash,
        seed=next_seed(tip.state.seed, header.reveal),
        leader_seed=tip.state.leader_seed,
    )
    if header != expected:
        raise Refused(Reason.WRONG_BLOCK, "the header differs from the execution")
    return executed


def follow(
    tip: Tip,
    finals: Sequence[FinalBlock],
    known: Mapping[bytes, Executed],
    verify: Verifier,
    path: TrustedPath | None = None,
) -> tuple[list[Step], Refused | None]:
    """Return what the final blocks beyond `tip` do, up to the first that does not follow, and why it does not.

    `known` are blocks executed before, by hash; `path` must allow each. Raises `ChainBroken`
    for a final block that does not execute to what its validators signed.
    """
    steps: list[Step] = []
    for final in finals:
        block = final.block
        if block.height <= tip.height:
            continue
        try:
            if path is not None and not path.allows(block.height, block.hash):
                raise Refused(Reason.WRONG_BLOCK, f"not on the way to the trusted block {path.trust}")
            check_final(final, tip.header, tip.state.validators(), verify)
            if block.header.chain_id != tip.chain_id:
                raise Refused(Reason.WRONG_CHAIN)
        except Refused as refusal:
            return steps, refusal
        executed = known.get(block.hash)
        if executed is None:
            try:
                executed = check(tip, block, None, verify)
            except (Refused, InvalidBlock, AssertionError) as error:
                raise ChainBroken(f"final block {block.height} does not execute here: {error}") from error
        steps.append(Step(final, tip, executed))
        tip = steps[-1].after
    return steps, None


def _check_limits(tip: Tip, block: Block, now_ms: int | None) -> None:
    params, timestamp = tip.state.params, block.header.timestamp
    if not block.is_consistent or timestamp <= tip.timestamp:
        raise Refused(Reason.WRONG_BLOCK, "inconsistent body or timestamp not after the parent's")
    if now_ms is not None and timestamp > now_ms + MAX_CLOCK_DRIFT_MS:
        raise Refused(Reason.WRONG_BLOCK, "timestamp ahead of the clock")
    if len(block.transactions) > params.max_block_transactions:
        raise Refused(Reason.WRONG_BLOCK, "too many transactions")
    if sum(len(transaction.encoded) for transaction in block.transactions) > params.max_block_bytes:
        raise Refused(Reason.WRONG_BLOCK, "too many bytes of transactions")


def _check_parent(tip: Tip, certificate: Certificate, verify: Verifier) -> None:
    if tip.header is None or tip.signers is None:
        raise Refused(Reason.WRONG_BLOCK, "a certificate of the genesis")
    said = (certificate.kind, certificate.chain_id, certificate.height, certificate.block_hash)
    if said != (VoteKind.FINALIZE, tip.chain_id, tip.height, tip.hash):
        raise Refused(Reason.WRONG_BLOCK, "not the parent's finalization")
    if certificate != tip.certificate:
        verify_certificate(certificate, tip.signers, verify)


def _context(tip: Tip, draft: Draft, certificate: Certificate | None) -> BlockContext:
    validators = tip.signers.powers if certificate and tip.signers else {}
    signed = frozenset(certificate.accounts(tip.signers)) if certificate and tip.signers else frozenset()
    return BlockContext(
        tip.chain_id,
        tip.height + 1,
        draft.timestamp,
        draft.proposer,
        draft.reveal,
        next_seed(tip.state.seed, draft.reveal),
        tuple(account for account in validators if account not in signed),
    )
