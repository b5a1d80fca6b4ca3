"""Range sync: the messages of `/tdml/sync/1` and the pure checks of a final block."""

from itertools import pairwise
from typing import Annotated

from msgspec import Meta, Raw

from chain.blocks import (
    Block,
    Certificate,
    Header,
    Reason,
    Refused,
    ValidatorSet,
    Verifier,
    VoteKind,
    verify_certificate,
)
from chain.codec import MAX_OBJECT_BYTES, Hash, Record, Uint, decode, encode
from chain.snapshots import MAX_DEPTH

MAX_REQUEST_BYTES = 256
MAX_RANGE = 256
MAX_HEADERS = 1024
NOTHING = encode(())
"""The answer to a request for a light block or a chunk that is not here."""
RANGE_BYTES = 3 * 1024 * 1024
"""Block bytes in one reply; at least one block is always sent."""


class StatusRequest(Record, frozen=True, tag=1):
    """Ask for the latest final height; tells the sender's own."""

    chain_id: Hash
    height: Uint


class RangeRequest(Record, frozen=True, tag=2):
    """Ask for final blocks from height `first` on."""

    chain_id: Hash
    first: Annotated[int, Meta(ge=1, le=2**63 - 1)]
    count: Annotated[int, Meta(ge=1, le=MAX_RANGE)]


class LightRequest(Record, frozen=True, tag=3):
    """Ask for the header of a height, its finalization and its validators (`chain.light.LightBlock`)."""

    chain_id: Hash
    height: Annotated[int, Meta(ge=1, le=2**63 - 1)]


class SnapshotRequest(Record, frozen=True, tag=4):
    """Ask which snapshot is served."""

    chain_id: Hash


class ChunkRequest(Record, frozen=True, tag=5):
    """Ask for one chunk of the snapshot of a height (`chain.snapshots.Chunk`)."""

    chain_id: Hash
    height: Annotated[int, Meta(ge=1, le=2**63 - 1)]
    depth: Annotated[int, Meta(ge=0, le=MAX_DEPTH)]
    index: Annotated[int, Meta(ge=0, lt=2**MAX_DEPTH)]


class HeadersRequest(Record, frozen=True, tag=6):
    """Ask for the headers of the `count` heights that end with `last`."""

    chain_id: Hash
    last: Annotated[int, Meta(ge=1, le=2**63 - 1)]
    count: Annotated[int, Meta(ge=1, le=MAX_HEADERS)]


SyncRequest = StatusRequest | RangeRequest | LightRequest | SnapshotRequest | ChunkRequest | HeadersRequest


class SnapshotInfo(Record, frozen=True):
    """The height of the newest snapshot (0 for none), in 2^depth chunks."""

    height: Uint
    depth: Annotated[int, Meta(ge=0, le=MAX_DEPTH)]


class StatusReply(Record, frozen=True):
    """The latest final height, its block hash (the chain id at height 0) and the lowest height served."""

    height: Uint
    block_hash: Hash
    base: Uint


class FinalBlock(Record, frozen=True):
    """A block and the certificate that finalizes it."""

    block: Block
    certificate: Certificate


class RangeReply(Record, frozen=True):
    """Consecutive final blocks, possibly fewer than asked for."""

    blocks: Annotated[tuple[FinalBlock, ...], Meta(max_length=MAX_RANGE)]


class HeadersReply(Record, frozen=True):
    """Consecutive headers in ascending order up to the last one asked for, possibly fewer than asked for."""

    headers: Annotated[tuple[Header, ...], Meta(max_length=MAX_HEADERS)]


def decode_request(data: bytes, chain_id: bytes) -> SyncRequest:
    """Return the request in `data`; raise `DecodeError`, or `Refused` for another network."""
    request: SyncRequest = decode(SyncRequest, data, MAX_REQUEST_BYTES)
    if request.chain_id != chain_id:
        raise Refused(Reason.WRONG_CHAIN)
    return request


def decode_status(data: bytes) -> StatusReply:
    """Return the status in `data`; raise `DecodeError`."""
    return decode(StatusReply, data, MAX_REQUEST_BYTES)


def decode_info(data: bytes) -> SnapshotInfo:
    """Return the snapshot's place in `data`; raise `DecodeError`."""
    return decode(SnapshotInfo, data, MAX_REQUEST_BYTES)


def decode_range(data: bytes) -> tuple[FinalBlock, ...]:
    """Return the blocks of a range reply; raise `DecodeError`."""
    reply: RangeReply = decode(RangeReply, data, MAX_OBJECT_BYTES)
    return reply.blocks


def decode_headers(data: bytes, request: HeadersRequest) -> tuple[Header, ...]:
    """Return the headers of a reply; raise `DecodeError`, or `Refused` for none or too many."""
    reply: HeadersReply = decode(HeadersReply, data, MAX_OBJECT_BYTES)
    if not reply.headers:
        raise Refused(Reason.EMPTY_ANSWER, f"no header {request.last}")
    if len(reply.headers) > request.count:
        raise Refused(Reason.TOO_MANY_BLOCKS, f"{len(reply.headers)} for {request.count}")
    return reply.headers


def check_range(finals: tuple[FinalBlock, ...], first: int, count: int) -> None:
    """Raise `Refused` unless `finals` are leading blocks of the range asked for, each linked to the one before."""
    if not finals:
        raise Refused(Reason.EMPTY_ANSWER, f"no block {first}")
    if len(finals) > count:
        raise Refused(Reason.TOO_MANY_BLOCKS, f"{len(finals)} for {count}")
    if finals[0].block.height != first:
        raise Refused(Reason.WRONG_HEIGHT, f"{finals[0].block.height} for {first}")
    for parent, final in pairwise(finals):
        _check_parent(final.block.header, parent.block.header)


def pack_range(encoded: list[tuple[bytes, bytes]]) -> bytes:
    """Return the reply with as many of the leading (block, certificate) encodings as its size allows."""
    size, fitting = 0, 0
    for block, certificate in encoded[:MAX_RANGE]:
        size += len(block) + len(certificate) + 8
        if fitting and size > RANGE_BYTES:
            break
        fitting += 1
    return encode((tuple((Raw(block), Raw(certificate)) for block, certificate in encoded[:fitting]),))


def check_final(final: FinalBlock, parent: Header | None, validators: ValidatorSet, check: Verifier) -> None:
    """Raise `Refused` unless `final` is the finalized child of `parent` under `validators`.

    What the block does to the state is checked by executing it.
    """
    header, certificate = final.block.header, final.certificate
    if parent is not None:
        _check_parent(header, parent)
    elif (header.height, header.parent) != (1, header.chain_id):
        raise Refused(Reason.WRONG_HEIGHT, "the first block does not follow the genesis")
    if certificate.kind != VoteKind.FINALIZE:
        raise Refused(Reason.WRONG_KIND)
    said = (certificate.chain_id, certificate.height, certificate.block_hash)
    if said != (header.chain_id, header.height, header.hash) or not final.block.is_consistent:
        raise Refused(Reason.WRONG_BLOCK)
    if header.validators_hash != validators.hash:
        raise Refused(Reason.WRONG_BLOCK, "another validator set")
    verify_certificate(certificate, validators, check)


def _check_parent(header: Header, parent: Header) -> None:
    expected = (parent.chain_id, parent.height + 1, parent.hash)
    if (header.chain_id, header.height, header.parent) != expected:
        raise Refused(Reason.WRONG_HEIGHT, "the block does not follow its parent")
