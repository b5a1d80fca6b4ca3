"""Workers that claim nothing of their work: who loses a seat for it and who does not."""

from dataclasses import dataclass, field

import pytest
from msgspec import structs

from chain.bounds import BASIS
from chain.keys import PrivateKey, peer_id
from chain.ledger.book import Book, step_key
from chain.ledger.silence import count_silent
from chain.reasons import Reason
from chain.records import Task, Worker
from chain.state import Draft, Table
from chain.transactions import CloseTask, LeaveSeat, SubmitClaims, TakeSeat
from tests.chain.ledger_kit import KEYS, Ledger, Sent, Swarm, by_account, genesis_of, start_swarm

FRAUD = -2.0
DEPTH = 4


@dataclass
class Quiet(Swarm):
    """A swarm in which some claim nothing, claim a part, or get no cells."""

    mute: set[bytes] = field(default_factory=set)
    """Who gets cells and claims none of them."""
    stingy: set[bytes] = field(default_factory=set)
    """Who claims the first of its cells only."""
    idle: set[bytes] = field(default_factory=set)
    """Who gets no cells, and says so."""
    gone: set[bytes] = field(default_factory=set)
    """Who gets no cells, and says nothing."""

    def claims(self, step: int) -> list[Sent]:
        """Return the claims of one step, as everybody makes them."""
        task, sent = self.own, []
        for stage in range(task.stages):
            seated = [a for a in self.seated(stage) if a not in self.gone]
            busy = [a for a in seated if a not in self.idle]
            teams = max(1, len(busy) // task.redundancy)
            dealt = {a: tuple(range(place % teams, task.microbatches, teams)) for place, a in enumerate(busy)}
            for account in seated:
                cells = dealt.get(account, ())
                if account not in self.mute:
                    claimed = cells[:1] if account in self.stingy else cells
                    sent.append((by_account(account), SubmitClaims((self.claim(step, stage, claimed),))))
        self.claimed.add((task.generation, step))
        return sent

    @property
    def own(self) -> Task:
        """The task's record."""
        task = self.state.task(self.task)
        assert task is not None
        return task

    def worker(self, account: bytes) -> Worker:
        """Return a worker's record."""
        worker = self.state.worker(self.task, account)
        assert worker is not None
        return worker

    @property
    def evicted(self) -> list[str]:
        """Who was evicted, in order."""
        return [str(event["worker"]) for event in self.ledger.happened("evicted")]


def quiet(count: int = 4, validators: int = 6, params: dict[str, object] | None = None, **terms: object) -> Quiet:
    """Return a running swarm of this many workers, of whom nobody is silent yet."""
    genesis = genesis_of(validators, 6, **{"lease_blocks": 10_000, "newcomer_cells": 0, **(params or {})})
    plain = start_swarm(Ledger(genesis), KEYS[:count], **{"steps": 200, "audit_rate": 1000, **terms})
    return Quiet(plain.ledger, plain.client, plain.task)


def window(swarm: Quiet) -> int:
    return swarm.state.params.claim_window


def test_who_claims_nothing_loses_its_seat_without_slash_on_the_third_occasion() -> None:
    swarm = quiet()
    mute = swarm.seated(1)[0]
    swarm.mute.add(mute)
    bond = swarm.worker(mute).bond
    while not swarm.evicted:
        swarm.work(1)
        assert len(swarm.ledger.blocks) < 3 * (window(swarm) + 2) + 10
    assert swarm.evicted == [peer_id(mute)]
    assert [event["occasion"] for event in swarm.ledger.happened("silent")] == [1, 2, 3]
    assert not {"slashed", "charged", "withheld"} & set(swarm.ledger.kinds())
    event = swarm.ledger.happened("evicted")[0]
    assert event["reason"] == "silent"
    (kept,) = swarm.state.tables[Table.CONVICTIONS].values()
    assert (kept.kind, kept.account, kept.slashed, kept.subject.hex()) == (3, mute, 0, event["evidence"])
    settled = swarm.settled
    assert 2 * DEPTH < settled <= 3 * DEPTH
    assert (bond, swarm.worker(mute).bond) == (1000, 0)  # it is back: blocks are checked for conservation
    swarm.work(window(swarm))
    assert swarm.settled > settled + DEPTH


def test_an_idle_replica_beside_it_keeps_its_seat_by_claims_without_cells() -> None:
    swarm = quiet(6, replicas=3)
    mute, idle, _ = swarm.seated(1)
    swarm.mute.add(mute)
    swarm.idle.add(idle)
    swarm.work(4 * window(swarm))
    assert swarm.evicted == [peer_id(mute)]
    assert (swarm.worker(idle).silences, swarm.worker(idle).settled_cells) == (0, 0)


def test_a_crash_between_computing_and_claiming_is_one_occasion_and_forgotten() -> None:
    swarm = quiet()
    crashed = swarm.seated(1)[0]
    swarm.mute.add(crashed)
    swarm.work(DEPTH)
    swarm.mute.clear()
    swarm.gone.add(crashed)
    swarm.work(5 * window(swarm))
    assert swarm.worker(crashed).silences == 1
    assert swarm.worker(crashed).is_seated
    swarm.gone.clear()
    swarm.work(window(swarm))
    assert swarm.worker(crashed).silences == 0
    assert not swarm.evicted


def test_a_claim_at_once_after_it_is_not_enough_or_silence_by_turns_would_do() -> None:
    swarm = quiet()
    sly = swarm.seated(1)[0]
    for _ in range(6):
        swarm.mute ^= {sly}
        settled = swarm.settled
        while swarm.settled < settled + DEPTH:
            swarm.work(1)
    assert swarm.evicted == [peer_id(sly)]


def test_a_dead_worker_whose_cells_others_compute_is_no_occasion() -> None:
    swarm = quiet()
    swarm.gone = {swarm.seated(0)[0], swarm.seated(1)[1]}
    swarm.work(5 * window(swarm))
    assert not swarm.ledger.happened("silent")
    assert swarm.settled > 5 * DEPTH


@pytest.mark.parametrize("patience", [0, 100])
def test_who_got_its_seat_after_the_first_claim_or_may_still_fetch_weights_is_not_counted(patience: int) -> None:
    swarm = quiet(5, replicas=3, patience=patience)
    stage = next(stage for stage in (0, 1) if len(swarm.seated(stage)) == 2)
    mute = swarm.seated(stage)[0]
    swarm.mute.add(mute)
    for _ in range(patience + 2):
        swarm.ledger.block(*swarm.answers())
    swarm.work(2)
    newcomer = KEYS[5]
    swarm.ledger.block((newcomer, TakeSeat(swarm.task, bytes(32))), *swarm.answers())
    swarm.gone.add(newcomer.account)
    swarm.work(window(swarm) + 10)
    assert newcomer.account in swarm.seated(stage)
    assert swarm.worker(mute).silences == 1
    assert swarm.worker(newcomer.account).silences == 0
    swarm.work(window(swarm) + 10)
    assert swarm.worker(newcomer.account).silences == (0 if patience else 1)


def test_several_silent_workers_all_go_also_the_only_one_of_a_stage() -> None:
    swarm = quiet(5, replicas=3)
    alone = swarm.seated(1)[1]
    swarm.ledger.one(by_account(alone), LeaveSeat(swarm.task))
    mute = {swarm.seated(0)[0], swarm.seated(0)[2], *swarm.seated(1)}
    swarm.mute |= mute
    swarm.work(4 * window(swarm))
    assert set(swarm.evicted) == {peer_id(account) for account in mute}
    assert len(swarm.evicted) == len(mute)


def test_who_comes_back_is_out_at_the_first_occasion() -> None:
    swarm = quiet()
    mute = swarm.seated(1)[0]
    swarm.mute.add(mute)
    swarm.work(4 * window(swarm))
    swarm.ledger.block((by_account(mute), TakeSeat(swarm.task, bytes(32))), *swarm.answers())
    swarm.work(4)
    assert mute in swarm.seated(1)
    swarm.work(window(swarm) + 4)
    assert swarm.evicted == [peer_id(mute)] * 2


def test_with_redundancy_it_loses_its_seat_and_an_idle_replica_does_not() -> None:
    swarm = quiet(8, validators=4, stages=2, replicas=4, redundancy=3)
    mute, idle = swarm.seated(1)[0], swarm.seated(1)[3]
    swarm.mute.add(mute)
    swarm.idle |= {idle, swarm.seated(0)[3]}
    swarm.work(4 * window(swarm))
    assert swarm.evicted == [peer_id(mute)]
    assert not [event for event in swarm.ledger.happened("drawn") if event["cell"] == swarm.own.transition]


def test_where_cells_are_missing_the_steps_of_all_who_claimed_there_are_audited_in_time() -> None:
    swarm = quiet(audit_rate=500, params={"step_share": 0})
    stingy, honest = swarm.seated(1)
    swarm.stingy.add(stingy)
    swarm.work(window(swarm) - 1, last_step=DEPTH)
    steps = [e for e in swarm.ledger.happened("drawn") if e["cell"] == swarm.own.transition]
    assert {(e["stage"], e["step"], e["worker"]) for e in steps} == {
        (1, step, peer_id(account)) for step in range(1, DEPTH + 1) for account in (stingy, honest)
    }
    ended = [e for e in swarm.ledger.happened("passed") if e["cell"] == swarm.own.transition]
    assert len(ended) == len(steps)
    swarm.work(4, last_step=DEPTH)
    assert swarm.settled == DEPTH
    assert not swarm.ledger.happened("silent")


def test_who_claims_less_than_it_added_is_convicted_by_its_step() -> None:
    swarm = quiet(audit_rate=500, params={"step_share": 0})
    stingy = swarm.seated(1)[0]
    swarm.stingy.add(stingy)
    swarm.step_deviation[stingy] = FRAUD  # its record does not lead to the state, or lists other cells than the order
    swarm.work(2 * window(swarm))
    assert swarm.evicted == [peer_id(stingy)]
    assert {event["worker"] for event in swarm.ledger.happened("slashed")} == {peer_id(stingy)}


def test_nobody_is_silent_where_claims_are_refused() -> None:
    closed = quiet()
    mute = closed.seated(1)[0]
    closed.mute.add(mute)
    closed.work(3)
    closed.ledger.one(closed.client, CloseTask(closed.task))
    closed.work(2 * window(closed))
    assert not closed.own.is_open
    assert not closed.ledger.happened("silent")


@pytest.mark.parametrize(("spare", "count"), [(40, 1), (39, 0)])
def test_nobody_is_silent_where_the_escrow_pays_no_more_cells(spare: int, count: int) -> None:
    swarm = quiet()
    mute = swarm.seated(1)[0]
    swarm.mute.add(mute)
    swarm.work(2)
    book = Book(Draft(swarm.state), swarm.state.height + 1, swarm.state.seed, swarm.state.validators())
    task = book.set_task(swarm.own, escrow=swarm.own.reserved + spare)
    progress = book.draft.get(Table.STEPS, step_key(task.id, task.generation, 1))
    assert count_silent(book, task, progress) == (4 if count else 0)
    worker = book.worker(task.id, mute)
    assert worker is not None
    assert worker.silences == count


def test_a_claim_without_cells_is_made_once_by_who_has_a_seat_from_a_claimed_state() -> None:
    swarm = quiet()
    account = swarm.seated(0)[0]
    claim = swarm.claim(1, 0, ())

    def sent(key: PrivateKey, **changes: object) -> str:
        return swarm.ledger.one(key, SubmitClaims((structs.replace(claim, **changes),)))

    assert sent(KEYS[9]) == Reason.NO_SEAT
    assert sent(by_account(account), stage=1) == Reason.NO_SEAT
    assert sent(by_account(account), step=DEPTH + 1) == Reason.WRONG_STEP
    assert not sent(by_account(account))
    assert sent(by_account(account)) == Reason.CELL_CLAIMED
    assert sent(by_account(account), step=2, state_before=bytes(32)) == Reason.WRONG_STATE
    assert swarm.own.reserved == 0


def test_the_step_of_a_claim_without_cells_is_audited_like_others() -> None:
    swarm = quiet(6, replicas=3, audit_rate=BASIS)
    idle = swarm.seated(1)[0]
    swarm.idle.add(idle)
    swarm.step_deviation[idle] = FRAUD
    swarm.work(12)
    assert swarm.evicted == [peer_id(idle)]
    assert swarm.ledger.happened("evicted")[0]["reason"] == "convicted"
