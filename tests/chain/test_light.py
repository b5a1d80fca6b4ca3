"""The light client: what it takes on trust, and every way in which a server lies to it."""

from collections.abc import Callable

import pytest
from msgspec import structs

from chain.blocks import (
    MAX_VALIDATORS,
    Header,
    Reason,
    Refused,
    ValidatorSet,
    Vote,
    VoteKind,
    certify,
    transactions_root,
    vote_bytes,
)
from chain.codec import DecodeError, encode
from chain.evidence import Watch
from chain.hashing import ZERO, digest
from chain.keys import PrivateKey, verify
from chain.light import (
    Anchor,
    LightBlock,
    LightClient,
    NotEnoughTrust,
    Trust,
    decode_light_block,
    genesis_anchor,
    trusting_ms,
)
from tests.chain.ledger_kit import KEYS, genesis_of

CHAIN = digest("light chain")
PERIOD = 1_000_000
NOW = 500_000


def set_of(*powers: int, first: int = 0) -> ValidatorSet:
    return ValidatorSet.of((KEYS[first + i].account, power) for i, power in enumerate(powers))


def finalized(header: Header, validators: ValidatorSet, signers: list[PrivateKey] | None = None) -> LightBlock:
    """Return a header with the finalization of `signers`, by default of every member."""
    said = (VoteKind.FINALIZE, header.chain_id, header.height, 1, header.hash)
    keys = [key for key in KEYS if key.account in validators] if signers is None else signers
    votes = [Vote(*said, key.account, key.sign(vote_bytes(*said))) for key in keys]
    return LightBlock(header, certify(votes, validators), validators)


def chain_of(sets: list[ValidatorSet], signers: list[list[PrivateKey]] | None = None) -> list[LightBlock]:
    """Return the light blocks of heights 1 …, height h decided by `sets[h - 1]`."""
    found: list[LightBlock] = []
    parent = CHAIN
    for index, validators in enumerate(sets):
        following = sets[min(index + 1, len(sets) - 1)]
        header = Header(
            chain_id=CHAIN,
            height=index + 1,
            parent=parent,
            proposer=validators.members[0][0],
            view=1,
            timestamp=1000 * (index + 1),
            transactions_root=transactions_root(()),
            certificate_hash=ZERO,
            state_root=digest("state", bytes([index])),
            validators_hash=validators.hash,
            next_validators_hash=following.hash,
            reveal=ZERO,
            seed=ZERO,
            leader_seed=ZERO,
        )
        found.append(finalized(header, validators, signers[index] if signers else None))
        parent = header.hash
    return found


SET = set_of(1, 1, 1, 1)
BLOCKS = chain_of([SET] * 9)


def client(anchor: Anchor | None = None, trust: Trust | None = None) -> LightClient:
    start = Anchor(0, CHAIN, 0, SET, SET.hash) if anchor is None and trust is None else anchor
    return LightClient(CHAIN, start, trust, PERIOD, verify)


def refused(light: LightClient, block: LightBlock, now_ms: int = NOW) -> Reason:
    before = light.anchor
    with pytest.raises(Refused) as refusal:
        light.update(block, now_ms)
    assert light.anchor == before
    return refusal.value.reason


def test_steps_and_skips_from_the_genesis() -> None:
    light = client()
    for height in (1, 2, 9):
        light.update(BLOCKS[height - 1], NOW)
        assert light.anchor is not None
        assert (light.anchor.height, light.anchor.block_hash) == (height, BLOCKS[height - 1].header.hash)


def test_a_trusted_block_is_the_only_beginning() -> None:
    light = client(trust=Trust(5, BLOCKS[4].header.hash))
    assert light.wanted(9) == 5
    assert refused(light, BLOCKS[3]) is Reason.WRONG_BLOCK
    light.update(BLOCKS[4], NOW)
    assert light.wanted(9) == 9
    light.update(BLOCKS[8], NOW)
    other = client(trust=Trust(5, digest("another")))
    assert refused(other, BLOCKS[4]) is Reason.WRONG_BLOCK


def test_a_skip_over_a_changed_set_is_halved_until_a_third_vouches() -> None:
    sets = [set_of(1, 1, 1, 1, first=min(index // 2, 6)) for index in range(16)]
    blocks = chain_of(sets)
    light = client(Anchor(0, CHAIN, 0, sets[0], sets[0].hash))
    asked = []
    while light.anchor is not None and light.anchor.height < 16:
        asked.append(light.wanted(16))
        try:
            light.update(blocks[asked[-1] - 1], NOW)
        except NotEnoughTrust:
            continue
    assert asked[0] == 16
    assert len(asked) < 16
    assert light.anchor is not None
    assert light.anchor.block_hash == blocks[15].header.hash


@pytest.mark.parametrize(("power", "taken"), [(33, False), (34, True)])
def test_exactly_a_third_of_the_trusted_power_is_too_little(power: int, taken: bool) -> None:
    trusted = ValidatorSet.of([(KEYS[0].account, power), (KEYS[1].account, 99 - power)])
    later = ValidatorSet.of([(KEYS[0].account, 1), (KEYS[2].account, 99)])
    header = structs.replace(BLOCKS[8].header, validators_hash=later.hash, next_validators_hash=later.hash)
    light = client(Anchor(0, CHAIN, 0, trusted, trusted.hash))
    block = finalized(header, later)
    if taken:
        light.update(block, NOW)
    else:
        assert refused(light, block) is Reason.NO_TRUST
        assert light.wanted(9) == 4


def forged_set() -> LightBlock:
    mine = set_of(1, 1, first=5)
    return finalized(structs.replace(BLOCKS[0].header, validators_hash=mine.hash), mine)


def named_set() -> LightBlock:
    """A block whose header names the right set, signed by another."""
    mine = set_of(1, 1, first=5)
    return structs.replace(finalized(BLOCKS[0].header, mine), validators=mine)


def doubled_set() -> LightBlock:
    members = ((KEYS[0].account, 1), *SET.members)
    doubled = ValidatorSet(members)
    return structs.replace(BLOCKS[0], validators=doubled)


def recertified(**changes: object) -> LightBlock:
    return structs.replace(BLOCKS[0], certificate=structs.replace(BLOCKS[0].certificate, **changes))


LIES: dict[str, tuple[Reason, Callable[[], LightBlock]]] = {
    "a set of the server's own": (Reason.WRONG_VALIDATORS, forged_set),
    "a set that the header does not name": (Reason.WRONG_VALIDATORS, named_set),
    "a member twice": (Reason.WRONG_VALIDATORS, doubled_set),
    "no validators": (
        Reason.WRONG_VALIDATORS,
        lambda: structs.replace(BLOCKS[0], validators=ValidatorSet(())),
    ),
    "another chain": (
        Reason.WRONG_CHAIN,
        lambda: finalized(structs.replace(BLOCKS[0].header, chain_id=ZERO), SET),
    ),
    "a notarization": (Reason.WRONG_KIND, lambda: recertified(kind=VoteKind.NOTARIZE)),
    "a certificate of another height": (Reason.WRONG_BLOCK, lambda: recertified(height=2)),
    "a certificate of another block": (Reason.WRONG_BLOCK, lambda: recertified(block_hash=digest("other"))),
    "a certificate of another view": (Reason.BAD_SIGNATURE, lambda: recertified(view=2)),
    "a quorum less one": (Reason.NO_QUORUM, lambda: finalized(BLOCKS[0].header, SET, KEYS[:2])),
    "another header": (
        Reason.WRONG_BLOCK,
        lambda: structs.replace(BLOCKS[0], header=structs.replace(BLOCKS[0].header, state_root=ZERO)),
    ),
    "a header of the future": (
        Reason.WRONG_TIME,
        lambda: finalized(structs.replace(BLOCKS[0].header, timestamp=NOW + 20_000), SET),
    ),
    "a header not after its parent": (
        Reason.WRONG_TIME,
        lambda: finalized(structs.replace(BLOCKS[0].header, timestamp=0), SET),
    ),
    "a first block of another genesis": (
        Reason.WRONG_BLOCK,
        lambda: finalized(structs.replace(BLOCKS[0].header, parent=ZERO), SET),
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_refused_by_name(lie: str) -> None:
    reason, made = LIES[lie]
    assert refused(client(), made()) is reason


def test_what_is_not_above_the_anchor_is_refused() -> None:
    light = client()
    light.update(BLOCKS[4], NOW)
    assert refused(light, BLOCKS[4]) is Reason.WRONG_HEIGHT
    assert refused(light, BLOCKS[2]) is Reason.WRONG_HEIGHT


def test_trust_expires() -> None:
    light = client()
    light.update(BLOCKS[0], PERIOD)
    assert refused(light, BLOCKS[1], 1000 + PERIOD + 1) is Reason.TRUST_EXPIRED
    light.update(BLOCKS[1], 1000 + PERIOD)


def test_the_anchor_of_a_network_is_its_genesis() -> None:
    genesis = genesis_of()
    anchor = genesis_anchor(genesis)
    assert (anchor.height, anchor.block_hash, anchor.timestamp) == (0, genesis.chain_id, genesis.timestamp)
    assert len(anchor.validators) == 6
    assert trusting_ms(structs.replace(genesis.params, unbonding_blocks=90, block_interval_ms=1000)) == 60_000


@pytest.mark.parametrize(
    "text", ["", "5", "5:", ":" + "00" * 32, "0:" + "00" * 32, "5:" + "00" * 31, "x:y", "²:" + "00" * 32]
)
def test_trust_is_a_height_and_a_hash(text: str) -> None:
    with pytest.raises(ValueError, match=r"HEIGHT:HASH|hash|height"):
        Trust.parse(text)


def test_trust_reads_what_it_writes() -> None:
    trust = Trust(12, digest("block"))
    assert Trust.parse(str(trust)) == trust


def test_a_light_block_has_one_encoding() -> None:
    data = encode(BLOCKS[0])
    assert decode_light_block(data) == BLOCKS[0]
    with pytest.raises(DecodeError):
        decode_light_block(data + b"\x00")


@pytest.mark.parametrize("members", [MAX_VALIDATORS + 1, 100_000])
def test_a_giant_set_is_not_even_decoded(members: int) -> None:
    giant = ValidatorSet(tuple((i.to_bytes(32, "big"), 1) for i in range(members)))
    with pytest.raises(DecodeError):
        decode_light_block(encode(structs.replace(BLOCKS[0], validators=giant)))


@pytest.mark.parametrize("power", [0, -1, 2**63])
def test_a_power_that_is_none_is_not_decoded(power: int) -> None:
    odd = ValidatorSet(((KEYS[0].account, power),))
    with pytest.raises(DecodeError):
        decode_light_block(encode(structs.replace(BLOCKS[0], validators=odd)))


def test_two_headers_of_one_height_convict_who_signed_both() -> None:
    watch = Watch(verify)
    watch.cover(1, SET)
    other = finalized(structs.replace(BLOCKS[0].header, state_root=digest("other")), SET, KEYS[1:4])
    for block in (BLOCKS[0], other):
        client().update(block, NOW)  # each alone is as good as the other
    assert not watch.examine(BLOCKS[0].certificate)
    assert watch.examine(other.certificate)
    assert watch.has_news


def test_a_client_needs_a_beginning() -> None:
    with pytest.raises(ValueError, match="anchor"):
        LightClient(CHAIN, None, None, PERIOD, verify)
