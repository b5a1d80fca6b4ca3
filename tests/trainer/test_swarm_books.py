"""The coordinator's books: exactly-once accounting, deadlines, statuses, suspects."""

import pytest

from trainer import messages as m
from trainer.coordinator_book import StepBook
from trainer.coordinator_pace import Pace
from trainer.coordinator_ports import Members, Patience
from trainer.coordinator_roster import Roster, Status
from trainer.coordinator_round import Round
from trainer.payloads import MessageError, Reason


def done(cell: int, stage: int, loss: float = 0.0) -> m.CellDone:
    return m.CellDone(0, 1, cell, stage, loss, 0.1)


def reason_of(refusal: pytest.ExceptionInfo[MessageError]) -> Reason:
    return refusal.value.reason


def test_a_cell_counts_once_and_from_its_owner_only() -> None:
    book = StepBook(0, 1, [("a", "b"), ("a", "c")])
    book.note_done("b", done(0, 1, 2.0))
    with pytest.raises(MessageError) as refusal:
        book.note_done("b", done(0, 1, 9.0))
    assert reason_of(refusal) is Reason.DUPLICATE
    with pytest.raises(MessageError) as refusal:
        book.note_done("b", done(1, 1))
    assert reason_of(refusal) is Reason.WRONG_SENDER
    with pytest.raises(MessageError) as refusal:
        book.note_done("b", done(2, 1))
    assert reason_of(refusal) is Reason.UNKNOWN_CELL
    assert not book.is_complete
    for cell, stage, peer in ((1, 1, "c"), (0, 0, "a"), (1, 0, "a")):
        book.note_done(peer, done(cell, stage, 4.0))
    assert book.is_complete
    assert book.loss == 3.0


def test_a_moved_cell_is_to_be_done_again() -> None:
    book = StepBook(0, 1, [("a", "b")])
    book.note_done("b", done(0, 1))
    book.move(1, 0, "c")
    assert book.missing(1, "c") == (0,)
    with pytest.raises(MessageError) as refusal:
        book.note_done("b", done(0, 1))
    assert reason_of(refusal) is Reason.WRONG_SENDER


def test_those_who_have_all_they_need_are_waited_for() -> None:
    book = StepBook(0, 1, [("a", "b"), ("a", "b")])
    assert book.waited_for() == {"a"}
    book.note_passed("a", m.Passed(0, 1, 0, 0))
    assert book.waited_for() == {"a", "b"}
    book.note_passed("a", m.Passed(0, 1, 1, 0))
    assert book.waited_for() == {"b"}
    book.note_done("b", done(0, 1))
    assert book.waited_for() == {"a", "b"}
    book.note_done("b", done(1, 1))
    book.note_done("a", done(0, 0))
    assert book.waited_for() == {"a"}
    book.note_done("a", done(1, 0))
    assert book.waited_for() == set()


def test_deadlines_follow_the_usual_time_of_a_cell() -> None:
    pace = Pace(Patience(factor=8.0, floor=1.0, first=60.0))
    pace.start()
    pace.watch(frozenset({"a", "b"}), 0.0)
    assert pace.deadline(("a", "b")) == 60.0
    for peer, at in (("a", 0.5), ("b", 5.0)):
        pace.heard(peer, at)
        pace.finished(peer)
    assert pace.deadline(("a", "b")) == 4.0
    assert pace.weights(("a", "b", "new")) == {"a": 2.0, "b": 0.2, "new": 2.0}
    assert not pace.is_overdue("a", ("a", "b"), 4.5)
    assert pace.is_overdue("a", ("a", "b"), 4.6)
    pace.watch(frozenset({"b"}), 5.0)
    assert not pace.is_overdue("a", ("a", "b"), 99.0)


def test_a_worker_that_let_the_step_wait_gets_less_until_it_is_forgiven() -> None:
    pace = Pace(Patience(floor=1.0))
    pace.start()
    pace.watch(frozenset({"a", "b"}), 0.0)
    for peer in "ab":
        pace.heard(peer, 1.0)
        pace.finished(peer)
    pace.penalise("b", 11.0)
    weights = pace.weights("ab")
    assert weights == {"a": 1.0, "b": 0.1}
    assert pace.deadline("ab") == 16.0
    for _ in range(30):
        pace.forgive("b", "ab")
    assert pace.weights("ab")["b"] > 0.9


def test_a_member_is_left_out_for_longer_each_time() -> None:
    roster = Roster()
    roster.update(Members(0, 0, (("a", "b"), ("c",))))
    assert roster.empty_stages() == (0, 1)
    member = roster.get("a")
    member.status, member.asked, member.question = Status.PREPARING, (0, 0), 3
    with pytest.raises(MessageError) as refusal:
        roster.note_ready("a", m.Ready(0, 0, bytes(32), 2))
    assert reason_of(refusal) is Reason.STALE_STEP
    roster.note_ready("a", m.Ready(0, 0, bytes(32), 3))
    assert roster.ready(0) == ("a",)
    assert roster.empty_stages() == (1,)
    pauses = []
    for _ in range(8):
        roster.leave_out(member, 10)
        pauses.append(member.retry_step - 10)
    assert pauses == [1, 2, 4, 8, 16, 32, 64, 64]
    assert [gone.peer for gone in roster.update(Members(0, 0, (("b",), ("a", "c"))))] == ["a"]
    assert roster.get("a").stage == 1


def test_an_answer_to_an_old_question_is_refused() -> None:
    roster = Roster()
    roster.update(Members(0, 0, (("a",),)))
    for answer in (m.Ready(0, 0, bytes(32)), m.Ready(1, 0, bytes(32))):
        with pytest.raises(MessageError) as refusal:
            roster.note_ready("a", answer)
        assert reason_of(refusal) is Reason.STALE_STEP
    with pytest.raises(MessageError) as refusal:
        roster.get("stranger")
    assert reason_of(refusal) is Reason.WRONG_SENDER


def reduction(owners: tuple[str, ...] = ("a", "b")) -> Round:
    return Round(m.Reduce(0, 1, 1, owners, ("a", "b", "c")), 0, 0.0)


def reduced(root: int) -> m.Reduced:
    return m.Reduced(0, 1, 1, bytes([root]) * 32)


def missing(*peers: str) -> m.Fault:
    return m.Fault(0, 1, Reason.PARTIAL_MISSING, peers)


def test_the_silent_ones_are_suspected_first() -> None:
    current = reduction()
    current.note_missing("c", missing("b"))
    assert current.suspects() == ("a", "b")
    current.note_missing("a", missing("b"))
    current.note_missing("b", missing("b"))
    assert current.suspects() == ("b",)
    current.note("a", reduced(1), 0.0)
    assert current.suspects() == ("b", "c")


def test_who_was_spared_is_not_suspected_and_strangers_are_not_asked_to_repeat() -> None:
    current = reduction()
    assert current.note_missing("a", missing("c", "stranger")) == ("c",)
    assert current.note_missing("a", missing("c", "b")) == ("b",)
    assert current.note_missing("b", missing("c")) == ("c",)
    assert current.suspects() == ("c",)
    current.note_missing("c", missing("b"))
    assert current.suspects() == ("b", "c")
    current.spare("c")
    assert current.suspects() == ("b",)
    current.probe(5.0)
    assert current.note_missing("a", missing("b")) == ("b",)


def test_all_computing_are_not_suspected() -> None:
    current = reduction()
    for peer in "ab":
        current.note_missing(peer, missing(peer))
    current.spare("c")
    assert current.suspects() == ()
    assert current.probe(5.0) == ("a", "b")
    assert current.suspects() == ("a", "b")


def test_a_round_can_spare_whom_nobody_needs_any_more() -> None:
    current = reduction()
    assert [current.can_spare(peer) for peer in "abc"] == [False, False, True]
    current.note("b", reduced(1), 0.0)
    current.note("c", reduced(1), 0.0)
    assert [current.can_spare(peer) for peer in "abc"] == [True, False, True]
    current.spare("a")
    assert current.is_complete


def test_the_most_frequent_root_counts() -> None:
    current = reduction()
    for peer, root in (("a", 1), ("b", 2), ("c", 2)):
        current.note(peer, reduced(root), 0.0)
    assert (current.root, current.dissenters) == (bytes([2]) * 32, ("a",))
    with pytest.raises(MessageError) as refusal:
        current.note("a", reduced(2), 0.0)
    assert reason_of(refusal) is Reason.DUPLICATE
