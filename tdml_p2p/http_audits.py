"""What status and page tell of audits: how many are open or owed here, how the newest went, and who was evicted."""

from collections import Counter
from heapq import nsmallest
from typing import Any

from chain.keys import peer_id
from chain.records import Audit, AuditStatus
from chain.state import State, Table
from chain.verdicts import TENSORS, deviations, finding, limits_for
from chain.views import grounds

SHOWN = 20
"""Audits on the page."""
IN_STATUS = 8
"""Audits and evictions in the status, which is asked for often."""
_NOT_YET = "–"


def audit_counts(state: State, account: bytes) -> dict[str, int]:
    """Return how many audits are open, what of them is owed by `account`, and ends of those in the state by name."""
    ended = Counter(str(audit.state) for audit in state.tables[Table.AUDITS].values() if not audit.is_active)
    return {"open": len(state.tables[Table.ACTIVE]), "owed": len(state.duties(account)), **ended}


def audit_rows(state: State, account: bytes) -> dict[str, Any]:
    """Return what the status of `account`'s peer says of audits and evictions."""
    return {
        "audits": audit_counts(state, account),
        "recent_audits": recent_audits(state, IN_STATUS),
        "evictions": evictions(state)[:IN_STATUS],
    }


def evictions(state: State) -> list[dict[str, Any]]:
    """Return who was evicted or slashed, with the evidence, newest first."""
    found = []
    for conviction in state.tables[Table.CONVICTIONS].values():
        audit = state.audit(conviction.subject)
        found.append(
            {
                "peer": peer_id(conviction.account),
                "task": conviction.task.hex() if conviction.task else None,
                "step": audit.step if audit else None,
                "reason": "convicted" if (why := grounds(conviction, audit)) == "verdict" else why,
                "evidence": conviction.subject.hex(),
                "slashed": str(conviction.slashed),
                "height": conviction.height,
            }
        )
    return sorted(found, key=lambda line: -int(line["height"] or 0))


def recent_audits(state: State, most: int = SHOWN) -> list[dict[str, Any]]:
    """Return the newest audits: first those in dispute or ended by a verdict, last what came to nothing."""
    found: list[Audit] = list(state.tables[Table.AUDITS].values())
    newest = nsmallest(most, found, key=lambda audit: (_rank(audit), -audit.drawn_at, audit.id))
    return [_row(state, audit) for audit in newest]


def _rank(audit: Audit) -> int:
    if audit.state is AuditStatus.VOID:
        return 2
    return int(audit.third is None and not audit.voters)


def _row(state: State, audit: Audit) -> dict[str, Any]:
    task = state.task(audit.task)
    return {
        "audit": audit.id.hex(),
        "status": str(audit.state),
        "task": audit.task.hex(),
        "step": audit.step,
        "stage": audit.stage,
        "cell": "optimiser" if task is not None and audit.cell == task.transition else audit.cell,
        "worker": peer_id(audit.worker),
        "auditor": peer_id(audit.auditor),
        "votes": sum(voter.has_revealed for voter in audit.voters),
        "voters": len(audit.voters),
        **_measured(state, audit),
    }


def _measured(state: State, audit: Audit) -> dict[str, str]:
    """Return what the auditor's re-execution says of the claim, and by how many times τ the worst tensor is off."""
    if audit.opening is None or audit.reveal is None:
        return {"finding": _NOT_YET, "off": _NOT_YET}
    found = deviations(audit.opening.sketch, audit.reveal.shared)
    limits = limits_for(state.params, audit.reveal)
    worst, name = max((d / tau, n) for d, tau, n in zip(found, limits.tau, TENSORS, strict=True))
    return {"finding": finding(found, limits), "off": f"{name} {worst:.2g} τ"}
