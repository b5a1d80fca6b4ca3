"""What `audit` tells: who claimed what, what others computed, who voted how, and what came of it."""

from typing import Any, Protocol

from chain.keys import peer_id
from chain.records import Audit, AuditStatus, ClaimRecord, Conviction, Voter
from chain.state import State, Table
from chain.store import Store
from chain.transactions import Reveal, Trace
from chain.verdicts import (
    TENSORS,
    Ballot,
    Deviations,
    ballot,
    deviations,
    finding,
    limits_for,
    quorum,
    step_ballot,
    tally,
)
from chain.views import plain

_LONGEST = 2000
"""Blocks after its claim in which the events of an audit are looked for."""
_KINDS = (
    "drawn", "committed", "opened", "disputed", "opinion", "ballot", "charged", "absent", "slashed", "evicted",
    "reopened",
    *(str(state) for state in AuditStatus if state not in (AuditStatus.DRAWN, AuditStatus.COMMITTED)),
)  # fmt: skip
_OUTCOMES = {
    AuditStatus.DRAWN: "The auditor has not committed yet.",
    AuditStatus.COMMITTED: "The auditor has committed; the worker has not opened the cell yet.",
    AuditStatus.OPENED: "The worker has opened the cell; the auditor has not revealed yet.",
    AuditStatus.OPINION: "The results differ; a third peer re-executes.",
    AuditStatus.VOTING: "The results differ; the validators re-execute and vote.",
    AuditStatus.PASSED: "The re-execution agrees with the claim.",
    AuditStatus.CONVICTED: "A quorum of stake found the claim false: the worker was evicted and its bond slashed.",
    AuditStatus.ACQUITTED: "A quorum of stake found the claim right: an auditor that had no excuse was charged.",
    AuditStatus.FAULTED: "A small deviation: the cell is not paid, nobody is slashed.",
    AuditStatus.UNDECIDED: "No quorum either way: the cell is not paid, nobody is slashed.",
    AuditStatus.WITHHELD: "The worker kept back what it had claimed, or had sent another result: the cell is not paid.",
    AuditStatus.ABSENT: "No auditor answered in time.",
    AuditStatus.VOID: "The claim was voided before anybody disputed it.",
    AuditStatus.REFUTED: "It had passed; a second audit found the cell false, and the auditor was charged.",
}


class Chronicle(Protocol):
    """What a story is told from."""

    store: Store

    @property
    def state(self) -> State:
        """The newest final state."""

    def claim(self, claim: bytes) -> ClaimRecord | None:
        """Return a claim, also one that has left the state."""


def audit_story(reader: Chronicle, audit: Audit) -> dict[str, Any]:
    """Return one audit from the claim to what came of it."""
    state, claim = reader.state, reader.claim(audit.claim)
    opening, reveal, limits = audit.opening, audit.reveal, limits_for(state.params, audit.reveal)
    convictions: list[Conviction] = list(state.tables[Table.CONVICTIONS].values())
    story: dict[str, Any] = {
        "id": audit.id.hex(),
        "task": audit.task.hex(),
        "generation": audit.generation,
        "step": audit.step,
        "stage": audit.stage,
        "cell": audit.cell,
        "is_step": _is_step(state, audit),
        "worker": peer_id(audit.worker),
        "auditor": peer_id(audit.auditor),
        "status": str(audit.state),
        "outcome": _OUTCOMES[audit.state],
        "drawn_at": audit.drawn_at,
        "deadline": audit.deadline,
        "key": audit.key.hex(),
        "claim": audit.claim.hex(),
        "claimed": _claimed(claim),
        "trace": _trace(opening.trace) if opening else None,
        "thresholds": _by_tensor(limits.allowed),
        "fraud_factor": limits.fraud_factor,
        "other_kernel": reveal is not None and reveal.other_kernel,
        "tolerance": list(limits.tolerance),
    }
    if opening and reveal:
        found = deviations(opening.sketch, reveal.shared)
        story |= {"deviations": _by_tensor(found), "finding": finding(found, limits)}
        story |= {"contradiction": reveal.contradiction, "missing": reveal.missing}
    story["timeline"] = _timeline(reader, audit, claim)
    ballots = {e["data"]["by"]: e["data"] for e in story["timeline"] if e["kind"] == "ballot"}
    story["votes"] = [_opinion(state, audit, audit.third)] if audit.third else []
    story["votes"] += [_vote("voter", voter, ballots.get(peer_id(voter.account))) for voter in audit.voters]
    story["tally"] = _tally(state, audit)
    story["convictions"] = [plain(conviction) for conviction in convictions if conviction.subject == audit.id]
    story["slashed"] = str(sum(conviction.slashed for conviction in convictions if conviction.subject == audit.id))
    return story


def _claimed(claim: ClaimRecord | None) -> dict[str, Any] | None:
    if claim is None:
        return None
    told = {"height": claim.height, "root": claim.claim.root.hex(), "cells": list(claim.claim.cells)}
    roots = {"state_before": claim.claim.state_before.hex(), "state_after": claim.claim.state_after.hex()}
    return {**told, **roots, "is_settled": claim.is_settled, "is_void": claim.is_void}


def _trace(trace: Trace) -> dict[str, str]:
    return {name: getattr(trace, name).hex() for name in trace.__struct_fields__}


def _by_tensor(values: Deviations) -> dict[str, float | str]:
    return {name: value if value < float("inf") else "inf" for name, value in zip(TENSORS, values, strict=True)}


def _vote(role: str, voter: Voter, said: dict[str, Any] | None) -> dict[str, Any]:
    """Return what a third peer or voter did; its ballot and deviations once it has revealed."""
    told: dict[str, Any] = {
        "role": role,
        "peer": peer_id(voter.account),
        "power": str(voter.power),
        "committed": voter.commitment is not None,
        "revealed": voter.has_revealed,
        "ballot": None,
    }
    if said is not None:
        found = dict(zip(TENSORS, said["deviations"], strict=True))
        told |= {"ballot": said["ballot"], "deviations": found, "finding": said["finding"]}
        told["contradiction"] = said["contradiction"]
        told["missing"] = said["missing"]
    return told


def _opinion(state: State, audit: Audit, third: Voter) -> dict[str, Any]:
    """Return what the third peer did."""
    if not audit.opening or not audit.reveal or not third.reveal:
        return _vote("third", third, None)
    found = deviations(audit.opening.sketch, third.reveal.shared)
    said = {
        "ballot": str(_ballot(state, audit, third.reveal)),
        "deviations": list(_by_tensor(found).values()),
        "finding": finding(found, limits_for(state.params, third.reveal)),
        "contradiction": third.reveal.contradiction,
        "missing": third.reveal.missing,
    }
    return _vote("third", third, said)


def _is_step(state: State, audit: Audit) -> bool:
    """Whether it is the optimiser's step that was audited."""
    task = state.task(audit.task)
    return task is not None and audit.cell == task.transition


def _ballot(state: State, audit: Audit, told: Reveal) -> Ballot:
    """Return what a re-execution says of accused and accuser."""
    assert audit.opening is not None
    assert audit.reveal is not None
    if _is_step(state, audit):
        return step_ballot(told, audit.opening.sketch, audit.reveal, state.params)
    return ballot(told, audit.opening.sketch, audit.reveal, state.params, is_passed=audit.is_reopened)


def _tally(state: State, audit: Audit) -> dict[str, str] | None:
    """Return the stake that voted and what a verdict needs; None before any vote."""
    if not audit.voters or not audit.opening or not audit.reveal:
        return None
    against = tally(audit.voters)
    total = sum(voter.power for voter in audit.voters)
    return {
        "stake": str(total),
        "quorum": str(quorum(total)),
        "against_worker": str(against[Ballot.AGAINST_WORKER]),
        "against_auditor": str(against[Ballot.AGAINST_AUDITOR]),
    }


def _timeline(reader: Chronicle, audit: Audit, claim: ClaimRecord | None) -> list[dict[str, Any]]:
    first = claim.height if claim else audit.drawn_at
    name = audit.id.hex()
    rows = reader.store.events(first, min(first + _LONGEST, reader.state.height), _KINDS)
    told = [(height, event) for height, event in rows if name in (event.data.get("audit"), event.data.get("evidence"))]
    return [{"height": height, "kind": event.kind, "data": event.data} for height, event in told]
