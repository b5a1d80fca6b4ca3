"""The cell that an audit is about: where it stands, on which state it ran, who may hold what it needs."""

from collections.abc import Sequence

from chain.keys import peer_id
from chain.records import Audit, ClaimRecord
from chain.state import State
from tdml_p2p.swarm.inputs import Senders, Wanted
from tdml_p2p.swarm.reexecution import Cell, Claimed
from tdml_p2p.swarm.terms import unlike
from trainer.manifest import TaskManifest


def audited_cell(
    audit: Audit, claim: ClaimRecord, state: State, manifest: TaskManifest, others: Sequence[str] = ()
) -> Cell | None:
    """Return the cell of an audit of a task that the state knows; `others` may hold its material, too."""
    task = state.task(audit.task)
    if task is None or unlike(task, manifest) is not None:
        return None
    wanted = Wanted(audit.task, audit.generation, audit.step, manifest.seated[audit.stage], audit.cell)
    stages: dict[int, list[str]] = {}
    for worker in state.workers(audit.task):
        stages.setdefault(worker.stage, []).append(peer_id(worker.account))
    client = peer_id(task.client)
    before, after = stages.get(audit.stage - 1, []), stages.get(audit.stage + 1, [])
    senders = Senders(
        frozenset(before if audit.stage else [client]),
        frozenset(after if audit.stage < task.stages - 1 else [client]),
    )
    holders = dict.fromkeys([*others, peer_id(audit.worker), *stages.get(audit.stage, []), *before, *after, client])
    claimed = Claimed(peer_id(audit.worker), client, claim.claim, audit.opening)
    return Cell(wanted, manifest, claim.claim.state_before, tuple(holders), senders, claimed, task.kernel)
