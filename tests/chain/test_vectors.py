"""The JSON vectors: made again they are the same bytes, and whoever reads them finds them true."""

import json
from typing import Any

import pytest

from chain.blocks import (
    Block,
    Certificate,
    Reason,
    Refused,
    ValidatorSet,
    VerifiedSignatures,
    Vote,
    proposal_subject,
    verify_certificate,
    verify_vote,
)
from chain.codec import DecodeError, Record, decode, encode
from chain.commitment import is_member
from chain.engine_blocks import Tip, check
from chain.genesis import from_json
from chain.keys import verify
from chain.randomness import leader, peel
from chain.state import genesis_state
from chain.sync import FinalBlock, check_final
from chain.transactions import Transfer
from chain.tree import SparseTree, TreeProof, verify_proof
from tests.chain.record_strategies import record_types
from tests.vectors.make import FILES, IDENTITIES, path_of, text_of

KINDS = {kind.__name__: kind for kind in record_types()}


def vectors(name: str) -> Any:
    return json.loads(path_of(name).read_text())


def written(value: Any) -> bytes:
    """Return msgpack in its shortest spelling: an encoder that shares nothing with `chain.codec`."""
    if value is None:
        return b"\xc0"
    if isinstance(value, bool):
        return b"\xc3" if value else b"\xc2"
    if isinstance(value, int):
        return _integer(value)
    if isinstance(value, str):
        data = bytes.fromhex(value)
        size, tag = next((n, h) for n, h in ((1, 0xC4), (2, 0xC5), (4, 0xC6)) if len(data) < 256**n)
        return bytes([tag]) + len(data).to_bytes(size, "big") + data
    head = bytes([0x90 | len(value)]) if len(value) < 16 else b"\xdc" + len(value).to_bytes(2, "big")
    return head + b"".join(map(written, value))


def _integer(value: int) -> bytes:
    if -32 <= value < 128:
        return value.to_bytes(1, "big", signed=value < 0)
    size, head = next((n, h) for n, h in ((1, 0xCC), (2, 0xCD), (4, 0xCE), (8, 0xCF)) if value < 256**n)
    return bytes([head]) + value.to_bytes(size, "big")


@pytest.mark.parametrize("name", FILES)
def test_made_again_they_are_the_same(name: str) -> None:
    assert path_of(name).read_text() == text_of(name), "after a wanted change: python -m tests.vectors"


def test_every_object_has_the_one_encoding() -> None:
    objects = vectors("encoding")["objects"]
    assert {entry["kind"] for entry in objects} == set(KINDS)
    for entry in objects:
        encoded = bytes.fromhex(entry["encoded"])
        assert written(entry["value"]) == encoded
        record: Record = decode(KINDS[entry["kind"]], encoded)
        assert encode(record) == encoded
        assert all(getattr(record, name).hex() == entry[name] for name in IDENTITIES if name in entry)


def test_other_spellings_are_refused() -> None:
    for why, kind, data in vectors("encoding")["refused"]:
        with pytest.raises(DecodeError):
            pytest.fail(f"{why}: {decode(KINDS[kind], bytes.fromhex(data))}")


def test_votes_are_signed_and_certificates_hold_or_say_why_not() -> None:
    found = vectors("consensus")
    validators: ValidatorSet = decode(ValidatorSet, bytes.fromhex(found["validators"]["encoded"]))
    assert [validators.hash.hex(), validators.quorum] == [found["validators"]["hash"], found["validators"]["quorum"]]
    for entry in found["votes"]:
        vote: Vote = decode(Vote, bytes.fromhex(entry["encoded"]))
        assert vote.signing_bytes.hex() == entry["signing_bytes"]
        verify_vote(vote, validators, verify)
    block, view, subject = found["proposal_subject"]
    assert proposal_subject(bytes.fromhex(block), view).hex() == subject
    certificate: Certificate = decode(Certificate, bytes.fromhex(found["certificate"]["encoded"]))
    assert certificate.hash.hex() == found["certificate"]["hash"]
    verify_certificate(certificate, validators, verify)
    for why, data in found["refused"]:
        with pytest.raises(Refused) as refusal:
            verify_certificate(decode(Certificate, bytes.fromhex(data)), validators, verify)
        assert refusal.value.reason is Reason(why.split(",")[0])


def unproof(entry: Any) -> TreeProof:
    leaf = entry["leaf"]
    return TreeProof(
        tuple(map(bytes.fromhex, entry["siblings"])),
        None if leaf is None else (bytes.fromhex(leaf[0]), bytes.fromhex(leaf[1])),
    )


def test_roots_and_proofs() -> None:
    found = vectors("tree")
    root = bytes.fromhex(found["root"])
    rows = {bytes.fromhex(key): bytes.fromhex(value) for key, value in found["rows"]}
    assert SparseTree().update(rows).root == root
    for key, value, proof in found["proofs"]:
        assert verify_proof(root, bytes.fromhex(key), bytes.fromhex(value), unproof(proof))
    absent, proof = found["absent"]
    assert verify_proof(root, bytes.fromhex(absent), None, unproof(proof))
    for why, key, value, proof in found["refused"]:
        expected = None if value is None else bytes.fromhex(value)
        assert not verify_proof(root, bytes.fromhex(key), expected, unproof(proof)), why


def test_paths_of_claims() -> None:
    for entry in vectors("tree")["claims"]:
        leaves, root = list(map(bytes.fromhex, entry["leaves"])), bytes.fromhex(entry["root"])
        for index, (leaf, path) in enumerate(zip(leaves, entry["paths"], strict=True)):
            siblings = list(map(bytes.fromhex, path))
            assert is_member(root, leaf, index, len(leaves), siblings)
            assert not is_member(root, leaf, index, len(leaves), [*siblings, root])
            assert not is_member(root, root, index, len(leaves), siblings)


def test_draws() -> None:
    found = vectors("draws")
    members = ValidatorSet.of((bytes.fromhex(account), power) for account, power in found["members"])
    for height, view, account in found["leaders"]:
        assert leader(members, bytes.fromhex(found["seed"]), height, view).hex() == account
    assert peel(bytes.fromhex(found["onion"]["reveal"])).hex() == found["onion"]["tip"]


def test_a_follower_of_the_blocks_reaches_every_state() -> None:
    found = vectors("transitions")
    genesis = from_json(json.dumps(found["genesis"]))
    tip, signatures = Tip(genesis.chain_id, genesis_state(genesis)), VerifiedSignatures()
    for entry in found["blocks"]:
        block: Block = decode(Block, bytes.fromhex(entry["block"]))
        certificate: Certificate = decode(Certificate, bytes.fromhex(entry["certificate"]))
        assert all(transaction.is_signed() for transaction in block.transactions)
        signers = tip.state.validators()
        check_final(FinalBlock(block, certificate), tip.header, signers, signatures)
        executed = check(tip, block, None, signatures)
        assert block.hash.hex() == entry["hash"]
        assert [transaction.tx_id.hex() for transaction in block.transactions] == entry["transactions"]
        assert [receipt.reason for receipt in executed.receipts] == entry["receipts"]
        assert [event.kind for event in executed.events] == entry["events"]
        assert executed.state.root.hex() == entry["state_root"]
        tip = Tip(tip.chain_id, executed.state, block.header, certificate, signers)


def test_a_block_that_says_anything_else_is_refused() -> None:
    found = vectors("transitions")
    genesis = from_json(json.dumps(found["genesis"]))
    tip = Tip(genesis.chain_id, genesis_state(genesis))
    data = bytes.fromhex(found["blocks"][0]["block"])
    block: Block = decode(Block, data)
    check(tip, block, None, verify)
    for field in ("parent", "state_root", "validators_hash", "next_validators_hash", "seed", "leader_seed", "reveal"):
        there = getattr(block.header, field)
        assert there in data
        with pytest.raises(Exception, match=r"wrong-"):
            check(tip, decode(Block, data.replace(there, bytes(32), 1)), None, verify)


def test_the_refused_spelling_of_a_transfer_has_a_good_one() -> None:
    assert decode(Transfer, encode(Transfer(bytes(32), 5))) == Transfer(bytes(32), 5)
