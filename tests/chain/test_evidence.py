"""Evidence: what convicts, whom, how often it is sent, and what it costs to remember votes."""

from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trio
import trio.testing
from msgspec import structs

from chain import evidence as rules
from chain.blocks import (
    Block,
    Certificate,
    ConsensusMessage,
    Reason,
    Refused,
    ValidatorSet,
    Vote,
    VoteKind,
    certify,
    is_conflict,
    vote_bytes,
)
from chain.codec import decode, encode
from chain.engine import Action, ChainEngine
from chain.engine_gate import ACCEPTED, Disposition
from chain.engine_seam import SubmitRefused, TransactionExpired
from chain.evidence import MAX_RANK, MAX_VOTES, TURN_BLOCKS, WINDOW, Watch
from chain.hashing import ZERO, digest
from chain.keys import PrivateKey, verify
from chain.ledger import Receipt
from chain.records import Rotation
from chain.state import Rows, State, Table, genesis_state
from chain.sync import FinalBlock, StatusReply, StatusRequest, decode_request, pack_range
from chain.transactions import Evidence, Payload
from tests.chain.hub import Hub, genesis_of, keys, running, until_height

MEMBERS = keys(4)
GENESIS = genesis_of(MEMBERS, [])
STATE = genesis_state(GENESIS)
CHAIN = GENESIS.chain_id
SET = STATE.validators()
OTHER = digest("another block")


def vote(key: PrivateKey, kind: VoteKind, height: int, block: bytes = ZERO, view: int = 1) -> Vote:
    said = (kind, CHAIN, height, view, block)
    return Vote(*said, key.account, key.sign(vote_bytes(*said)))


def certificate(kind: VoteKind, height: int, block: bytes, signers: list[PrivateKey]) -> Certificate:
    return certify([vote(key, kind, height, block) for key in signers], SET)


class Ledger:
    """Own transactions whose fate the test decides."""

    def __init__(self) -> None:
        self.sent: list[Evidence] = []
        self.waiting: list[Evidence] = []
        self.answers: Receipt | Exception | None = None
        self.refuses = False

    def submit(self, payload: Payload, state: State) -> bytes:
        if self.refuses:
            raise SubmitRefused("no-key")
        assert isinstance(payload, Evidence)
        self.sent.append(payload)
        return digest("tx", bytes([len(self.sent)]))

    def answer(self, tx_id: bytes) -> Receipt | None:
        if isinstance(self.answers, Exception):
            raise self.answers
        return self.answers

    def evidence(self) -> Iterator[Evidence]:
        return iter(self.waiting)


def watch_of(account: bytes | None = None, heights: int = 5) -> Watch:
    watch = Watch(verify, account)
    for height in range(1, heights + 1):
        watch.cover(height, SET)
    return watch


def at(height: int, tombstoned: bytes = b"") -> State:
    """Return the genesis state at another height, with one validator punished."""
    validators = Rows(STATE.tables[Table.VALIDATORS])
    if tombstoned:
        validators[tombstoned] = structs.replace(validators[tombstoned], is_tombstoned=True)
    chain = Rows({b"": structs.replace(STATE.chain, height=height)})
    return State(STATE.tables | {Table.CHAIN: chain, Table.VALIDATORS: validators}, STATE.tree)


def _vote(data: bytes) -> Vote:
    return decode(Vote, data)


def culprits(sent: list[Evidence]) -> list[bytes]:
    found = []
    for item in sent:
        first, second = _vote(item.first), _vote(item.second)
        assert is_conflict(first, second)
        assert all(verify(v.validator, v.signing_bytes, v.signature) for v in (first, second))
        found.append(first.validator)
    return found


def test_conflicts_are_found_between_votes_and_certificates_of_any_covered_height() -> None:
    twin = MEMBERS[3]
    finalized = certificate(VoteKind.FINALIZE, 2, OTHER, [MEMBERS[0], MEMBERS[1], twin])
    foreign = certificate(VoteKind.FINALIZE, 2, digest("fork"), [MEMBERS[2], twin])
    pairs: list[tuple[ConsensusMessage, ConsensusMessage]] = [
        (vote(twin, VoteKind.NOTARIZE, 2, OTHER), vote(twin, VoteKind.NOTARIZE, 2, digest("fork"))),
        (finalized, vote(twin, VoteKind.NULLIFY, 2)),
        (vote(twin, VoteKind.NULLIFY, 2), finalized),
        (finalized, foreign),
        (vote(twin, VoteKind.PROPOSE, 2, OTHER), vote(twin, VoteKind.PROPOSE, 2, digest("fork"))),
        (vote(twin, VoteKind.NOTARIZE, 2, digest("fork")), finalized),
    ]
    for first, second in pairs:
        watch, ledger = watch_of(), Ledger()
        assert not watch.examine(first)
        assert watch.examine(second)
        assert watch.has_news
        assert watch.pursue(at(19), ledger)
        assert culprits(ledger.sent) == [twin.account]
        assert not watch.examine(vote(twin, VoteKind.NOTARIZE, 3, OTHER))
        watch.examine(vote(twin, VoteKind.NOTARIZE, 3, digest("fork")))
        watch.pursue(at(20), ledger)
        assert len(ledger.sent) == 1


def test_what_an_honest_validator_signs_never_convicts_it() -> None:
    honest, watch = MEMBERS[0], watch_of()
    for view in range(1, 9):
        for kind, block in ((VoteKind.NOTARIZE, OTHER), (VoteKind.NULLIFY, ZERO)):
            assert not watch.examine(vote(honest, kind, 3, block, view))
    for _ in range(2):
        assert not watch.examine(vote(honest, VoteKind.NOTARIZE, 4, OTHER))
        assert not watch.examine(vote(honest, VoteKind.FINALIZE, 4, OTHER))
    assert not watch.has_news


def test_forged_votes_and_strangers_accuse_nobody() -> None:
    watch, victim = watch_of(), MEMBERS[0]
    watch.examine(vote(victim, VoteKind.FINALIZE, 2, OTHER))
    forged = structs.replace(vote(MEMBERS[1], VoteKind.NULLIFY, 2), validator=victim.account)
    foreign = certificate(VoteKind.FINALIZE, 2, digest("fork"), MEMBERS[1:])
    forged_certificate = structs.replace(foreign, signers=bytes([0b0111]))
    stranger = vote(PrivateKey(bytes([77]) * 32), VoteKind.NULLIFY, 2)
    empty = vote(victim, VoteKind.NOTARIZE, 2, ZERO)
    short = structs.replace(foreign, signatures=foreign.signatures[:2])
    cases: dict[Reason, list[ConsensusMessage]] = {
        Reason.UNKNOWN_VALIDATOR: [stranger],
        Reason.BAD_SIGNATURE: [forged, forged_certificate],
        Reason.WRONG_BLOCK: [empty],
        Reason.BAD_BITMAP: [short, structs.replace(foreign, signers=bytes([0xF1]))],
    }
    for reason, messages in cases.items():
        for message in messages:
            with pytest.raises(Refused) as refusal:
                watch.examine(message)
            assert refusal.value.reason == reason
    assert not watch.has_news
    assert not watch.examine(vote(victim, VoteKind.NULLIFY, 99))


def test_own_votes_are_not_turned_against_oneself() -> None:
    watch = watch_of(MEMBERS[3].account)
    watch.examine(vote(MEMBERS[3], VoteKind.NULLIFY, 2))
    assert not watch.examine(vote(MEMBERS[3], VoteKind.FINALIZE, 2, OTHER))


def convicting(account: bytes | None = None) -> Watch:
    watch = watch_of(account)
    watch.examine(vote(MEMBERS[3], VoteKind.NULLIFY, 2))
    assert watch.examine(vote(MEMBERS[3], VoteKind.FINALIZE, 2, OTHER))
    return watch


def test_evidence_is_sent_again_until_the_ledger_knows() -> None:
    watch, ledger = convicting(), Ledger()
    ledger.refuses = True
    assert not watch.pursue(at(19), ledger)
    ledger.refuses = False
    assert watch.pursue(at(19), ledger)
    assert not watch.pursue(at(20), ledger)
    for lost in (TransactionExpired("late"), LookupError("forgotten")):
        ledger.answers = lost
        assert watch.pursue(at(21), ledger)
        ledger.answers = None
    ledger.answers = Receipt(b"", "")
    assert not watch.pursue(at(22), ledger)
    assert not watch.pursue(at(23, MEMBERS[3].account), ledger)
    ledger.answers = TransactionExpired("late")
    assert not watch.pursue(at(24), ledger)
    assert len(ledger.sent) == 3


def test_evidence_that_the_ledger_refuses_is_not_sent_for_ever() -> None:
    watch, ledger = convicting(), Ledger()
    watch.pursue(at(19), ledger)
    ledger.answers = Receipt(b"", "evidence-known")
    watch.pursue(at(20), ledger)
    ledger.answers = None
    watch.pursue(at(21), ledger)
    assert len(ledger.sent) == 1


def test_evidence_that_comes_too_early_is_sent_again() -> None:
    watch, ledger = convicting(), Ledger()
    watch.pursue(at(19), ledger)
    ledger.answers = Receipt(b"", "evidence-early")
    assert watch.pursue(at(20), ledger)
    assert len(ledger.sent) == 2


def test_a_key_that_was_rotated_since_is_pursued_through_its_heir() -> None:
    watch, ledger = convicting(), Ledger()
    old, heir = MEMBERS[3].account, PrivateKey(bytes([50]) * 32).account

    def rotated(height: int, *, tombstoned: bool) -> State:
        state = at(height)
        validators = Rows(state.tables[Table.VALIDATORS])
        validators[heir] = structs.replace(validators.pop(old), is_tombstoned=tombstoned)
        rotations = Rows({old: Rotation(old, heir, 7), heir: Rotation(old, heir)})
        return State(state.tables | {Table.VALIDATORS: validators, Table.ROTATIONS: rotations}, state.tree)

    assert watch.pursue(rotated(19, tombstoned=False), ledger)
    watch.pursue(rotated(20, tombstoned=True), ledger)
    ledger.answers = TransactionExpired("late")
    assert not watch.pursue(rotated(21, tombstoned=True), ledger)


def test_reporters_take_turns_and_wait_for_the_sound_evidence_of_others() -> None:
    accounts = [key.account for key in MEMBERS[:3]]
    turns = {}
    for account in accounts:
        watch, ledger = convicting(account), Ledger()
        turns[account] = next(height for height in range(4, 12) if watch.pursue(at(height), ledger))
    assert sorted(turns.values()) == [4, 4 + TURN_BLOCKS, 4 + 2 * TURN_BLOCKS]
    pair = (vote(MEMBERS[3], VoteKind.NULLIFY, 2), vote(MEMBERS[3], VoteKind.FINALIZE, 2, OTHER))
    watch, ledger = convicting(), Ledger()
    ledger.waiting = [Evidence(encode(pair[0]), encode(pair[1]))]
    assert not watch.pursue(at(20), ledger)
    false = structs.replace(pair[0], signature=bytes(64))
    ledger.waiting = [Evidence(encode(false), encode(pair[1])), Evidence(b"", b"\xff")]
    assert watch.pursue(at(20), ledger)
    assert convicting(None).pursue(at(4 + TURN_BLOCKS * MAX_RANK), Ledger())


def test_memory_is_bounded_and_a_flood_costs_only_its_signer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "MAX_VOTES", 200)
    watch, twin = watch_of(), MEMBERS[3]
    for key in MEMBERS[:3]:
        watch.examine(vote(key, VoteKind.FINALIZE, 2, OTHER))
    for view in range(1, 300):
        watch.examine(vote(twin, VoteKind.NULLIFY, 5, view=view))
    assert len(watch) <= 200
    assert watch.examine(vote(MEMBERS[0], VoteKind.NULLIFY, 2))
    assert MAX_VOTES * 1024 <= 32 << 20


def test_heights_leave_the_window() -> None:
    watch = Watch(verify)
    for height in range(1, 2 * WINDOW + 1):
        watch.cover(height, ValidatorSet(SET.members))
        if height < 10:
            watch.examine(vote(MEMBERS[0], VoteKind.NULLIFY, height))
    assert not watch.covers(WINDOW - 1)
    assert watch.covers(WINDOW)
    assert len(watch) == 0


async def blocks_with_evidence(engine: ChainEngine, blocks: int) -> list[Evidence]:
    found: list[Evidence] = []
    async with engine.subscribe() as committed:
        for _ in range(blocks):
            block = (await committed.receive()).block
            found += [tx.body.payload for tx in block.transactions if isinstance(tx.body.payload, Evidence)]
    return found


async def test_a_vote_of_a_past_height_convicts_once_on_a_running_chain(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    hub, twin = Hub(), MEMBERS[3]
    async with AsyncExitStack() as stack:
        engines = [
            await stack.enter_async_context(running(hub, tmp_path / str(i), GENESIS, key))
            for i, key in enumerate(MEMBERS)
        ]
        await until_height(engines[0], 12)
        answers = [engine.deliver("vote", "x", encode(vote(twin, VoteKind.NULLIFY, 4))) for engine in engines[:3]]
        assert {answer.action for answer in answers} == {Action.ACCEPT}
        again = engines[0].deliver("vote", "x", encode(vote(twin, VoteKind.NULLIFY, 4)))
        assert again.reason == "past-height"
        with trio.fail_after(120):
            found = await blocks_with_evidence(engines[1], 6)
        assert culprits(found) == [twin.account]
        validator = engines[0].state.validator(twin.account)
        assert validator is not None
        assert validator.is_tombstoned
        assert hub.refused == []


async def test_the_stored_certificates_convict_after_a_restart(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    hub = Hub()

    async def start(stack: AsyncExitStack) -> list[ChainEngine]:
        return [
            await stack.enter_async_context(running(hub, tmp_path / str(i), GENESIS, key))
            for i, key in enumerate(MEMBERS)
        ]

    async with AsyncExitStack() as stack:
        await until_height((await start(stack))[0], 8)
    async with AsyncExitStack() as stack:
        engines = await start(stack)
        stored = engines[1].reader.store.block(5)
        assert stored is not None
        signers = stored[1].accounts(SET)
        # Each peer stores the certificate that it saw, and nobody reports itself: the twin signed another's.
        twin = next(key for key in MEMBERS if key.account in signers and key is not MEMBERS[1])
        late = encode(vote(twin, VoteKind.NULLIFY, 5, view=stored[1].view))
        for engine in engines:
            engine.deliver("vote", "x", late)
        with trio.fail_after(120):
            found = await blocks_with_evidence(engines[1], 6)
        # Who starts a block behind takes its turn early: a second report may cross the first one.
        assert set(culprits(found)) == {twin.account}
        assert len(engines[1].state.tables[Table.CONVICTIONS]) == 1


async def test_a_case_survives_a_restart_before_the_ledger_has_it(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    hub, twin = Hub(), MEMBERS[3]

    async def start(stack: AsyncExitStack) -> list[ChainEngine]:
        return [
            await stack.enter_async_context(running(hub, tmp_path / str(i), GENESIS, key))
            for i, key in enumerate(MEMBERS)
        ]

    async with AsyncExitStack() as stack:
        engines = await start(stack)
        await until_height(engines[0], 4)
        for engine in engines[:3]:
            engine.deliver("vote", "x", encode(vote(twin, VoteKind.NULLIFY, 2, view=9)))
            engine.deliver("vote", "x", encode(vote(twin, VoteKind.FINALIZE, 2, OTHER, view=9)))
        await trio.sleep(0.01)
        assert not any(engine.state.tables[Table.CONVICTIONS] for engine in engines)
    async with AsyncExitStack() as stack:
        engines = await start(stack)
        with trio.fail_after(120):
            found = await blocks_with_evidence(engines[1], 6)
        # Who starts a block behind takes its turn early: a second report may cross the first one.
        assert set(culprits(found)) == {twin.account}
        assert len(engines[1].state.tables[Table.CONVICTIONS]) == 1


class Liar:
    """A peer on the hub that serves one block of another chain."""

    def __init__(self, final: FinalBlock) -> None:
        self.final = final

    def deliver(self, topic: str, sender: str, data: bytes) -> Disposition:
        return ACCEPTED

    async def take(self, data: bytes) -> Disposition:
        return ACCEPTED

    async def serve(self, sender: str, data: bytes) -> bytes:
        if isinstance(decode_request(data, CHAIN), StatusRequest):
            return encode(StatusReply(self.final.block.height, self.final.block.hash, 1))
        return pack_range([(encode(self.final.block), encode(self.final.certificate))])


async def test_a_fork_served_in_sync_convicts_who_signed_both(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    hub = Hub()
    async with AsyncExitStack() as stack:
        engines = [
            await stack.enter_async_context(running(hub, tmp_path / str(i), GENESIS, key))
            for i, key in enumerate(MEMBERS)
        ]
        await until_height(engines[0], 5)
        async with engines[0].subscribe() as committed:
            last = await committed.receive()
        twin = next(key for key in MEMBERS if key.account == last.certificate.accounts(SET)[0])
        height, view = last.block.height, last.certificate.view
        foreign = certify([vote(twin, VoteKind.FINALIZE, height, OTHER, view)], SET)
        header = structs.replace(
            last.block.header, height=height + 1, parent=OTHER, certificate_hash=foreign.hash, transactions_root=ZERO
        )
        fork = FinalBlock(Block(header, (), foreign), foreign)
        hub.engines["liar"] = Liar(fork)  # type: ignore[assignment]
        hub.engines = {"liar": hub.engines.pop("liar"), **hub.engines}
        async with engines[1].subscribe() as committed:
            with trio.fail_after(120):
                found: list[Evidence] = []
                while not found:
                    block = (await committed.receive()).block
                    found = [tx.body.payload for tx in block.transactions if isinstance(tx.body.payload, Evidence)]
        assert culprits(found) == [twin.account]
        assert {peer for peer, _ in hub.penalized} == {"liar"}
