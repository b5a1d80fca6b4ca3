"""The engine's two databases: what it loads at start, writes and reads. The caller picks the thread."""

import logging
from collections.abc import Sequence
from pathlib import Path

from msgspec import Raw

from chain.blocks import Certificate, Header, ValidatorSet, Vote
from chain.codec import Record, decode, encode
from chain.engine_blocks import Step, Tip
from chain.engine_core import Restored, SignJob
from chain.engine_join import Joined
from chain.engine_seam import Distrusted
from chain.evidence import RECENT
from chain.genesis import Genesis
from chain.keys import PrivateKey
from chain.ledger import Receipt
from chain.signing import Conflict, RecordMissing, SigningRecord
from chain.store import Store
from chain.sync import NOTHING, RANGE_BYTES, HeadersReply, pack_range
from chain.trusted_path import TrustedPath

KEPT_SIGNED_HEIGHTS = 64
"""Heights below the tip whose signing record is kept."""

_log = logging.getLogger("tdml.chain")


class _Opened(Record, frozen=True):
    """A stored block of which only the header is decoded."""

    header: Header
    transactions: Raw
    parent_certificate: Raw


class Files:
    """`chain.db` and, for a peer with a key, `signing.db` of one home folder."""

    def __init__(self, home: Path, genesis: Genesis, key: PrivateKey | None, keep: int = 0) -> None:
        self.store = Store.open(home / "chain.db", genesis)
        self.store.keep = keep
        self._chain_id = genesis.chain_id
        self._record: SigningRecord | None = None
        self._is_record_known = False
        self.refusal: str | None = None
        """Why this peer may not sign votes, in words."""
        tip = self.store.tip()
        if key is None:
            return
        try:
            self._record = SigningRecord.open(
                home / "signing.db",
                chain_id=genesis.chain_id,
                account=key.account,
                sign=key.sign,
                tip=tip[0].height if tip else 0,
            )
        except RecordMissing as error:
            self.refusal = str(error)
        except BaseException:
            self.store.close()
            raise

    @property
    def may_sign(self) -> bool:
        """Whether there is a signing record to sign with."""
        return self._record is not None

    @property
    def is_record_new(self) -> bool:
        """Whether the signing record was made just now, maybe in the place of one that was lost."""
        return self._record is not None and self._record.is_new

    @property
    def base(self) -> int:
        """The lowest height that can be served."""
        return self.store.base

    def close(self) -> None:
        """Close both files."""
        if self._record is not None:
            self._record.close()
        self.store.close()

    def tip(self) -> Tip:
        """Return the final tip; raise `StoreCorrupt`."""
        state, newest = self.store.load_state(), self.store.tip()
        if newest is None:
            return Tip(self._chain_id, state)
        block, certificate = newest
        signers = self.store.validators(block.header.validators_hash)
        return Tip(self._chain_id, state, block.header, certificate, signers)

    def recent(self) -> list[tuple[ValidatorSet, Certificate]]:
        """Return who decided the last heights and by which certificates, oldest first."""
        newest = self.store.tip()
        height = newest[0].height if newest else 0
        found: list[tuple[ValidatorSet, Certificate]] = []
        for at in range(max(1, height - RECENT + 1), height + 1):
            decided = self.decided(at)
            if decided is not None:
                found.append(decided)
        return found

    def decided(self, height: int) -> tuple[ValidatorSet, Certificate] | None:
        """Return who decided a height and by which certificate, None where that is not kept."""
        for block, certificate in self.store.raw_blocks(height, height):
            opened: _Opened = decode(_Opened, block)
            validators = self.store.validators(opened.header.validators_hash)
            if validators is not None:
                return validators, decode(Certificate, certificate)
        return None

    def check(self, path: TrustedPath | None) -> TrustedPath | None:
        """Return `path` unless the trusted block lies below what is kept here, where it vouches for nothing.

        Raises `Distrusted` when another block is in its place.
        """
        trust = path.trust if path is not None else None
        found = self.store.block(trust.height) if trust is not None else None
        if trust is None or found is None:
            return path if trust is not None and self.store.base <= trust.height else None
        if found[0].hash != trust.block_hash:
            raise Distrusted(
                f"Block {trust.height} of this peer is {found[0].hash.hex()}, not the trusted {trust.block_hash.hex()}"
            )
        return path

    def restored(self, height: int) -> Restored:
        """Return what this peer has signed at `height`."""
        if self._record is None:
            return Restored()
        return Restored(self._record.votes(height), self._record.proposals(height))

    def sign(self, jobs: Sequence[SignJob]) -> list[tuple[SignJob, Vote]]:
        """Return the jobs whose votes are durable and signed now, in one commit where nothing conflicts."""
        if self._record is None:
            return []
        try:
            return list(zip(jobs, self._record.sign_all([(j.vote, j.proposal) for j in jobs]), strict=True))
        except Conflict as error:
            if len(jobs) == 1:
                _log.warning("not signed: %s", error)
                return []
        return [signed for job in jobs for signed in self.sign([job])]

    def commit(self, steps: Sequence[Step]) -> Restored:
        """Store consecutive final blocks in one transaction; return what was signed at the next height."""
        with self.store.batch():
            for step in steps:
                self.store.commit(step.final.block, step.final.certificate, step.before.state, step.executed)
        first, last = steps[0].final.block.height, steps[-1].final.block.height
        for step in steps:
            self._compare(step.final.certificate, step.before.state.validators(), last)
        if self._record is not None and last // KEPT_SIGNED_HEIGHTS > (first - 1) // KEPT_SIGNED_HEIGHTS:
            self._record.forget(last - KEPT_SIGNED_HEIGHTS)
        return self.restored(last + 1)

    def install(self, joined: Joined) -> Restored:
        """Take a verified snapshot into an empty store; return what was signed at the next height."""
        final = joined.final
        self.store.install(final.block, final.certificate, joined.signers, joined.state)
        self._compare(final.certificate, joined.signers, final.block.height)
        return self.restored(final.block.height + 1)

    def _compare(self, certificate: Certificate, signers: ValidatorSet, last: int) -> None:
        """Sign nothing up to the height after `last` if the certificate has a vote of ours that the record has not.

        The record was lost with the home then, and whoever has lost it may have voted at that height, at most.
        """
        record, height = self._record, certificate.height
        if record is None or self._is_record_known or height <= record.floor:
            return
        if record.account not in certificate.accounts(signers):
            return
        self._is_record_known = bool(record.votes(height))
        if not self._is_record_known:
            _log.warning("this key signed at height %d before its record was lost; it waits two heights", height)
            record.forget(last + 1)

    def range(self, first: int, last: int) -> bytes:
        """Return the sync reply with these heights."""
        return pack_range(self.store.raw_blocks(first, last, RANGE_BYTES))

    def headers(self, first: int, last: int) -> bytes:
        """Return the sync reply with the headers up to `last`, fewer where their blocks are large."""
        found: list[Header] = []
        for block, _ in self.store.raw_blocks(first, last, RANGE_BYTES, newest_first=True):
            opened: _Opened = decode(_Opened, block)
            found.append(opened.header)
        if not found or found[0].height != last:
            return encode(HeadersReply(()))
        return encode(HeadersReply(tuple(reversed(found))))

    def light(self, height: int) -> bytes:
        """Return the encoded `chain.light.LightBlock` of a height, `NOTHING` if it is not here."""
        for block, certificate in self.store.raw_blocks(height, height):
            opened: _Opened = decode(_Opened, block)
            header = opened.header
            validators = self.store.validators(header.validators_hash)
            if validators is not None:
                return encode((header, Raw(certificate), validators))
        return NOTHING

    def receipt(self, tx_id: bytes) -> Receipt | None:
        """Return the receipt of a transaction in the chain."""
        found = self.store.receipt(tx_id)
        return Receipt(tx_id, found[2]) if found else None
