"""Proof files: what they show, to whom, and that nothing else can be made of them."""

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from chain.blocks import Refused
from chain.codec import DecodeError, decode, encode
from chain.hashing import ZERO, digest
from chain.keys import peer_id
from chain.light import LightBlock, Trust
from chain.proofs import KINDS, MAX_PROOF_BYTES, Proof, Proven, check, from_text, key_of, prove, to_document
from chain.records import Account
from chain.state import State, Table
from tests.chain.ledger_kit import KEYS, Ledger, genesis_of, start_swarm
from tests.chain.store_kit import final_blocks

HOUR = 3_600_000


@cache
def life() -> tuple[tuple[LightBlock, ...], State, bytes]:
    """Return the light blocks of a short life, its last state and the id of its task."""
    swarm = start_swarm(Ledger(genesis_of()))
    swarm.work(8)
    blocks, state = [], swarm.state
    for block, certificate, before, executed in final_blocks(swarm.ledger):
        blocks.append(LightBlock(block.header, certificate, before.validators()))
        state = executed.state
    return tuple(blocks), state, swarm.task


def now_ms() -> int:
    return life()[0][-1].header.timestamp + 1000


def trust(index: int = -1) -> Trust:
    header = life()[0][index].header
    return Trust(header.height, header.hash)


def proof_of(kind: str, text: str, *path: LightBlock) -> Proof:
    blocks, state, _ = life()
    return prove(state, kind, key_of(kind, text), path or (blocks[-1],))


def shown(proof: Proof, trusted: Trust | None = None) -> Proven:
    return check(from_text(json.dumps(to_document(proof))), trusted or trust(), now_ms(), HOUR)


ALICE = peer_id(KEYS[0].account)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_record_is_proven(kind: str) -> None:
    _, state, task = life()
    claim = next(iter(state.tables[Table.CLAIMS])).hex()
    audit = next(iter(state.tables[Table.AUDITS])).hex()
    keys = {"task": task.hex(), "worker": f"{task.hex()}:{ALICE}", "claim": claim, "audit": audit}
    text = keys.get(kind, "" if kind in ("params", "chain") else "00" * 32 if kind == "evidence" else ALICE)
    proven = shown(proof_of(kind, text))
    assert (proven.kind, proven.key, proven.height) == (kind, text, state.height)
    assert (proven.record is None) == (kind == "evidence")


def test_absence_is_proven() -> None:
    proven = shown(proof_of("account", peer_id(digest("nobody"))))
    assert proven.record is None


def test_the_proof_leads_from_any_older_block_that_is_trusted() -> None:
    blocks, state, _ = life()
    proof = proof_of("account", ALICE, blocks[0], blocks[3], blocks[-1])
    assert shown(proof, trust(0)).record == state.account(KEYS[0].account)
    with pytest.raises(Refused, match="trust-expired"):
        check(proof, trust(0), blocks[0].header.timestamp + HOUR + 1, HOUR)
    for other in (trust(3), trust(), Trust(1, ZERO)):
        with pytest.raises(Refused):
            shown(proof, other)


def test_a_record_of_another_state_is_not_proven() -> None:
    good = proof_of("account", ALICE)
    for forged in (
        structs.replace(good, value=encode(Account(balance=10**12))),
        structs.replace(good, value=None),
        structs.replace(good, value=None, leaf=(digest("a"), digest("b"))),
        structs.replace(good, key=KEYS[1].account),
        structs.replace(good, table=int(Table.VALIDATORS)),
        structs.replace(good, siblings=(*good.siblings, ZERO)),
        structs.replace(good, siblings=good.siblings[1:]),
        structs.replace(good, block=life()[0][-2]),
    ):
        with pytest.raises((Refused, DecodeError)):
            shown(forged)


def test_both_sides_filled_is_refused() -> None:
    absent = proof_of("account", peer_id(digest("nobody")))
    both = structs.replace(absent, value=encode(Account()), leaf=(digest("a"), digest("b")))
    with pytest.raises(Refused, match="both a record and the leaf"):
        shown(both)


def test_a_table_of_no_kind_is_refused() -> None:
    with pytest.raises(Refused, match="malformed"):
        check(structs.replace(proof_of("account", ALICE), table=int(Table.QUEUE)), trust(), now_ms(), HOUR)
    with pytest.raises(Refused, match="malformed"):
        check(structs.replace(proof_of("account", ALICE), key=b"short"), trust(), now_ms(), HOUR)


def document(**changes: Any) -> dict[str, Any]:
    return to_document(proof_of("account", ALICE)) | changes


SPOILT: dict[str, Callable[[], str]] = {
    "trailing bytes": lambda: json.dumps(document(proof=document()["proof"] + "00")),
    "cut short": lambda: json.dumps(document(proof=document()["proof"][:-2])),
    "no hexadecimal": lambda: json.dumps(document(proof="zz")),
    "capitals": lambda: json.dumps(document(proof=document()["proof"].upper())),
    "another height for people": lambda: json.dumps(document(height=1)),
    "another record for people": lambda: json.dumps(document(record={"balance": "1"})),
    "present or not": lambda: json.dumps(document(present=False)),
    "a field more": lambda: json.dumps(document(note="trust me")),
    "a name twice": lambda: json.dumps(document())[:-1] + ', "height": 1}',
    "a float": lambda: json.dumps(document(height=1.5)),
    "not a number": lambda: json.dumps(document(height=float("nan"))),
    "a list": lambda: "[]",
    "deep": lambda: "[" * 100_000,
    "text": lambda: "proof",
    "nothing": lambda: "",
    "giant": lambda: " " * (8 * 1024 * 1024 + 1),
    "257 siblings": lambda: json.dumps(
        document(proof=encode(structs.replace(proof_of("account", ALICE), siblings=(ZERO,) * 257)).hex())
    ),
    "65 blocks": lambda: json.dumps(
        document(proof=encode(structs.replace(proof_of("account", ALICE), path=(life()[0][0],) * 65)).hex())
    ),
    "a value that is no record": lambda: json.dumps(
        document(proof=encode(structs.replace(proof_of("account", ALICE), value=b"\xc1")).hex())
    ),
}


@pytest.mark.parametrize("spoil", SPOILT)
def test_a_spoilt_file_is_no_proof(spoil: str) -> None:
    with pytest.raises(DecodeError):
        from_text(SPOILT[spoil]())


@cache
def mutated() -> tuple[tuple[str, str, Trust, Proven], ...]:
    """Return proofs of a record, of an absence and over a path: file, bytes in it, trust, meaning."""
    blocks = life()[0]
    proofs = (
        (proof_of("account", ALICE), trust()),
        (proof_of("account", peer_id(digest("nobody"))), trust()),
        (proof_of("params", "", blocks[0], blocks[3], blocks[-1]), trust(0)),
    )
    return tuple((json.dumps(to_document(p)), encode(p).hex(), t, shown(p, t)) for p, t in proofs)


@settings(max_examples=400, deadline=None)
@given(st.integers(0, 2), st.integers(0, 10**6), st.integers(0, 255), st.booleans())
def test_no_altered_byte_proves_anything_else(which: int, place: int, byte: int, inside: bool) -> None:
    text, encoded, trusted, good = mutated()[which]
    if inside:
        data = bytearray(bytes.fromhex(encoded))
        data[place % len(data)] = byte
        changed = text.replace(encoded, data.hex())
    else:
        changed = text[: place % len(text)] + chr(byte) + text[place % len(text) + 1 :]
    try:
        found = check(from_text(changed), trusted, now_ms(), HOUR)
    except (DecodeError, Refused):
        return
    assert found == good


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 10**6), st.integers(0, 40))
def test_bytes_put_in_or_taken_out_prove_nothing_else(junk: bytes, place: int, taken: int) -> None:
    """The bytes alone, without what the file says of them for people: the decoding itself is strict."""
    _, encoded, trusted, good = mutated()[0]
    data = bytes.fromhex(encoded)
    start = place % len(data)
    try:
        proof: Proof = decode(Proof, data[:start] + junk + data[start + taken :], MAX_PROOF_BYTES)
        found = check(proof, trusted, now_ms(), HOUR)
    except (DecodeError, Refused):
        return
    assert found == good


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("account", "nobody"),
        ("task", "00"),
        ("task", "AA" * 32),
        ("worker", "00" * 32),
        ("params", "x"),
        ("claim", ""),
    ],
)
def test_a_key_that_names_nothing_is_refused(kind: str, text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - a sentence each
        key_of(kind, text)
