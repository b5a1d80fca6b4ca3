"""Makes the vectors. In them bytes are hex strings, and consensus objects are their positional arrays."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from msgspec import inspect, structs

from chain.blocks import Certificate, ValidatorSet, Vote, VoteKind, certify, proposal_subject, vote_bytes
from chain.codec import decode, encode
from chain.commitment import claim_root, prove
from chain.genesis import to_json
from chain.hashing import ZERO, digest
from chain.randomness import Onion, chance, leader, next_seed, uniform, weighted_draw
from chain.records import Audit
from chain.state import Table
from chain.transactions import (
    Bond,
    Evidence,
    Faucet,
    RegisterValidator,
    RotateKey,
    Transfer,
    Unbond,
    VoteParams,
    Withdraw,
    rotation_bytes,
)
from chain.tree import SparseTree, TreeProof
from tests.chain.ledger_kit import KEYS, ONIONS, STAKE, Ledger, genesis_of, start_swarm
from tests.chain.record_strategies import record_types
from tests.chain.store_kit import final_blocks

Json = Any
SEED = digest("vector seed")
CHAIN = digest("vector chain")
SET = ValidatorSet.of((key.account, power) for key, power in zip(KEYS[:5], (4, 1, 3, 2, 90), strict=True))
SAMPLES = 3
IDENTITIES = ("hash", "tx_id", "chain_id", "signing_bytes")


def plain(value: Any) -> Json:
    """Return an object's positional arrays with bytes as hex."""
    if isinstance(value, bytes):
        return value.hex()
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def sample(info: Any, rng: random.Random) -> Any:
    """Return a value that satisfies the constraints of a type."""
    match info:
        case inspect.IntType():
            least = -1 if info.ge is None else int(info.ge)
            most = int(info.le if info.le is not None else 2**63 - 1 if info.lt is None else info.lt - 1)
            return min(most, least + rng.choice((0, 1, rng.getrandbits(7), rng.getrandbits(20), most - least)))
        case inspect.BytesType():
            least = info.min_length or 0
            most = least + 4 if info.max_length is None else info.max_length
            return rng.randbytes(min(most, least + rng.randint(0, 4)))
        case inspect.BoolType():
            return rng.random() < 0.5
        case inspect.NoneType():
            return None
        case inspect.EnumType():
            return rng.choice(list(info.cls))
        case inspect.UnionType():
            return sample(rng.choice(info.types), rng)
        case inspect.TupleType():
            return tuple(sample(item, rng) for item in info.item_types)
        case inspect.VarTupleType():
            return tuple(sample(info.item_type, rng) for _ in range((info.min_length or 0) + rng.randint(0, 2)))
        case _:
            return info.cls(**{field.name: sample(field.type, rng) for field in info.fields})


def encoding() -> Json:
    """Samples of every consensus object, and spellings that must be refused."""
    objects = []
    for kind in record_types():
        rng = random.Random(f"vector {kind.__name__}")
        for _ in range(SAMPLES):
            made = sample(inspect.type_info(kind), rng)
            encoded = encode(made)
            entry = {"kind": kind.__name__, "value": plain(decode(Any, encoded)), "encoded": encoded.hex()}
            objects.append(entry | {name: getattr(made, name).hex() for name in IDENTITIES if hasattr(made, name)})
    good = encode(Transfer(ZERO, 5))
    refused = {
        "a longer integer": good[:-1] + b"\xcc\x05",
        "an integer as a float": good[:-1] + b"\xcb" + bytes(8),
        "a longer length of bytes": good.replace(b"\xc4\x20", b"\xc5\x00\x20"),
        "bytes as text": good.replace(b"\xc4\x20", b"\xd9\x20"),
        "a longer length of the array": b"\xdc\x00\x03" + good[1:],
        "a map": b"\x83" + good[1:],
        "trailing bytes": good + b"\x00",
        "cut short": good[:-1],
        "one field too many": b"\x94" + good[1:] + b"\x00",
        "one field too few": b"\x92" + good[1:-1],
        "another tag": good[:1] + b"\x13" + good[2:],
        "a hash of 31 bytes": good.replace(b"\xc4\x20" + ZERO, b"\xc4\x1f" + ZERO[1:]),
        "a negative amount": good[:-1] + b"\xff",
        "an amount of 2^63": good[:-1] + b"\xcf\x80" + bytes(7),
        "nothing": b"",
    }
    return {"objects": objects, "refused": [[why, "Transfer", data.hex()] for why, data in refused.items()]}


def _vote(index: int, kind: VoteKind, block_hash: bytes, view: int = 2) -> Vote:
    said = (kind, CHAIN, 5, view, block_hash)
    return Vote(*said, KEYS[index].account, KEYS[index].sign(vote_bytes(*said)))


def consensus() -> Json:
    """Votes, certificates and what is wrong with some of them."""
    block = digest("vector block")
    votes = [_vote(i, kind, ZERO if kind == VoteKind.NULLIFY else block) for i, kind in enumerate(VoteKind)]
    full = certify([_vote(i, VoteKind.FINALIZE, block) for i in (0, 2, 4)], SET)
    light = certify([_vote(i, VoteKind.FINALIZE, block) for i in (0, 1, 2, 3)], SET)
    false = (*full.signatures[:-1], full.signatures[0])
    refused: dict[str, Certificate] = {
        "no-quorum": light,
        "bad-signature": structs.replace(full, signatures=false),
        "bad-bitmap": structs.replace(full, signatures=full.signatures[1:]),
        "bad-bitmap, beyond the set": structs.replace(full, signers=bytes([full.signers[0] | 0x80])),
        "bad-bitmap, a byte too many": structs.replace(full, signers=full.signers + b"\x00"),
        "bad-signature, a signer twice": structs.replace(full, signatures=(full.signatures[0],) * 3),
        "bad-signature, of another view": structs.replace(full, view=3),
        "wrong-kind": structs.replace(full, kind=VoteKind.PROPOSE),
        "wrong-block": structs.replace(full, kind=VoteKind.NULLIFY),
    }
    return {
        "validators": {"encoded": encode(SET).hex(), "hash": SET.hash.hex(), "quorum": SET.quorum},
        "votes": [{"encoded": encode(vote).hex(), "signing_bytes": vote.signing_bytes.hex()} for vote in votes],
        "proposal_subject": [block.hex(), 7, proposal_subject(block, 7).hex()],
        "certificate": {"encoded": encode(full).hex(), "hash": full.hash.hex()},
        "refused": [[why, encode(certificate).hex()] for why, certificate in refused.items()],
    }


def _proof(proof: TreeProof) -> Json:
    return {"siblings": plain(proof.siblings), "leaf": plain(proof.leaf)}


def tree() -> Json:
    """The state tree's roots and proofs, claims' Merkle roots and paths, and proofs that prove nothing."""
    rows = {digest("vector key", bytes([i])): digest("vector value", bytes([i])) for i in range(40)}
    near = {bytes(31) + bytes([i]): ZERO for i in (0, 1, 255)}
    full = SparseTree().update(rows).update(near)
    inside, outside = next(iter(rows)), digest("vector absent")
    good, absent = full.prove(inside), full.prove(outside)
    other = digest("another")
    assert good.leaf is not None
    refused: dict[str, tuple[bytes, bytes | None, TreeProof]] = {
        "another value": (inside, other, good),
        "a value at an absent key": (outside, other, absent),
        "absence of a present key": (inside, None, good),
        "a sibling too many": (inside, rows[inside], TreeProof((*good.siblings, ZERO), good.leaf)),
        "a sibling too few": (inside, rows[inside], TreeProof(good.siblings[:-1], good.leaf)),
        "siblings in another order": (inside, rows[inside], TreeProof(good.siblings[::-1], good.leaf)),
        "257 siblings": (inside, rows[inside], TreeProof((ZERO,) * 257, good.leaf)),
        "a short sibling": (inside, rows[inside], TreeProof((b"", *good.siblings[1:]), good.leaf)),
        "a leaf that is not there": (outside, other, TreeProof(absent.siblings, (outside, other))),
        "no leaf where one is": (inside, None, TreeProof(good.siblings, None)),
        "a leaf of another branch": (outside, None, good),
        "a short key": (inside[:-1], rows[inside], good),
    }
    steps = [SparseTree().update({key: rows[key] for key in list(rows)[:count]}).root for count in (0, 1, 2, 3, 40)]
    leaves = [digest("vector leaf", bytes([i])) for i in range(7)]
    return {
        "rows": [[key.hex(), value.hex()] for key, value in (rows | near).items()],
        "root": full.root.hex(),
        "roots_of_the_first": plain(steps),
        "proofs": [[key.hex(), value.hex(), _proof(full.prove(key))] for key, value in (rows | near).items()],
        "absent": [outside.hex(), _proof(absent)],
        "refused": [[why, plain(key), plain(value), _proof(p)] for why, (key, value, p) in refused.items()],
        "claims": [
            {"leaves": plain(leaves[:n]), "root": claim_root(leaves[:n]).hex(), "paths": plain(
                [prove(leaves[:n], i) for i in range(n)])} for n in (1, 2, 3, 7)
        ],
    }  # fmt: skip


def draws() -> Json:
    """The beacon and every draw made from it."""
    onion = Onion(b"vector", 300)
    return {
        "seed": SEED.hex(),
        "onion": {"secret": b"vector".hex(), "length": 300, "tip": onion.tip.hex(), "reveal": onion.reveal(0).hex()},
        "next_seed": next_seed(SEED, onion.reveal(0)).hex(),
        "members": plain(SET.members),
        "leaders": [[height, view, leader(SET, SEED, height, view).hex()] for height in (1, 9) for view in range(1, 8)],
        "weighted": plain(weighted_draw(SET.members, SEED, 4)),
        "uniform": [[bound, uniform(digest("u", bytes([bound])), bound)] for bound in range(1, 30)],
        "auditors": auditors(life()),
        "chance": [[points, [chance(SEED, bytes([i]), points) for i in range(16)]] for points in (500, 5000)],
    }


def auditors(ledger: Ledger) -> Json:
    """Return the audits that a ledger drew, in the order of their ids: [claim, cell, auditor, sketch key]."""
    drawn: dict[bytes, Audit] = {}
    for _, _, _, executed in final_blocks(ledger):
        for key, audit in executed.changes.get(Table.AUDITS, {}).items():
            if audit is not None and audit.redraws == 0:
                drawn.setdefault(key, audit)
    assert drawn
    return [[a.claim.hex(), a.cell, a.auditor.hex(), a.key.hex()] for _, a in sorted(drawn.items())]


def life() -> Ledger:
    """A network's life: stake moves, a task with a cheating worker, an equivocation, a rotation, a vote."""
    ledger = Ledger(genesis_of(faucet=10, faucet_grant=5, unbonding_blocks=5, newcomer_rate=3000))
    newcomer, victim = KEYS[7], KEYS[5]
    ledger.block(
        (newcomer, Transfer(KEYS[8].account, 77)),
        (newcomer, RegisterValidator(ONIONS[newcomer.account].tip)),
        (newcomer, Bond(STAKE)),
        (newcomer, Transfer(KEYS[8].account, 10**12)),
        (victim, Unbond(10)),
        (KEYS[8], Faucet()),
    )
    swarm = start_swarm(ledger, workers=KEYS[:4], microbatches=4, depth=1)
    swarm.deviation[KEYS[0].account] = 1.0
    while not {"evicted", "settled"} <= set(ledger.kinds()):
        swarm.work(1)
    named = (VoteKind.FINALIZE, ledger.genesis.chain_id, ledger.state.height, 1)
    said = [(*named, digest("vector", bytes([i]))) for i in (0, 1)]
    first, second = (Vote(*one, victim.account, victim.sign(vote_bytes(*one))) for one in said)
    ledger.block((KEYS[2], Evidence(encode(first), encode(second))), (victim, Withdraw()))
    assert "equivocation" in ledger.kinds()
    _rotate_and_vote(ledger)
    return ledger


def _rotate_and_vote(ledger: Ledger) -> None:
    """Let a validator rotate its key, and let the others vote for another lease."""
    old, new = KEYS[4], KEYS[9]
    proof = new.sign(rotation_bytes(ledger.genesis.chain_id, old.account))
    vote = VoteParams(structs.replace(ledger.state.params, lease_blocks=99))
    ledger.block((old, RotateKey(new.account, ONIONS[new.account].tip, proof)), *((key, vote) for key in KEYS[:4]))
    ledger.block((KEYS[8], Transfer(old.account, 1)))
    while ledger.state.params != vote.params:
        ledger.skip(1)
    assert "rotated" in ledger.kinds()


def transitions() -> Json:
    """A genesis, the blocks on it with their certificates, and what each does to the state."""
    ledger = life()
    blocks = [
        {
            "block": encode(block).hex(),
            "hash": block.hash.hex(),
            "certificate": encode(certificate).hex(),
            "transactions": [transaction.tx_id.hex() for transaction in block.transactions],
            "receipts": [receipt.reason for receipt in executed.receipts],
            "events": [event.kind for event in executed.events],
            "state_root": executed.state.root.hex(),
        }
        for block, certificate, _, executed in final_blocks(ledger)
    ]
    return {"genesis": json.loads(to_json(ledger.genesis)), "blocks": blocks}


FILES: dict[str, Callable[[], Json]] = {
    "encoding": encoding,
    "consensus": consensus,
    "tree": tree,
    "draws": draws,
    "transitions": transitions,
}


def path_of(name: str) -> Path:
    """Return where a file of vectors is."""
    return Path(__file__).parent / f"{name}.json"


def text_of(name: str) -> str:
    """Return what the file must hold."""
    return json.dumps(FILES[name](), indent=1) + "\n"
