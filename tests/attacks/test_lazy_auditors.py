"""Auditors that do not compute: a sketch under a key of their own, committed first, cannot be had otherwise."""

import pytest
from msgspec import structs

from chain.keys import peer_id
from chain.reasons import Reason
from chain.records import Audit, AuditStatus
from chain.transactions import Commit, Commitment, Reveal, RevealAll, reveal_commitment
from tests.attacks.kit import RealSwarm, swarm_of
from tests.attacks.laziness import WAYS, measure_lazy
from tests.chain.ledger_kit import by_account


@pytest.mark.parametrize("way", WAYS)
def test_who_does_not_compute_is_charged_at_the_first_audit(way: str) -> None:
    found = measure_lazy(way, 5)
    assert found.ends == {"acquitted": 5}
    assert found.charged_at_first == 5
    assert found.honest_losses == 0


def opened_swarm(run: str) -> tuple[RealSwarm, Audit]:
    """Return a swarm with a cell that its worker has opened; its auditor has committed to nothing of its own."""
    swarm = swarm_of(run, 10_000)
    lazy = sorted(set(swarm.state.validators().powers) - {w.account for w in swarm.state.workers(swarm.task)})[0]
    swarm.silent |= {(lazy, "commit"), (lazy, "reveal")}
    for _ in range(10):
        swarm.work(1)
        mine = [a for a in swarm.audits() if a.auditor == lazy and a.state is AuditStatus.DRAWN]
        others = [a for a in swarm.audits() if a.auditor != lazy and a.commitment is not None]
        if mine and others:
            copied = Commitment(mine[0].id, 0, others[0].commitment or b"")
            assert swarm.ledger.one(by_account(lazy), Commit((copied,))) == ""
            break
    for _ in range(6):
        swarm.work(1)
        audit = swarm.state.audit(mine[0].id)
        if audit is not None and audit.state is AuditStatus.OPENED:
            return swarm, audit
    raise AssertionError("the cell was not opened")


def test_a_copied_commitment_and_the_worker_s_own_sketch_are_refused_and_cost_the_draws() -> None:
    swarm, audit = opened_swarm("copied")
    assert audit.opening is not None
    sketch = audit.opening.sketch
    echo = Reveal(audit.id, 0, bytes(32), sketch, sketch, False, False)
    assert swarm.ledger.one(by_account(audit.auditor), RevealAll((echo,))) == Reason.WRONG_COMMITMENT
    again = Commitment(audit.id, 0, reveal_commitment(audit.auditor, echo))
    assert swarm.ledger.one(by_account(audit.auditor), Commit((again,))) == Reason.NOT_OWED
    while not swarm.ledger.happened("absent"):
        swarm.work(1)
    assert {event["peer"] for event in swarm.ledger.happened("absent")} == {peer_id(audit.auditor)}
    assert not {"evicted", "withheld", "faulted"} & set(swarm.ledger.kinds())


def test_the_next_auditor_s_sketch_is_under_another_key() -> None:
    swarm, audit = opened_swarm("redrawn")
    assert audit.opening is not None
    while (now := swarm.state.audit(audit.id)) is not None and now.auditor == audit.auditor:
        swarm.work(1)
    assert now is not None
    assert (now.key != audit.key, now.opening) == (True, None)
    next_one = structs.replace(now, opening=audit.opening)
    assert swarm.opening(next_one).sketch != audit.opening.sketch
