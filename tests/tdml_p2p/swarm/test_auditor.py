"""The auditor answers every duty in its time, and nothing that goes wrong in one audit reaches another."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import msgspec
import pytest
import torch
import trio
import trio.testing

from chain.keys import PrivateKey, peer_id
from chain.records import Audit, AuditStatus, Voter
from chain.transactions import MAX_TOLERANCE, Commitment, Opening, Reveal, reveal_commitment
from chain.verdicts import Ballot, ballot, is_blank
from tdml_p2p.swarm.inputs import (
    Descriptor,
    Senders,
    Wanted,
    decode_descriptor,
    encode,
    expected_messages,
    signed_input,
)
from tdml_p2p.swarm.material import Unavailable
from tdml_p2p.swarm.reexecution import Execution
from tests.tdml_p2p.swarm import audit_samples
from tests.tdml_p2p.swarm.audit_samples import (
    MANIFEST,
    ME,
    TASK,
    WORKER,
    Bench,
    altered,
    audit_of,
    execution_of,
    name_of,
    opening_of,
    opening_off,
    status,
)
from tests.tdml_p2p.swarm.session_kit import without_threads
from trainer.content import address_of
from trainer.tensors import buffer_of

CLIENT = PrivateKey(bytes([8]) * 32)


@pytest.fixture(autouse=True)
def _inline() -> Iterator[None]:
    """Do the work of threads at once: virtual time does not wait for threads."""
    with without_threads():
        yield


@asynccontextmanager
async def running(bench: Bench) -> AsyncIterator[Bench]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.auditor.run)
        yield bench
        nursery.cancel_scope.cancel()


def committed(cell: int) -> Audit:
    return audit_of(cell, status=status(AuditStatus.COMMITTED))


def opened(cell: int, opening: Opening) -> Audit:
    return audit_of(cell, status=status(AuditStatus.OPENED), opening=opening)


def owed_opening(cell: int) -> Audit:
    """Return an audit in which this account is the worker, who has to open."""
    return audit_of(cell, status=status(AuditStatus.COMMITTED), worker=ME, auditor=WORKER)


async def revealed(bench: Bench, opening: Opening, seconds: float = 0.0) -> Reveal:
    """Commit to cell 0, show its opening and return the reveal, which may take some seconds."""
    async with running(bench):
        bench.show(audit_of(0))
        await trio.testing.wait_all_tasks_blocked()
        bench.show(opened(0, opening))
        await trio.testing.wait_all_tasks_blocked()
        await trio.sleep(seconds)
    (reveal,) = bench.reveals()
    return reveal


async def test_a_commitment_is_made_while_the_window_is_open(autojump_clock: trio.testing.MockClock) -> None:
    bench = Bench()
    bench.reexecutor.seconds = {0: 6.5}
    async with running(bench):
        bench.show(audit_of(0, deadline=10))
        await bench.pass_blocks(12)
    assert bench.commitments() == [name_of(0)]
    assert bench.outbox.heights == [7]


async def test_a_duty_whose_window_closed_while_it_waited_is_not_begun(
    autojump_clock: trio.testing.MockClock,
) -> None:
    bench = Bench()
    bench.reexecutor.seconds = {0: 6.5}
    async with running(bench):
        bench.show(audit_of(0, deadline=20), audit_of(1, deadline=5), audit_of(2, deadline=20))
        await bench.pass_blocks(12)
    assert bench.reexecutor.started == [0, 2]
    assert bench.commitments() == [name_of(0), name_of(2)]


async def test_nothing_is_revealed_before_the_worker_has_opened() -> None:
    bench = Bench()
    async with running(bench):
        bench.show(audit_of(0))
        await trio.testing.wait_all_tasks_blocked()
        bench.show(committed(0))
        await trio.testing.wait_all_tasks_blocked()
        assert not bench.reveals()
        bench.show(opened(0, opening_of(0)))
        await trio.testing.wait_all_tasks_blocked()
    assert len(bench.reveals()) == 1


async def test_a_voter_reveals_only_after_the_commit_window() -> None:
    bench = Bench()
    key = bytes([4]) * 32
    me, other = Voter(account=ME, power=1), Voter(account=WORKER, power=1)
    voting = audit_of(
        0,
        status=status(AuditStatus.VOTING),
        auditor=WORKER,
        opening=opening_of(0),
        dispute_seed=key,
        voters=(me, other),
    )
    async with running(bench):
        bench.show(voting)
        await trio.testing.wait_all_tasks_blocked()
        (commitment,) = bench.outbox.entries
        assert isinstance(commitment, Commitment)
        done = msgspec.structs.replace(me, commitment=commitment.digest)
        waiting = msgspec.structs.replace(voting, voters=(done, other))
        bench.show(waiting)
        await trio.testing.wait_all_tasks_blocked()
        assert not bench.reveals()
        bench.show(msgspec.structs.replace(waiting, is_revealing=True))
        await trio.testing.wait_all_tasks_blocked()
    (reveal,) = bench.reveals()
    assert reveal.round == commitment.round == 2
    assert reveal_commitment(ME, reveal) == commitment.digest
    assert reveal.shared == execution_of(0).sketch(voting.key)
    assert reveal.own != reveal.shared


async def test_a_reveal_is_what_was_committed_to() -> None:
    bench = Bench()
    reveal = await revealed(bench, opening_of(0))
    (commitment,) = (entry for entry in bench.outbox.entries if isinstance(entry, Commitment))
    assert reveal_commitment(ME, reveal) == commitment.digest
    assert reveal.shared == reveal.own == execution_of(0).sketch(audit_of(0).key)
    assert not reveal.contradiction


async def test_nothing_is_revealed_without_a_commitment() -> None:
    bench = Bench()
    async with running(bench):
        bench.show(opened(0, opening_of(0)))
        await trio.testing.wait_all_tasks_blocked()
    assert not bench.outbox.entries


@pytest.mark.parametrize("name", ["x", "gy"])
async def test_other_inputs_than_were_signed_for_are_a_contradiction(name: str) -> None:
    assert (await revealed(Bench(), opening_of(0, **{name: bytes(32)}))).contradiction


@pytest.mark.parametrize("name", ["x", "gy"])
async def test_an_auditor_shows_the_input_that_it_was_given_in_place_of_an_opened_one(name: str) -> None:
    reveal = await revealed(Bench(), opening_of(0, **{name: bytes(32)}))
    x, gy = execution_of(0).inputs.x, execution_of(0).inputs.gy
    assert decode_descriptor(reveal.shown) == (Descriptor(x, None) if name == "x" else Descriptor(None, gy))


async def test_an_auditor_that_finds_only_results_to_differ_has_nothing_to_show() -> None:
    bench, claimed = Bench(), altered(0, -1.0)
    bench.reexecutor.blobs[address_of(claimed)] = claimed
    reveal = await revealed(bench, opening_of(0, y=address_of(claimed)))
    assert (reveal.contradiction, reveal.shown) == (True, b"")


def signed_x(key: PrivateKey, cell: int = 0, address: bytes = bytes(32)) -> bytes:
    """Return an x of a cell that somebody signed for, as an auditor shows it."""
    x, _ = expected_messages(Wanted(TASK, 0, 1, 0, cell), MANIFEST)
    return encode(Descriptor(signed_input(key, TASK, x, address), None))


async def voted(shown: bytes, opening: Opening) -> Reveal:
    """Return this peer's reveal as a voter on an audit whose auditor showed such inputs."""
    bench, me = Bench(), Voter(account=ME, power=1)
    bench.senders = Senders(frozenset([peer_id(CLIENT.account)]), frozenset())
    told = Reveal(name_of(0), 0, bytes(32), bytes([1]) * 384, bytes(384), True, False, shown=shown)
    key, voting = bytes([4]) * 32, status(AuditStatus.VOTING)
    voting_audit = audit_of(
        0, status=voting, auditor=WORKER, opening=opening, reveal=told, dispute_seed=key, voters=(me,)
    )
    async with running(bench):
        bench.show(voting_audit)
        await trio.testing.wait_all_tasks_blocked()
        (commitment,) = bench.outbox.entries
        assert isinstance(commitment, Commitment)
        done = msgspec.structs.replace(me, commitment=commitment.digest)
        bench.show(msgspec.structs.replace(voting_audit, voters=(done,), is_revealing=True))
        await trio.testing.wait_all_tasks_blocked()
    (reveal,) = bench.reveals()
    assert reveal_commitment(ME, reveal) == commitment.digest
    assert not reveal.shown
    return reveal


@pytest.mark.parametrize(
    ("shown", "is_misled"),
    [
        (signed_x(CLIENT), True),
        (b"", False),
        (b"\xc1", False),
        (encode(Descriptor(None, None)), False),
        (signed_x(CLIENT, cell=1), False),
        (signed_x(PrivateKey(bytes([9]) * 32)), False),
        (signed_x(CLIENT)[:-4] + bytes(4), False),
        (signed_x(CLIENT, address=execution_of(0).inputs.x.address), False),
    ],
)
async def test_a_voter_believes_an_auditor_that_shows_another_input_signed_for_that_cell(
    shown: bytes, is_misled: bool
) -> None:
    reveal = await voted(shown, opening_of(0))
    assert (reveal.misled, reveal.contradiction) == (is_misled, False)
    expected = Ballot.AUDITOR_MISLED if is_misled else Ballot.AGAINST_AUDITOR
    audited = Reveal(name_of(0), 0, bytes(32), bytes([1]) * 384, bytes(384), True, False, shown=shown)
    assert ballot(reveal, opening_of(0).sketch, audited, Bench().params) == expected


async def test_a_voter_without_the_opened_inputs_has_no_word_on_those_of_the_auditor() -> None:
    reveal = await voted(signed_x(CLIENT), opening_of(0, gy=bytes(32)))
    assert (reveal.misled, reveal.contradiction) == (False, True)


@pytest.mark.parametrize(("factor", "is_contradiction"), [(1.0 + 1e-6, False), (1.01, True), (-1.0, True)])
async def test_opened_results_are_compared_with_the_own_ones(factor: float, is_contradiction: bool) -> None:
    bench = Bench()
    claimed = altered(0, factor)
    bench.reexecutor.blobs[address_of(claimed)] = claimed
    reveal = await revealed(bench, opening_of(0, y=address_of(claimed)))
    assert reveal.contradiction is is_contradiction


async def test_opened_results_of_the_wrong_size_are_a_contradiction() -> None:
    bench = Bench()
    claimed = altered(0, 1.0)[:-4]
    bench.reexecutor.blobs[address_of(claimed)] = claimed
    assert (await revealed(bench, opening_of(0, y=address_of(claimed)))).contradiction


async def test_opened_results_that_nobody_has_are_missing_and_no_contradiction(
    autojump_clock: trio.testing.MockClock,
) -> None:
    reveal = await revealed(Bench(), opening_of(0, y=bytes(32)), 60)
    assert (reveal.contradiction, reveal.missing) == (False, True)


async def test_a_worker_that_sent_its_neighbours_other_results_than_it_claims_has_not_given_them() -> None:
    bench = Bench()
    bench.reexecutor.two_faced.add(0)
    reveal = await revealed(bench, opening_of(0))
    assert (reveal.contradiction, reveal.missing) == (False, True)


async def test_what_neighbours_were_sent_is_compared_with_what_is_claimed_not_with_the_own_result() -> None:
    bench, claimed = Bench(), altered(0, 1.0 + 1e-6)
    bench.reexecutor.blobs[address_of(claimed)] = claimed
    await revealed(bench, opening_of(0, y=address_of(claimed)))
    ((cell, worker, result),) = bench.reexecutor.compared
    assert (cell, worker) == (0, peer_id(WORKER))
    assert bytes(buffer_of(result.y)) == claimed
    assert torch.equal(result.gw, execution_of(0).result.gw)


@pytest.mark.parametrize("changes", [{"x": bytes(32)}, {"gw": bytes(32)}])
async def test_neighbours_are_asked_only_about_a_claim_that_is_right(
    changes: dict[str, bytes], autojump_clock: trio.testing.MockClock
) -> None:
    bench = Bench()
    await revealed(bench, opening_of(0, **changes), 60)
    assert not bench.reexecutor.compared


TAU = 2.5e-6
"""What is allowed of y."""


async def told_of(off: float, *unsteady: float) -> tuple[Reveal, Opening, list[int]]:
    """Return what is revealed of a y that is off by so many τ, with second looks off by so many, and these."""
    bench, factor = Bench(), 1.0 + off * TAU
    bench.reexecutor.unsteady = tuple(1.0 + one * TAU for one in unsteady)
    bench.reexecutor.blobs[address_of(altered(0, factor))] = altered(0, factor)
    opening = opening_off(0, factor)
    return await revealed(bench, opening), opening, bench.reexecutor.second_looks


async def test_a_small_difference_is_tolerated_by_whose_own_results_are_unsteady() -> None:
    reveal, opening, looks = await told_of(20, 2.5, 1.0)
    assert not reveal.contradiction
    assert 24 <= reveal.tolerance[0] <= 26
    assert reveal.tolerance[1:] == (1, 1)
    assert looks == [1]
    assert ballot(reveal, opening.sketch, reveal, Bench().params) == Ballot.AGAINST_NEITHER


async def test_as_many_looks_are_taken_as_it_needs() -> None:
    reveal, _, looks = await told_of(20, 0.2, 1.0, 2.5)
    assert reveal.tolerance[0] >= 24
    assert looks == [1, 4, 7]


async def test_steady_results_allow_no_more_than_tau() -> None:
    reveal, opening, looks = await told_of(20, 0.2)
    assert (reveal.tolerance, reveal.contradiction, looks) == ((1, 1, 1), False, [1, 4, 7])
    assert ballot(reveal, opening.sketch, reveal, Bench().params) == Ballot.SMALL_DEVIATION


async def test_a_cheat_beyond_ten_spreads_is_convicted_on_a_wrecked_model() -> None:
    reveal, opening, _ = await told_of(310, 30.0, 10.0)
    assert reveal.contradiction
    assert ballot(reveal, opening.sketch, reveal, Bench().params) == Ballot.AGAINST_WORKER


async def test_whole_tensors_within_ten_spreads_are_no_fraud() -> None:
    bench = Bench()
    bench.reexecutor.unsteady = (1.0 + 3 * TAU, 1.0 + 3 * TAU, 1.0 + 30 * TAU)
    claimed = altered(0, 1.0 + 200 * TAU)
    bench.reexecutor.blobs[address_of(claimed)] = claimed
    reveal = await revealed(bench, opening_of(0, y=address_of(claimed)))
    assert (reveal.contradiction, reveal.tolerance) == (False, (1, 1, 1))


async def test_who_cannot_tell_right_from_false_says_nothing() -> None:
    bench, factor = Bench(), 1.0 + 5000 * TAU
    bench.reexecutor.unsteady = (1.0 + 900 * TAU,)
    async with running(bench):
        bench.show(audit_of(0))
        await trio.testing.wait_all_tasks_blocked()
        bench.show(opened(0, opening_off(0, factor)))
        await trio.testing.wait_all_tasks_blocked()
    assert bench.reexecutor.second_looks
    assert not bench.reveals()


async def test_what_is_off_by_more_than_ten_spreads_is_fraud_however_unsteady_the_judge_is() -> None:
    reveal, opening, _ = await told_of(20_000, 900.0)
    assert reveal.contradiction
    assert ballot(reveal, opening.sketch, reveal, Bench().params) == Ballot.AGAINST_WORKER


@pytest.mark.parametrize("off", [0.5, 100_000.0])
async def test_nobody_looks_again_at_what_is_within_tau(off: float) -> None:
    reveal, _, looks = await told_of(off, 0.1)
    assert reveal.tolerance == (1, 1, 1)
    assert looks == ([1] if off > 1 else [])  # no other look would reach as far


@pytest.mark.parametrize("unsteady", [(), (float("nan"),), (float("inf"), float("nan"))])
async def test_who_cannot_look_again_or_finds_no_number_allows_nothing_more(unsteady: tuple[float, ...]) -> None:
    reveal, opening, _ = await told_of(310, *unsteady)
    assert (reveal.contradiction, reveal.tolerance) == (True, (1, 1, 1))
    assert ballot(reveal, opening.sketch, reveal, Bench().params) == Ballot.AGAINST_WORKER


async def test_nobody_tolerates_more_than_the_largest_tolerance() -> None:
    reveal, _, _ = await told_of(90, 1000.0)
    assert reveal.tolerance == (MAX_TOLERANCE, 1, 1)


async def test_equal_results_are_asked_of_nobody() -> None:
    assert not (await revealed(Bench(), opening_of(0))).missing


async def test_results_that_come_a_little_later_are_not_missing(autojump_clock: trio.testing.MockClock) -> None:
    bench, late = Bench(), altered(0, 1.01)
    async with trio.open_nursery() as nursery:

        async def arrive() -> None:
            await trio.sleep(1.2)
            bench.reexecutor.blobs[address_of(late)] = late

        nursery.start_soon(arrive)
        reveal = await revealed(bench, opening_of(0, y=address_of(late)), 60)
    assert (reveal.contradiction, reveal.missing) == (True, False)


async def test_a_false_tensor_convicts_although_another_is_missing(autojump_clock: trio.testing.MockClock) -> None:
    bench = Bench()
    claimed = altered(0, 1.01)
    bench.reexecutor.blobs[address_of(claimed)] = claimed
    reveal = await revealed(bench, opening_of(0, y=address_of(claimed), gw=bytes(32)), 60)
    assert (reveal.contradiction, reveal.missing) == (True, True)


async def test_workers_that_keep_the_auditor_waiting_hold_up_no_other_reveal(
    autojump_clock: trio.testing.MockClock,
) -> None:
    bench = Bench()
    bench.reexecutor.silent.add(bytes(32))
    async with running(bench):
        bench.show(*(audit_of(cell) for cell in range(4)))
        await trio.testing.wait_all_tasks_blocked()
        bench.show(*(opened(cell, opening_of(cell, gw=bytes(32))) for cell in range(3)), opened(3, opening_of(3)))
        await bench.pass_blocks(10)
    assert {reveal.audit for reveal in bench.reveals()} == {name_of(cell) for cell in range(4)}
    assert [reveal.missing for reveal in bench.reveals()] == [False, True, True, True]


async def test_openings_and_reveals_do_not_wait_for_a_slow_re_execution(
    autojump_clock: trio.testing.MockClock,
) -> None:
    bench = Bench()
    bench.reexecutor.seconds = {1: 500.0}
    bench.openings[name_of(2)] = opening_of(2)
    async with running(bench):
        bench.show(audit_of(0, deadline=1000))
        await trio.sleep(1)
        bench.show(audit_of(1, deadline=1000))
        await trio.sleep(1)
        bench.show(owed_opening(2), opened(0, opening_of(0)))
        await trio.sleep(1)
        assert sorted(type(entry).__name__ for entry in bench.outbox.entries) == ["Commitment", "Opening", "Reveal"]
        assert bench.commitments() == [name_of(0)]
        await trio.sleep(500)
    assert bench.commitments() == [name_of(0), name_of(1)]


async def test_every_duty_is_answered_once_however_many_blocks_pass(
    autojump_clock: trio.testing.MockClock,
) -> None:
    bench = Bench()
    bench.openings[name_of(1)] = opening_of(1)
    async with running(bench):
        bench.show(audit_of(0), owed_opening(1))
        await bench.pass_blocks(8)
    assert sorted(type(entry).__name__ for entry in bench.outbox.entries) == ["Commitment", "Opening"]
    assert bench.reexecutor.started == [0]


async def test_a_cell_that_is_not_kept_is_not_opened() -> None:
    bench = Bench()
    async with running(bench):
        bench.show(owed_opening(0))
        await trio.testing.wait_all_tasks_blocked()
    assert not bench.outbox.entries


async def test_material_that_is_missing_is_asked_for_again_at_the_next_block() -> None:
    bench = Bench()
    bench.reexecutor.failures = {0: Unavailable("nobody answers")}
    async with running(bench):
        bench.show(audit_of(0), audit_of(1))
        await trio.testing.wait_all_tasks_blocked()
        assert bench.commitments() == [name_of(1)]
        bench.show()
        await trio.testing.wait_all_tasks_blocked()
    assert bench.commitments() == [name_of(1), name_of(0)]


async def report_missing(bench: Bench) -> None:
    """Let cell 0 be audited to the end, and see that its lack is told when the time is nearly over, and not before."""
    audit = audit_of(0)
    async with running(bench):
        bench.show(audit)
        await bench.pass_blocks(audit.deadline // 3)
        assert not bench.commitments()
        await bench.pass_blocks(audit.deadline - 1)
        assert bench.commitments() == [name_of(0)]
        bench.show(opened(0, opening_of(0)))
        await trio.testing.wait_all_tasks_blocked()
    (reveal,) = bench.reveals()
    assert is_blank(reveal)


async def test_a_manifest_that_nobody_gives_is_material_like_any_other(autojump_clock: trio.testing.MockClock) -> None:
    """An auditor that said nothing would be absent, and left out of the draws of all tasks for a while."""
    bench = Bench()
    bench.is_manifest_here = False
    await report_missing(bench)
    assert not bench.reexecutor.started


@pytest.mark.parametrize("error", [MemoryError(), ValueError("no peer's name"), RuntimeError("no such instruction")])
async def test_what_cannot_be_executed_is_reported_when_the_time_is_nearly_over(
    error: Exception, autojump_clock: trio.testing.MockClock
) -> None:
    bench = Bench()
    bench.reexecutor.broken = {0: error}
    await report_missing(bench)


async def test_material_that_never_comes_is_reported_when_the_time_is_nearly_over(
    autojump_clock: trio.testing.MockClock,
) -> None:
    bench = Bench()
    bench.reexecutor.lost = {0}
    audit = audit_of(0)
    async with running(bench):
        bench.show(audit)
        await bench.pass_blocks(audit.deadline - 2)
        assert bench.commitments() == [name_of(0)]
        assert bench.outbox.heights[0] > (1 + audit.deadline) / 2
        bench.show(opened(0, opening_of(0)))
        await trio.testing.wait_all_tasks_blocked()
    (reveal,) = bench.reveals()
    assert is_blank(reveal)
    assert ballot(reveal, opening_of(0).sketch, reveal, bench.params) == Ballot.DATA_MISSING


async def test_a_fault_costs_one_audit_and_not_the_peer() -> None:
    bench = Bench()
    bench.reexecutor.failures = {0: RuntimeError("a shape that nobody thought of")}
    async with running(bench):
        bench.show(audit_of(0), audit_of(1))
        await trio.testing.wait_all_tasks_blocked()
        assert bench.commitments() == [name_of(1)]
        bench.show()
        await trio.testing.wait_all_tasks_blocked()
    assert bench.commitments() == [name_of(1), name_of(0)]  # it was tried again with the next block
    assert bench.reexecutor.started == [0, 1, 0]


async def test_an_audit_waits_for_the_manifest_of_its_task() -> None:
    bench = Bench()
    bench.is_manifest_here = False
    async with running(bench):
        bench.show(audit_of(0))
        await trio.testing.wait_all_tasks_blocked()
        assert not bench.outbox.entries
        bench.is_manifest_here = True
        bench.show()
        await trio.testing.wait_all_tasks_blocked()
    assert bench.commitments() == [name_of(0)]


async def test_a_new_auditor_commits_after_a_redraw() -> None:
    bench = Bench()
    async with running(bench):
        bench.show(audit_of(0, auditor=WORKER))
        await trio.testing.wait_all_tasks_blocked()
        assert not bench.outbox.entries
        bench.show(audit_of(0, redraws=1))
        await trio.testing.wait_all_tasks_blocked()
    assert bench.commitments() == [name_of(0)]


async def test_results_are_let_go_when_their_audit_has_ended() -> None:
    """They are as large as a stage each."""
    bench = Bench()
    async with running(bench):
        bench.show(audit_of(0), audit_of(1))
        await trio.testing.wait_all_tasks_blocked()
        assert len(bench.auditor._answers) == 2
        bench.show(opened(1, opening_of(1)))
        await trio.testing.wait_all_tasks_blocked()
        bench.audits.pop(name_of(0))
        bench.show()
        assert [identity for identity, _ in bench.auditor._answers] == [name_of(1)]
        bench.audits.pop(name_of(1))
        bench.show()
        assert not bench.auditor._answers
    assert len(bench.reveals()) == 1


async def test_what_is_no_number_and_the_same_bits_is_not_called_false(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(cell: int) -> Execution:
        honest = execution_of(cell)
        return Execution(honest.inputs, honest.result._replace(gw=torch.full((20,), torch.nan)))

    monkeypatch.setattr(audit_samples, "execution_of", broken)
    assert not (await revealed(Bench(), audit_samples.opening_of(0))).contradiction


async def test_who_owes_many_re_executions_is_behind() -> None:
    bench = Bench()
    bench.show(*(audit_of(cell) for cell in range(4)))
    assert not bench.auditor.is_behind
    bench.show(audit_of(4))
    assert bench.auditor.is_behind
    bench.show(opened(4, opening_of(4)))
    assert not bench.auditor.is_behind


async def test_the_cells_of_one_claim_are_executed_together_in_the_order_of_the_draws() -> None:
    bench = Bench()
    claims = {0: 9, 1: 8, 2: 9, 3: 8}
    async with running(bench):
        late = audit_of(4, drawn_at=2, claim=bytes(32))
        bench.show(late, *(audit_of(cell, claim=bytes([claim]) * 32) for cell, claim in claims.items()))
        await trio.testing.wait_all_tasks_blocked()
    assert bench.reexecutor.started == [1, 3, 0, 2, 4]
