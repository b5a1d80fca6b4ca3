"""Proofs that outlive the peer that gave them: one record of the state, or its absence, under a final header.

A proof file is JSON for people around one canonical encoding, and says nothing that this encoding does
not: it is read by making it again. Verifying needs a trusted height and hash, and nothing else.
"""

import json
from dataclasses import dataclass
from typing import Annotated, Any

from blake3 import blake3
from msgspec import Meta

from chain.blocks import Reason, Refused
from chain.codec import DecodeError, Hash, Record, decode, encode
from chain.keys import account_of, peer_id, verify
from chain.light import Anchor, LightBlock, LightClient, Trust
from chain.state import State, Table, decode_record, state_key
from chain.tree import MAX_PROOF_SIBLINGS, TreeProof, verify_proof
from chain.views import plain

MAX_PATH = 64
"""Light blocks from the trusted one. One skip is enough while a third of the validators stay."""
MAX_PROOF_BYTES = 2 * 1024 * 1024
MAX_FILE_BYTES = 4 * MAX_PROOF_BYTES
_TABLES = {
    "account": Table.ACCOUNTS,
    "validator": Table.VALIDATORS,
    "task": Table.TASKS,
    "worker": Table.WORKERS,
    "claim": Table.CLAIMS,
    "audit": Table.AUDITS,
    "evidence": Table.CONVICTIONS,
    "params": Table.PARAMS,
    "chain": Table.CHAIN,
}
KINDS = tuple(_TABLES)
_BY_ACCOUNT, _SINGLE = ("account", "validator"), ("params", "chain")


class Proof(Record, frozen=True):
    """A record at a key of a table, or that there is none, under the state root of `block`."""

    table: Annotated[int, Meta(ge=0, le=len(Table) - 1)]
    key: Annotated[bytes, Meta(max_length=256)]
    value: bytes | None
    """The encoded record; None says that there is none."""
    siblings: Annotated[tuple[Hash, ...], Meta(max_length=MAX_PROOF_SIBLINGS)]
    leaf: tuple[Hash, Hash] | None
    """Of an absence: the other leaf (tree key, value hash) that stands where the record would."""
    block: LightBlock
    path: Annotated[tuple[LightBlock, ...], Meta(max_length=MAX_PATH)]
    """From the trusted block, this one first, by steps that a light client takes; empty: `block` is trusted."""


@dataclass(frozen=True)
class Proven:
    """What a verified proof shows; `record` is None for an absence."""

    kind: str
    key: str
    height: int
    record: Record | None


def key_of(kind: str, text: str) -> bytes:
    """Return the key of a table that `text` names; raise `ValueError` with a sentence."""
    if kind in _SINGLE:
        if text:
            raise ValueError(f"there is one {kind} record only; it has no key")
        return b""
    if kind in _BY_ACCOUNT:
        return account_of(text)
    if kind == "worker":
        task, _, peer = text.partition(":")
        return _digest_of(task, "a worker is named TASK:PEER") + account_of(peer)
    return _digest_of(text, f"the id of a {kind} is 64 hexadecimal digits")


def _digest_of(text: str, what: str) -> bytes:
    try:
        found = bytes.fromhex(text)
    except ValueError:
        found = b""
    if len(found) != 32 or found.hex() != text:
        raise ValueError(f"{text[:80]!r} is none: {what}")
    return found


def _name_of(kind: str, key: bytes) -> str:
    if len(key) != (0 if kind in _SINGLE else 64 if kind == "worker" else 32):
        raise ValueError(f"a key of {len(key)} bytes names no {kind}")
    if kind in _BY_ACCOUNT:
        return peer_id(key)
    return f"{key[:32].hex()}:{peer_id(key[32:])}" if kind == "worker" else key.hex()


def prove(state: State, kind: str, key: bytes, path: tuple[LightBlock, ...]) -> Proof:
    """Return the proof of what `state` holds at `key`; the last block of `path` is the one that `state` follows."""
    table = _TABLES[kind]
    record = state.tables[table].get(key)
    found = state.prove(table, key)
    leaf = None if record is not None else found.leaf
    value = None if record is None else encode(record)
    return Proof(int(table), key, value, found.siblings, leaf, path[-1], path[:-1])


def check(proof: Proof, start: Trust | Anchor, now_ms: int, period_ms: int) -> Proven:
    """Return what `proof` shows to whoever trusts a block or the genesis; raise `Refused`.

    The light blocks must lead from the trusted one to the proof's, within the trusting period.
    """
    kind = next((kind for kind, table in _TABLES.items() if table == proof.table), None)
    if kind is None:
        raise Refused(Reason.MALFORMED, f"table {proof.table} is not proven to anybody")
    if proof.value is not None and proof.leaf is not None:
        raise Refused(Reason.MALFORMED, "both a record and the leaf of an absence")
    anchor, trust = (start, None) if isinstance(start, Anchor) else (None, start)
    client = LightClient(proof.block.header.chain_id, anchor, trust, period_ms, verify)
    for block in (*proof.path, proof.block):
        client.update(block, now_ms)
    try:
        name = _name_of(kind, proof.key)
    except ValueError as error:
        raise Refused(Reason.MALFORMED, str(error)) from None
    header, place = proof.block.header, state_key(Table(proof.table), proof.key)
    hashed = None if proof.value is None else blake3(proof.value).digest()
    leaf = proof.leaf if hashed is None else (place, hashed)
    if not verify_proof(header.state_root, place, hashed, TreeProof(proof.siblings, leaf)):
        raise Refused(Reason.WRONG_PROOF, "it does not lead to the header's state root")
    try:
        record = None if proof.value is None else decode_record(Table(proof.table), proof.value)
    except DecodeError as error:
        raise Refused(Reason.MALFORMED, str(error)) from None
    return Proven(kind, name, header.height, record)


def to_document(proof: Proof) -> dict[str, Any]:
    """Return the JSON object of a proof file."""
    kind = next(kind for kind, table in _TABLES.items() if table == proof.table)
    record = None if proof.value is None else plain(decode_record(Table(proof.table), proof.value))
    header = proof.block.header
    return {
        "schema_version": 1,
        "kind": kind,
        "key": _name_of(kind, proof.key),
        "present": record is not None,
        "record": record,
        "chain_id": header.chain_id.hex(),
        "height": header.height,
        "block_hash": header.hash.hex(),
        "state_root": header.state_root.hex(),
        "trusted_height": (*proof.path, proof.block)[0].header.height,
        "proof": encode(proof).hex(),
    }


def from_text(text: str) -> Proof:
    """Return the proof in a file's text; raise `DecodeError` for anything but what `to_document` writes."""
    if len(text) > MAX_FILE_BYTES:
        raise DecodeError(f"a proof file has at most {MAX_FILE_BYTES} characters")
    try:
        document = json.loads(text, object_pairs_hook=_unique, parse_float=_no_float, parse_constant=_no_float)
        data = bytes.fromhex(document["proof"])
        proof: Proof = decode(Proof, data, MAX_PROOF_BYTES)
        made = to_document(proof)
    except DecodeError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, StopIteration) as error:
        raise DecodeError(f"not a proof file: {error}") from None
    if json.dumps(document, sort_keys=True) != json.dumps(made, sort_keys=True):
        raise DecodeError("the file says something else than the proof in it")
    return proof


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise DecodeError("a name appears twice")
    return found


def _no_float(text: str) -> Any:
    raise DecodeError(f"{text[:20]} is no number of a proof file")
