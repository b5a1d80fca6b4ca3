"""A hostile peer on gossip: each attack is refused by name, at a bounded cost of checks and memory."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import trio.testing
from msgspec import structs

from chain import engine_gate
from chain.blocks import (
    MAX_CERTIFICATE_BYTES,
    MAX_VALIDATORS,
    Block,
    Certificate,
    ConsensusMessage,
    Proposal,
    Vote,
    VoteKind,
    certify,
    proposal_subject,
    vote_bytes,
)
from chain.codec import encode
from chain.consensus import HORIZON, Consensus, HeightConfig
from chain.engine_gate import (
    FUTURE,
    MAX_AHEAD,
    MAX_BUFFERED,
    MAX_BUFFERED_BY_ONE,
    MAX_BUFFERED_BYTES,
    Action,
    Disposition,
    Gate,
    rejected,
)
from chain.engine_transactions import BATCH, Transactions
from chain.evidence import MAX_VOTES, Watch
from chain.hashing import ZERO, digest
from chain.keys import PrivateKey, verify
from chain.mempool import DEFAULT_BYTES
from chain.state import genesis_state
from chain.transactions import VERSION, Transaction, Transfer, Unsigned, sign
from tests.chain.hub import Hub, genesis_of, keys, running, take, until_height
from tests.chain.test_blocks import block

MEMBERS = keys(4)
GENESIS = genesis_of(MEMBERS, [])
STATE = genesis_state(GENESIS)
CHAIN = GENESIS.chain_id
SET = STATE.validators()
HEIGHT = 100
ORDER = 2**252 + 27742317777372353535851937790883648493
"""The order of the ed25519 group: adding it to a signature's scalar once made another valid signature."""


class Desk:
    """A gate and a machine under attack; `checks` counts signature checks."""

    def __init__(self) -> None:
        self.checks = 0
        self.watch = Watch(self._verify)
        for height in range(HEIGHT - 10, HEIGHT + 1):
            self.watch.cover(height, SET)
        self.gate = Gate(CHAIN, self._verify, self.watch)
        self.machine = Consensus(HeightConfig(CHAIN, HEIGHT, SET, ZERO))
        self.machine.start()

    def _verify(self, account: bytes, message: bytes, signature: bytes) -> bool:
        self.checks += 1
        return verify(account, message, signature)

    def take(self, message: ConsensusMessage | bytes) -> Disposition:
        data = message if isinstance(message, bytes) else encode(message)
        return self.gate.take(data, self.machine, None, 0.0).disposition


def vote(
    key: PrivateKey, kind: VoteKind = VoteKind.NULLIFY, at: tuple[int, int] = (HEIGHT, 1), of: bytes = ZERO
) -> Vote:
    said = (kind, CHAIN, *at, of)
    return Vote(*said, key.account, key.sign(vote_bytes(*said)))


def notarization(signers: list[PrivateKey], at: tuple[int, int] = (HEIGHT, 1)) -> Certificate:
    return certify([vote(key, VoteKind.NOTARIZE, at, digest("block")) for key in signers], SET)


def proposal(desk: Desk, view: int = 1, height: int = HEIGHT) -> Proposal:
    leader = next(key for key in MEMBERS if key.account == desk.machine.leader(view))
    header = structs.replace(block(1).header, chain_id=CHAIN, height=height)
    made = Block(structs.replace(header, certificate_hash=notarization(MEMBERS).hash), (), notarization(MEMBERS))
    return Proposal(vote(leader, VoteKind.PROPOSE, (height, view), proposal_subject(made.hash, 0)), 0, made)


def hostile(desk: Desk) -> dict[str, tuple[ConsensusMessage | bytes, str]]:
    """Return attacks by what they are, each with the reason that refuses it."""
    good = vote(MEMBERS[0])
    quorum = notarization(MEMBERS[:3])
    scalar = int.from_bytes(good.signature[32:], "little") + ORDER
    offer = proposal(desk)
    other = next(key for key in MEMBERS if key.account != offer.vote.validator)
    return {
        "another network": (structs.replace(good, chain_id=digest("other")), "wrong-chain"),
        "no member": (vote(PrivateKey(bytes([99]) * 32)), "unknown-validator"),
        "another's name": (structs.replace(good, validator=MEMBERS[1].account), "bad-signature"),
        "a malleable signature": (
            structs.replace(good, signature=good.signature[:32] + scalar.to_bytes(32, "little")),
            "bad-signature",
        ),
        "another view than signed": (structs.replace(good, view=2), "bad-signature"),
        "another kind than signed": (
            structs.replace(good, kind=VoteKind.FINALIZE, block_hash=digest("block")),
            "bad-signature",
        ),
        "a nullification of a block": (structs.replace(good, block_hash=digest("block")), "wrong-block"),
        "a bare proposal vote": (offer.vote, "wrong-kind"),
        "a proposal of another than the leader": (
            Proposal(vote(other, VoteKind.PROPOSE, of=offer.vote.block_hash), 0, offer.block),
            "wrong-leader",
        ),
        "a proposal whose body is another's": (
            structs.replace(offer, block=structs.replace(offer.block, parent_certificate=quorum)),
            "wrong-block",
        ),
        "a proposal signed over another block": (structs.replace(offer, parent_view=1), "wrong-block"),
    }


def false_certificates() -> dict[str, tuple[ConsensusMessage | bytes, str]]:
    """Return certificates that certify nothing."""
    quorum, full = notarization(MEMBERS[:3]), notarization(MEMBERS)
    twice = structs.replace(quorum, signatures=(quorum.signatures[0],) * 3)
    wide = structs.replace(quorum, signers=bytes([0xFF] * 32), signatures=quorum.signatures[:1] * 256)
    return {
        "too little power": (notarization(MEMBERS[:2]), "no-quorum"),
        "one signature for all": (twice, "bad-signature"),
        "more signatures than signers": (
            structs.replace(quorum, signatures=full.signatures),
            "bad-bitmap",
        ),
        "signers beyond the set": (structs.replace(full, signers=bytes([0x1F])), "bad-bitmap"),
        "a bitmap with spare bytes": (structs.replace(quorum, signers=quorum.signers + b"\0"), "bad-bitmap"),
        "a certificate of 256 signatures": (wide, "bad-bitmap"),
        "a certificate beyond all sets": (
            encode(quorum).replace(encode(quorum.signatures), encode(quorum.signatures[:1] * (MAX_VALIDATORS + 1))),
            "malformed",
        ),
    }


def garbled() -> dict[str, tuple[ConsensusMessage | bytes, str]]:
    """Return bytes that are no message, or not the only spelling of one."""
    raw, height = encode(vote(MEMBERS[0])), encode(HEIGHT)
    assert raw.count(height) >= 1
    return {
        "trailing bytes": (raw + b"\0", "malformed"),
        "a number spelled long": (raw.replace(height, b"\xcd\x00" + bytes([HEIGHT]), 1), "malformed"),
        "bytes for text": (raw.replace(b"\xc4\x20", b"\xd9\x20", 1), "malformed"),
        "an array too long": (bytes([raw[0] + 1]) + raw[1:] + b"\0", "malformed"),
        "nothing": (b"", "malformed"),
        "a gigabyte announced": (b"\xdd\x40\x00\x00\x00", "malformed"),
        "a map": (b"\x81\xa1a\x01", "malformed"),
        "deep nesting": (b"\x91" * 100_000, "malformed"),
    }


ATTACKS = hostile(Desk()) | false_certificates() | garbled()


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_false_message_is_refused_by_name_at_once(attack: str) -> None:
    desk = Desk()
    message, reason = ATTACKS[attack]
    answer = desk.take(message)
    assert (answer.action, answer.reason) == (Action.REJECT, reason)
    assert desk.checks <= 2
    assert len(desk.watch) == 0
    assert desk.gate.buffered == (0, 0)
    assert not desk.gate.heard


def test_true_messages_of_these_kinds_are_taken() -> None:
    """So that the refusals above are for the reasons they name."""
    desk = Desk()
    for message in (vote(MEMBERS[0]), proposal(desk), notarization(MEMBERS[:3])):
        assert desk.take(message).action == Action.ACCEPT


def test_a_proposal_shows_what_its_parents_signers_signed() -> None:
    desk = Desk()
    twin = MEMBERS[3]
    desk.take(vote(twin, VoteKind.NOTARIZE, of=digest("another")))
    assert not desk.watch.has_news
    assert desk.take(proposal(desk)).action == Action.ACCEPT
    assert desk.watch.has_news


def test_far_views_cost_nothing_and_leave_nothing() -> None:
    desk = Desk()
    for view in (HORIZON + 2, 2**20, 2**31):
        answer = desk.take(vote(MEMBERS[0], at=(HEIGHT, view)))
        assert (answer.action, answer.reason) == (Action.IGNORE, "far-view")
    assert desk.checks == 0
    assert len(desk.watch) == 0


def test_far_heights_cost_nothing_and_leave_nothing() -> None:
    desk = Desk()
    for height in (HEIGHT + MAX_AHEAD + 1, 2**40, 2**63 - 1):
        assert desk.take(vote(MEMBERS[0], at=(height, 1))) == FUTURE
    for height in (0, 1, HEIGHT - 11):
        assert desk.take(vote(MEMBERS[0], at=(height, 1))).reason == "past-height"
    assert desk.checks == 0
    assert desk.gate.buffered == (0, 0)


def test_the_next_heights_are_kept_only_of_members_and_only_so_much() -> None:
    desk = Desk()
    stranger = PrivateKey(bytes([99]) * 32)
    forged = structs.replace(vote(MEMBERS[0], at=(HEIGHT + 1, 1)), signature=bytes(64))
    for message in (vote(stranger, at=(HEIGHT + 1, 1)), vote(MEMBERS[0], at=(HEIGHT + 1, HORIZON + 1))):
        assert desk.take(message) == FUTURE
    assert desk.take(forged) == rejected("bad-signature")
    assert desk.gate.buffered == (0, 0)
    for i in range(3 * MAX_BUFFERED_BY_ONE):
        desk.take(vote(MEMBERS[1], VoteKind.NOTARIZE, (HEIGHT + 1, 1), digest("block", bytes([i]))))
    assert desk.gate.buffered[0] == MAX_BUFFERED_BY_ONE
    assert desk.take(vote(MEMBERS[0], at=(HEIGHT + 1, 1))) == FUTURE
    assert desk.gate.buffered[0] == MAX_BUFFERED_BY_ONE + 1
    assert MAX_BUFFERED_BYTES <= 8 << 20
    assert MAX_BUFFERED <= 512


def early_lies(desk: Desk) -> dict[str, ConsensusMessage]:
    at = (HEIGHT + 1, 1)
    good, offer = vote(MEMBERS[0], at=at), proposal(desk, height=HEIGHT + 1)
    return {
        "bad-signature": structs.replace(good, signature=bytes(64)),
        "bad-signature ": structs.replace(offer, vote=structs.replace(offer.vote, signature=bytes(64))),
        "wrong-block": structs.replace(good, block_hash=digest("block")),
        "wrong-block ": structs.replace(offer, parent_view=1),
        "wrong-block  ": structs.replace(notarization(MEMBERS, at), block_hash=ZERO),
        "wrong-kind": offer.vote,
    }


@pytest.mark.parametrize("lie", early_lies(Desk()))
def test_what_is_false_under_any_validators_is_refused_before_its_height(lie: str) -> None:
    desk = Desk()
    assert desk.take(early_lies(desk)[lie]) == rejected(lie.strip())
    assert desk.gate.buffered == (0, 0)


def test_what_later_validators_may_have_signed_is_not_held_against_its_sender() -> None:
    desk, at = Desk(), (HEIGHT + 1, 1)
    quorum = notarization(MEMBERS[:3], at)
    for message in (notarization(MEMBERS[:1], at), structs.replace(quorum, signers=b"\x0e"), notarization(MEMBERS, at)):
        assert desk.take(message) == FUTURE


def test_large_proposals_of_one_member_leave_room_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk()
    early = [proposal(desk, view, HEIGHT + 1) for view in range(1, 9)]
    by_one = {p.vote.validator: [q for q in early if q.vote.validator == p.vote.validator] for p in early}
    flood = max(by_one.values(), key=len)
    size = len(encode(flood[0]))
    monkeypatch.setattr(engine_gate, "MAX_BUFFERED_BYTES", 4 * size)
    monkeypatch.setattr(engine_gate, "MAX_BYTES_OF_ONE", size)
    for message in flood:
        desk.take(message)
    assert len(flood) > 1
    assert desk.gate.buffered == (1, size)
    desk.take(vote(next(key for key in MEMBERS if key.account != flood[0].vote.validator), at=(HEIGHT + 1, 1)))
    assert desk.gate.buffered[0] == 2


def test_a_flood_of_authentic_votes_is_remembered_within_bounds() -> None:
    """Only a member can flood; what it signs at decided heights convicts it, once."""
    desk = Desk()
    answers = [
        desk.take(vote(MEMBERS[3], VoteKind.NOTARIZE, (HEIGHT - 5, 1), digest("b", i.to_bytes(4, "big"))))
        for i in range(1000)
    ]
    assert [answer.action for answer in answers].count(Action.ACCEPT) == 1
    assert len(desk.watch) == 1
    assert MAX_VOTES <= 32_768


def test_the_largest_certificate_fits_its_bound() -> None:
    large = Certificate(VoteKind.FINALIZE, CHAIN, 2**63 - 1, 2**31, ZERO, bytes(32), (bytes(64),) * MAX_VALIDATORS)
    assert len(encode(large)) <= MAX_CERTIFICATE_BYTES


def transfer(key: PrivateKey, nonce: int, **changes: object) -> Transaction:
    body = Unsigned(VERSION, CHAIN, key.account, nonce, 0, 100, 0, b"", Transfer(MEMBERS[1].account, 1))
    return sign(key, structs.replace(body, **changes))


def junk(total: int, of: Transaction) -> Iterator[bytes]:
    """Yield gossip batches of `total` transactions in all, each different and each as false as `of`."""
    for start in range(0, total, BATCH):
        count = min(BATCH, total - start)
        bodies = [structs.replace(of.body, nonce=of.body.nonce + 1 + start + i) for i in range(count)]
        yield encode(tuple(encode(Transaction(body, of.signature)) for body in bodies))


async def test_a_hundred_thousand_junk_transactions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch is dropped at its first false transaction: one check a message, nothing kept."""
    checked = 0
    honest = Transaction.is_signed

    def counted(self: Transaction) -> bool:
        nonlocal checked
        checked += 1
        return honest(self)

    monkeypatch.setattr(Transaction, "is_signed", counted)
    transactions = Transactions(None, CHAIN)
    batches = list(junk(100_000, transfer(MEMBERS[0], 1)))
    assert len(batches) == -(-100_000 // BATCH)
    answers = {await take(transactions, batch, STATE) for batch in batches}
    assert answers == {Disposition(Action.REJECT, "bad-signature")}
    assert checked <= len(batches)
    assert len(transactions.mempool) == 0


async def test_transactions_that_break_the_form_are_refused_by_name() -> None:
    transactions, good = Transactions(None, CHAIN), transfer(MEMBERS[0], 0)
    raw = encode(good)
    cases: dict[str, list[bytes]] = {
        "malformed": [
            b"",
            b"\x90",
            encode((raw + b"\0",)),
            encode((raw.replace(b"\x00\x64", b"\x00\xcc\x64", 1),)),
            encode((raw,) * (BATCH + 1)),
            encode((bytes(200_000),)),
            encode(((((),),),)),
            b"\xdd\xff\xff\xff\xff",
        ],
        "bad-signature": [encode((encode(Transaction(good.body, bytes(64))),))],
        "wrong-chain": [encode((encode(transfer(MEMBERS[0], 0, chain_id=digest("other"))),))],
    }
    assert raw.count(b"\x00\x64") >= 1
    for reason, messages in cases.items():
        for data in messages:
            answer = await take(transactions, data, STATE)
            assert (answer.action, answer.reason) == (Action.REJECT, reason)
    assert len(transactions.mempool) == 0


async def test_a_flood_of_signed_transactions_stays_within_the_mempool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Transaction, "is_signed", lambda self: True)
    transactions = Transactions(None, CHAIN)
    for account in range(8):
        sender = PrivateKey(bytes([200 + account]) * 32)
        for batch in junk(2000, transfer(sender, 0)):
            await take(transactions, batch, STATE)
    assert len(transactions.mempool) <= 8 * 256
    assert sum(len(encode(each)) for each in transactions.mempool) <= DEFAULT_BYTES


async def test_an_engine_under_fire_goes_on(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    hub = Hub()
    members = keys(1)
    async with running(hub, tmp_path / "0", genesis_of(members, []), members[0]) as engine:
        for round_ in range(5):
            for message, _ in ATTACKS.values():
                data = message if isinstance(message, bytes) else encode(message)
                for topic in ("vote", "block"):
                    assert engine.deliver(topic, "hostile", data).action != Action.ACCEPT
                assert (await engine.take(data)).action != Action.ACCEPT
            await until_height(engine, round_ + 1)
        counts = engine.status()["messages"]
        assert counts["vote reject malformed"] >= 5
        assert counts["tx reject malformed"] >= 5
