"""Two roots for one cell: the chain takes the first, and whoever opens another is refused."""

from msgspec import structs

from chain.reasons import Reason
from chain.records import AuditStatus
from chain.transactions import Open, SubmitClaims
from tests.attacks.kit import RealSwarm, place_of, swarm_of, trace_of
from tests.chain.ledger_kit import by_account


def claimed_swarm() -> tuple[RealSwarm, bytes]:
    swarm = swarm_of("two roots", 10_000)
    worker = swarm.seated(1)[0]
    swarm.ledger.block(*swarm.claims(1))
    return swarm, worker


def test_a_second_root_for_a_claimed_cell_is_refused() -> None:
    swarm, worker = claimed_swarm()
    first = swarm._claim_of(worker, 1, 1, (0, 2))
    other = structs.replace(first, root=bytes(32))
    part = structs.replace(other, cells=(0,))
    for claim in (first, other, part):
        assert swarm.ledger.one(by_account(worker), SubmitClaims((claim,))) == Reason.CELL_CLAIMED


def test_an_opening_of_another_result_than_was_claimed_is_refused() -> None:
    swarm, worker = claimed_swarm()
    while not (mine := [a for a in swarm.audits() if a.worker == worker and a.state is AuditStatus.COMMITTED]):
        answers = [(key, sent) for key, sent in swarm.answers() if not isinstance(sent, Open)]
        swarm.ledger.block(*answers)
    for audit in mine[:3]:
        honest = swarm.opening(audit)
        false = structs.replace(honest, trace=trace_of(place_of(audit), "sign flip"))
        assert swarm.ledger.one(by_account(worker), Open((false,))) == Reason.FALSE_OPENING
        assert swarm.ledger.one(by_account(worker), Open((honest,))) == ""
