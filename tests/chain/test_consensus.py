"""The rules of one height, one by one; the whole is tested in tests/simulation."""

from collections.abc import Iterable

import pytest
from msgspec import structs

from chain.blocks import (
    Block,
    Certificate,
    Header,
    Proposal,
    ValidatorSet,
    Vote,
    VoteKind,
    certify,
    proposal_subject,
    transactions_root,
)
from chain.codec import encode
from chain.consensus import (
    HORIZON,
    Accuse,
    Broadcast,
    Build,
    Consensus,
    Decide,
    Effect,
    HeightConfig,
    SetTimer,
    Sign,
    Timers,
    Validate,
    standstill,
)
from chain.consensus.standstill import LEAST_BYTES, STANDSTILL_BYTES
from chain.hashing import ZERO, digest
from chain.randomness import leader

CHAIN, SEED = digest("chain"), digest("seed")
ACCOUNTS = [digest("account", bytes([i])) for i in range(4)]
SET = ValidatorSet.of((account, 1) for account in ACCOUNTS)
PROPOSE, NOTARIZE, NULLIFY, FINALIZE = VoteKind


def led(view: int) -> bytes:
    return leader(SET, SEED, 1, view)


def others(*excluded: bytes) -> list[bytes]:
    return [account for account in ACCOUNTS if account not in excluded]


def vote(kind: VoteKind, view: int, block_hash: bytes, account: bytes) -> Vote:
    return Vote(kind, CHAIN, 1, view, block_hash, account, account * 2)


def certificate(kind: VoteKind, view: int, block_hash: bytes = ZERO) -> Certificate:
    return certify([vote(kind, view, block_hash, account) for account in ACCOUNTS[:3]], SET)


def block(view: int, salt: int = 0, proposer: bytes | None = None) -> Block:
    header = Header(CHAIN, 1, CHAIN, proposer or led(view), view, salt, transactions_root(()), *[ZERO] * 7)
    return Block(header, (), None)


def proposal(of: Block, view: int, parent_view: int = 0) -> Proposal:
    return Proposal(vote(PROPOSE, view, proposal_subject(of.hash, parent_view), led(view)), parent_view, of)


class Driver:
    """A machine whose validations succeed and whose signatures come at once; remembers everything."""

    def __init__(self, account: bytes | None, *restored: Vote, valid: bool = True) -> None:
        self.machine = Consensus(
            HeightConfig(CHAIN, 1, SET, SEED, account, Timers(1.0, 2.0, 8.0), restored_votes=restored)
        )
        self.valid = valid
        self.effects: list[Effect] = []
        self.do(self.machine.start())

    def do(self, effects: Iterable[Effect]) -> "Driver":
        for effect in effects:
            self.effects.append(effect)
            match effect:
                case Sign(unsigned, _):
                    self.do(self.machine.on_signed(structs.replace(unsigned, signature=unsigned.validator * 2)))
                case Validate(of):
                    self.do(self.machine.on_validated(of.hash, self.valid))
                case Build(view):
                    self.do(self.machine.on_built(view, block(view, salt=99)))
        return self

    def signed(self, kind: VoteKind) -> list[tuple[int, bytes]]:
        return [(e.vote.view, e.vote.block_hash) for e in self.effects if isinstance(e, Sign) and e.vote.kind == kind]

    def sent(self) -> list[object]:
        return [e.message for e in self.effects if isinstance(e, Broadcast)]


def test_the_leader_builds_proposes_and_notarizes() -> None:
    driver = Driver(led(1))
    fresh = block(1, salt=99)
    assert driver.signed(PROPOSE) == [(1, proposal_subject(fresh.hash, 0))]
    assert driver.signed(NOTARIZE) == [(1, fresh.hash)]
    assert SetTimer(1, 1.0) in driver.effects


def test_a_good_view_goes_from_proposal_to_decision() -> None:
    me = others(led(1))[0]
    driver, of = Driver(me), block(1)
    driver.do(driver.machine.on_proposal(proposal(of, 1)))
    assert driver.signed(NOTARIZE) == [(1, of.hash)]
    for account in others(me)[:2]:
        driver.do(driver.machine.on_vote(vote(NOTARIZE, 1, of.hash, account)))
    assert driver.machine.view == 2
    assert driver.signed(FINALIZE) == [(1, of.hash)]
    for account in others(me)[:2]:
        driver.do(driver.machine.on_vote(vote(FINALIZE, 1, of.hash, account)))
    decided = [e for e in driver.effects if isinstance(e, Decide)]
    assert [(d.block, d.certificate.kind) for d in decided] == [(of, FINALIZE)]
    kinds = [m.kind for m in driver.sent() if isinstance(m, Certificate)]
    assert kinds == [NOTARIZE, FINALIZE]


def test_one_notarization_a_view() -> None:
    driver = Driver(others(led(1))[0])
    driver.do(driver.machine.on_proposal(proposal(block(1, salt=1), 1)))
    driver.do(driver.machine.on_proposal(proposal(block(1, salt=2), 1)))
    assert driver.signed(NOTARIZE) == [(1, block(1, salt=1).hash)]
    accused = [e for e in driver.effects if isinstance(e, Accuse)]
    assert [(a.first.validator, a.first.kind) for a in accused] == [(led(1), PROPOSE)]


def test_the_timer_nullifies_once_and_ends_notarizing() -> None:
    driver = Driver(others(led(1))[0])
    driver.do(driver.machine.on_timer(1)).do(driver.machine.on_timer(1))
    driver.do(driver.machine.on_proposal(proposal(block(1), 1)))
    assert driver.signed(NULLIFY) == [(1, ZERO)]
    assert driver.signed(NOTARIZE) == []


def test_what_is_finalized_is_not_nullified() -> None:
    driver, of = Driver(others(led(1))[0]), block(1)
    driver.do(driver.machine.on_proposal(proposal(of, 1)))
    driver.machine.view = 1
    driver.do(driver.machine.on_certificate(certificate(NOTARIZE, 1, of.hash)))
    assert driver.signed(FINALIZE) == [(1, of.hash)]
    driver.machine.view = 1
    driver.do(driver.machine.on_timer(1))
    assert driver.signed(NULLIFY) == []


def test_what_is_nullified_is_not_finalized_but_still_advances() -> None:
    driver, of = Driver(others(led(1))[0]), block(1)
    driver.do(driver.machine.on_proposal(proposal(of, 1)))
    driver.do(driver.machine.on_timer(1))
    driver.do(driver.machine.on_certificate(certificate(NOTARIZE, 1, of.hash)))
    assert driver.signed(FINALIZE) == []
    assert driver.machine.view == 2


def test_another_block_than_i_notarized_is_not_finalized() -> None:
    driver = Driver(others(led(1))[0])
    driver.do(driver.machine.on_proposal(proposal(block(1, salt=1), 1)))
    driver.do(driver.machine.on_certificate(certificate(NOTARIZE, 1, block(1, salt=2).hash)))
    assert driver.signed(FINALIZE) == []


def test_the_leaders_own_nullification_ends_the_view_early() -> None:
    me = others(led(1))[0]
    driver = Driver(me)
    driver.do(driver.machine.on_vote(vote(NULLIFY, 1, ZERO, led(1))))
    assert driver.signed(NULLIFY) == [(1, ZERO)]
    early = Driver(others(led(2))[0])
    early.do(early.machine.on_vote(vote(NULLIFY, 2, ZERO, led(2))))
    early.do(early.machine.on_certificate(certificate(NULLIFY, 1)))
    assert (2, ZERO) in early.signed(NULLIFY)


def test_an_invalid_proposal_is_nullified() -> None:
    driver = Driver(others(led(1))[0], valid=False)
    driver.do(driver.machine.on_proposal(proposal(block(1), 1)))
    assert driver.signed(NULLIFY) == [(1, ZERO)]


def test_rules_of_a_proposal() -> None:
    me = others(led(1), led(2))[0]
    old = block(1)

    def after(*certificates: Certificate, of: Proposal) -> Driver:
        driver = Driver(me)
        for held in certificates:
            driver.do(driver.machine.on_certificate(held))
        return driver.do(driver.machine.on_proposal(of))

    nullified, notarized = certificate(NULLIFY, 1), certificate(NOTARIZE, 1, old.hash)
    fresh = block(2)
    assert after(nullified, of=proposal(fresh, 2)).signed(NOTARIZE) == [(2, fresh.hash)]
    assert after(notarized, of=proposal(old, 2, 1)).signed(NOTARIZE) == [(2, old.hash)]
    assert (2, ZERO) in after(notarized, of=proposal(block(1, salt=3), 2, 1)).signed(NULLIFY)
    assert (2, ZERO) in after(nullified, of=proposal(fresh, 2, 2)).signed(NULLIFY)
    assert (2, ZERO) in after(nullified, of=proposal(old, 2)).signed(NULLIFY)
    stolen = block(2, proposer=others(led(2))[1])
    assert (2, ZERO) in after(nullified, of=proposal(stolen, 2)).signed(NULLIFY)
    waiting = after(notarized, of=proposal(fresh, 2))
    assert waiting.signed(NOTARIZE) == []
    waiting.do(waiting.machine.on_certificate(nullified))
    assert waiting.signed(NOTARIZE) == [(2, fresh.hash)]


def test_a_leader_proposes_the_highest_notarized_block_again() -> None:
    driver, old = Driver(led(3)), block(1)
    driver.do(driver.machine.on_certificate(certificate(NULLIFY, 2)))
    assert driver.machine.view == 3
    assert driver.signed(PROPOSE) == []
    driver.do(driver.machine.on_certificate(certificate(NOTARIZE, 1, old.hash)))
    assert driver.signed(PROPOSE) == []
    driver.do(driver.machine.on_proposal(proposal(old, 1)))
    assert driver.signed(PROPOSE) == [(3, proposal_subject(old.hash, 1))]


def test_a_higher_certificate_is_jumped_to_and_sent_on() -> None:
    driver = Driver(ACCOUNTS[0])
    jump = certificate(NULLIFY, 40)
    driver.do(driver.machine.on_certificate(jump))
    assert driver.machine.view == 41
    assert jump in driver.sent()
    assert SetTimer(41, 8.0) in driver.effects


def test_votes_beyond_the_horizon_are_not_kept() -> None:
    driver = Driver(ACCOUNTS[0])
    far = vote(NULLIFY, HORIZON + 2, ZERO, ACCOUNTS[1])
    driver.do(driver.machine.on_vote(far))
    assert driver.machine.tally.vote_of(far.view, NULLIFY, ACCOUNTS[1]) is None


def test_a_finalization_waits_for_its_block() -> None:
    driver, of = Driver(None), block(1)
    driver.do(driver.machine.on_certificate(certificate(FINALIZE, 1, of.hash)))
    assert driver.machine.finalization is not None
    assert not driver.machine.is_over
    driver.do(driver.machine.on_proposal(proposal(of, 1)))
    assert [e.block for e in driver.effects if isinstance(e, Decide)] == [of]
    assert not any(isinstance(e, Sign) for e in driver.effects)


def test_contradicting_certificates_name_their_common_signers() -> None:
    driver = Driver(None)
    driver.do(driver.machine.on_certificate(certificate(FINALIZE, 1, block(1, salt=1).hash)))
    driver.do(driver.machine.on_certificate(certificate(FINALIZE, 1, block(1, salt=2).hash)))
    accused = {e.first.validator for e in driver.effects if isinstance(e, Accuse)}
    assert accused == set(ACCOUNTS[:3])


def test_a_restart_repeats_what_was_signed_and_nothing_else() -> None:
    me, of = others(led(1))[0], block(1)
    mine = vote(NOTARIZE, 1, of.hash, me)
    driver = Driver(me, mine)
    assert mine in driver.sent()
    driver.do(driver.machine.on_proposal(proposal(block(1, salt=5), 1)))
    assert driver.signed(NOTARIZE) == []
    own = Driver(led(1), vote(PROPOSE, 1, digest("lost"), led(1)))
    assert not any(isinstance(e, Build) for e in own.effects)


def test_one_who_is_late_attends_what_others_finalized() -> None:
    me, of = others(led(1))[0], block(1)
    driver = Driver(me)
    driver.do(driver.machine.on_certificate(certificate(FINALIZE, 1, of.hash)))
    driver.do(driver.machine.on_proposal(proposal(of, 1)))
    assert driver.signed(FINALIZE) == [(1, of.hash)]
    refused = Driver(me).do([])
    refused.do(refused.machine.on_timer(1))
    refused.do(refused.machine.on_certificate(certificate(FINALIZE, 1, of.hash)))
    refused.do(refused.machine.on_proposal(proposal(of, 1)))
    assert refused.signed(FINALIZE) == []


def test_standstill_is_capped_and_comes_round_to_everything() -> None:
    driver = Driver(ACCOUNTS[0])
    held = [certificate(NULLIFY, view) for view in range(1, 900)]
    for one in held:
        driver.do(driver.machine.on_certificate(one))
    seen: set[bytes] = set()
    for _ in range(20):
        sent = [encode(e.message) for e in driver.machine.on_standstill() if isinstance(e, Broadcast)]
        assert sum(map(len, sent)) <= STANDSTILL_BYTES
        seen.update(sent)
    assert {encode(one) for one in held} <= seen


def test_standstill_begins_with_the_newest_certificate_and_the_votes_that_count() -> None:
    driver = Driver(others(led(41))[0])
    for view in range(1, 41):
        driver.do(driver.machine.on_timer(view)).do(driver.machine.on_certificate(certificate(NULLIFY, view)))
    driver.do(driver.machine.on_timer(41))
    sent = [e.message for e in driver.machine.on_standstill() if isinstance(e, Broadcast)]
    assert [(m.kind, m.view) for m in sent[:2] if isinstance(m, Certificate | Vote)] == [(NULLIFY, 40), (NULLIFY, 41)]
    assert [m.view for m in sent if isinstance(m, Vote)] == [41]


def test_only_so_many_large_proposals_are_said_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    proposals = [proposal(block(view), view) for view in (1, 2, 3)]
    size = len(encode(proposals[0]))
    for limit, expected in ((3 * size, 3), (2 * size, 2), (1, 1)):
        monkeypatch.setattr(standstill, "PROPOSAL_BYTES", limit)
        turns = standstill.Standstill(0, 4)
        rounds = [turns.messages({}, {}, proposals) for _ in range(3)]
        assert [len(sent) for sent in rounds] == [expected] * 3
        assert {encode(sent) for turn in rounds for sent in turn} == set(map(encode, proposals))


def crowd_certificate(members: ValidatorSet, view: int) -> Certificate:
    accounts = [account for account, _ in members.members][: members.quorum]
    return certify([vote(NULLIFY, view, ZERO, account) for account in accounts], members)


def lateness(members: ValidatorSet, sources: int) -> tuple[int, int]:
    """How many standstills of `sources` others a late peer needs to take up view 101, and the most bytes of one."""
    held = {(view, NULLIFY): crowd_certificate(members, view) for view in range(1, 101)}
    turns = [standstill.Standstill(place, len(members)) for place in range(sources)]
    proposer, late = (
        leader(members, SEED, 1, 101),
        Consensus(HeightConfig(CHAIN, 1, members, SEED, members.members[-1][0])),
    )
    of, most = block(101, proposer=proposer), 0
    late.start()
    late.on_certificate(held[100, NULLIFY])
    late.on_proposal(Proposal(vote(PROPOSE, 101, proposal_subject(of.hash, 0), proposer), 0, of))
    effects: list[Effect] = []
    for number in range(1, 100):
        for turn in turns:
            sent = turn.messages(held, {}, [])
            most = max(most, sum(len(encode(message)) for message in sent))
            for message in sent:
                assert isinstance(message, Certificate)
                effects += late.on_certificate(message)
        if Validate(of) in effects:
            return number, most
    raise AssertionError("never")


@pytest.mark.parametrize(("sources", "bound"), [(1, 25), (4, 10), (20, 3), (134, 1)])
def test_a_late_peer_among_200_catches_up_on_100_nullified_views(sources: int, bound: int) -> None:
    members = ValidatorSet.of((digest("crowd", bytes([i])), 1) for i in range(200))
    standstills, most = lateness(members, sources)
    assert standstills <= bound
    assert most <= LEAST_BYTES


def test_a_closed_machine_signs_nothing_and_still_accuses() -> None:
    driver = Driver(others(led(1))[0])
    driver.machine.close()
    driver.do(driver.machine.on_proposal(proposal(block(1), 1))).do(driver.machine.on_timer(1))
    assert not any(isinstance(e, Sign) for e in driver.effects)
    for salt in (1, 2):
        driver.do(driver.machine.on_vote(vote(NOTARIZE, 1, block(1, salt=salt).hash, led(1))))
    assert sum(isinstance(e, Accuse) for e in driver.effects) == 1


def test_hopeless_views_do_not_race() -> None:
    driver = Driver(others(led(6))[0], valid=False)
    driver.do(driver.machine.on_certificate(certificate(NULLIFY, 5)))
    driver.do(driver.machine.on_proposal(proposal(block(6), 6)))
    driver.do(driver.machine.on_vote(vote(NULLIFY, 6, ZERO, led(6))))
    assert driver.machine.view == 6
    assert (6, ZERO) not in driver.signed(NULLIFY)
    driver.do(driver.machine.on_timer(6))
    assert (6, ZERO) in driver.signed(NULLIFY)


def test_a_block_refused_once_is_looked_at_again_when_a_quorum_has_notarized_it() -> None:
    me = others(led(1), led(2))[0]
    driver, of = Driver(me, valid=False), block(1)
    driver.do(driver.machine.on_proposal(proposal(of, 1)))
    assert driver.signed(NULLIFY) == [(1, ZERO)]
    driver.do(driver.machine.on_certificate(certificate(NOTARIZE, 1, of.hash)))
    driver.valid = True  # its timestamp was ahead of this peer's clock, which has moved on
    driver.do(driver.machine.on_proposal(proposal(of, 2, parent_view=1)))
    assert driver.signed(NOTARIZE) == [(2, of.hash)]


@pytest.mark.parametrize("views", [1, HORIZON + 2])
def test_a_notarized_block_that_nobody_has_is_passed_over_once_its_view_is_nullified(views: int) -> None:
    driver = Driver(led(views + 1))
    for view in range(1, views + 1):
        driver.do(driver.machine.on_certificate(certificate(NULLIFY, view)))
    late = Driver(led(views + 1))
    late.do(late.machine.on_certificate(certificate(NOTARIZE, 1, block(1).hash)))
    for view in range(1, views + 1):
        late.do(late.machine.on_certificate(certificate(NULLIFY, view)))
    assert late.machine.view == driver.machine.view == views + 1
    assert late.signed(PROPOSE)[-1] == driver.signed(PROPOSE)[-1]
