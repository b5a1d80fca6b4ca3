"""To whom a worker gives the weight gradient that it has claimed for a cell. Pure.

y and gx went to the neighbours, who serve them as their inputs; only gw is a worker's own. Whoever had it, with them,
could sketch the results of a cell without computing it. So it is given only to an auditor that has committed to its
own, and in a dispute to those who judge, of whom two thirds count. Who audits the optimiser's step adds all of its
gradients up and has them before it commits, unless it owes a commitment to the same cell.
"""

from chain.ledger.book import audit_id, second_id
from chain.ledger.claims import claim_id
from chain.records import Audit, AuditStatus
from chain.state import State
from chain.transactions import Claim

_SECRET = (AuditStatus.DRAWN, AuditStatus.PASSED, AuditStatus.ABSENT)
"""A cell that has passed may be audited again; what others cannot have is not missed: sketches are on chain."""


def may_have_gradient(state: State, claim: Claim, worker: bytes, cell: int, account: bytes) -> bool:
    """Whether `account` may have the gw that `worker` has claimed for a cell."""
    record = state.claim(claim_id(claim, worker))
    if record is None:
        return False
    own = _audits(state, audit_id(record, cell))
    if any(_may_have(audit, account) for audit in own):
        return True
    if any(audit.is_active and audit.auditor == account for audit in own):
        return False  # it has yet to commit to what it finds itself
    task = state.task(claim.task)
    steps = [] if task is None else _audits(state, audit_id(record, task.transition))
    return any(audit.is_active and account in _judges(audit) for audit in steps)


def _audits(state: State, first: bytes) -> list[Audit]:
    """Return a leaf's audits, the first and the second one, as far as there are any."""
    found = (state.audit(identity) for identity in (first, second_id(first)))
    return [audit for audit in found if audit is not None]


def _may_have(audit: Audit, account: bytes) -> bool:
    return audit.state not in _SECRET and (not audit.is_active or account in _judges(audit))


def _judges(audit: Audit) -> set[bytes]:
    third = {audit.third.account} if audit.third else set()
    return {audit.auditor, *third, *(voter.account for voter in audit.voters)}
