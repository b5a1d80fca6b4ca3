"""The judge of a run. It recomputes digests, weights and conflicts itself and shares no code with `chain`.

Records are read through their fields only; encodings and hashes follow docs/design/contract.md.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from blake3 import blake3

PROPOSE, NOTARIZE, NULLIFY, FINALIZE = range(4)


def _hash(domain: str, data: bytes) -> bytes:
    return blake3(data, derive_key_context=f"tdml 1 {domain}").digest()


def signed_message(vote: Any) -> bytes:
    """Return what a vote's signature must cover."""
    place = vote.height.to_bytes(8, "big") + vote.view.to_bytes(8, "big")
    return _hash("vote", vote.chain_id + bytes([int(vote.kind)]) + place + vote.block_hash)


def block_hash(block: Any) -> bytes:
    """Return the hash of a block's header."""
    return _hash("header", msgspec.msgpack.encode(msgspec.structs.astuple(block.header)))


def signers(certificate: Any, stakes: Mapping[bytes, int]) -> list[bytes]:
    """Return the accounts whose bits are set, after checking their signatures one by one."""
    ordered = sorted(stakes)
    chosen = [account for i, account in enumerate(ordered) if (certificate.signers[i // 8] & (1 << (i % 8)))]
    message = signed_message(certificate)
    assert len(chosen) == len(certificate.signatures)
    for account, signature in zip(chosen, certificate.signatures, strict=True):
        assert signature == account + message, "a certificate holds a false signature"
    return chosen


def incriminated(votes: Iterable[Any]) -> set[bytes]:
    """Return the accounts that signed two conflicting votes."""
    seen: defaultdict[tuple[bytes, int, int], set[tuple[int, bytes]]] = defaultdict(set)
    for vote in votes:
        seen[vote.validator, vote.height, vote.view].add((int(vote.kind), vote.block_hash))
    guilty = set()
    for (account, _, _), said in seen.items():
        hashes = {kind: {h for k, h in said if k == kind} for kind in (PROPOSE, NOTARIZE, NULLIFY, FINALIZE)}
        twice = any(len(found) > 1 for found in hashes.values())
        both = hashes[NULLIFY] and hashes[FINALIZE]
        other = hashes[NOTARIZE] and hashes[FINALIZE] and hashes[NOTARIZE] != hashes[FINALIZE]
        if twice or both or other:
            guilty.add(account)
    return guilty


def culprits(certificates: Iterable[Any], stakes: Mapping[bytes, int]) -> set[bytes]:
    """Return whom the certificates that went over the network convict by themselves."""
    said: defaultdict[tuple[int, int], set[tuple[int, bytes, bytes]]] = defaultdict(set)
    for certificate in certificates:
        for account in signers(certificate, stakes):
            said[certificate.height, certificate.view].add((int(certificate.kind), certificate.block_hash, account))
    found = set()
    for statements in said.values():
        for kind, hash_, account in statements:
            others = {(k, h) for k, h, a in statements if a == account}
            doubled = any(k == kind and h != hash_ for k, h in others)
            split = kind == NOTARIZE and any(k == FINALIZE and h != hash_ for k, h in others)
            if doubled or split or (kind == NULLIFY and any(k == FINALIZE for k, _ in others)):
                found.add(account)
    return found


def judge(outcome: Any, stakes: Mapping[bytes, int], honest_nodes: set[int], honest: set[bytes]) -> list[str]:
    """Return every broken invariant of a run, in words."""
    faults: list[str] = []
    total = sum(stakes.values())
    finals: defaultdict[int, set[bytes]] = defaultdict(set)
    last: dict[int, tuple[int, bytes]] = {}
    for node, block, certificate in outcome.decisions:
        if node not in honest_nodes:
            continue
        hash_ = block_hash(block)
        finals[block.header.height].add(hash_)
        height, parent = last.get(node, (0, block.header.chain_id))
        if (block.header.height, block.header.parent) != (height + 1, parent):
            faults.append(f"node {node}: block {block.header.height} does not follow its chain")
        last[node] = (block.header.height, hash_)
        weight = sum(stakes[account] for account in signers(certificate, stakes))
        said = (int(certificate.kind), certificate.height, certificate.block_hash)
        if 3 * weight <= 2 * total or said != (FINALIZE, block.header.height, hash_):
            faults.append(f"node {node}: height {block.header.height} rests on no quorum")
    faults += [f"fork at height {height}" for height, hashes in finals.items() if len(hashes) > 1]
    places: defaultdict[int, set[tuple[int, int]]] = defaultdict(set)
    for certificate in outcome.certificates:
        places[int(certificate.kind)].add((certificate.height, certificate.view))
    faults += [f"{place} is both final and nullified" for place in sorted(places[FINALIZE] & places[NULLIFY])]
    wronged = incriminated(vote for _, vote in outcome.votes) & honest
    faults += [f"honest {account.hex()[:8]} signed a conflict" for account in sorted(wronged)]
    accused = {accusation.first.validator for _, accusation in outcome.accusations}
    faults += [f"honest {account.hex()[:8]} was accused" for account in sorted(accused & honest)]
    return faults
