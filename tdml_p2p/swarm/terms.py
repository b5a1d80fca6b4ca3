"""Whether a task is what its manifest says: its client wrote both, and workers and auditors go by one each."""

from chain.state import Task
from trainer.manifest import TaskManifest
from trainer.precision import BF16


def unlike(task: Task, manifest: TaskManifest) -> str | None:
    """Return what a task on chain says otherwise than its manifest; None if they agree.

    What is false on chain is counted by the chain: an honest worker would be charged, or convicted, for what it was
    never to do, as for the optimiser's step whose number is that of the micro-batches.
    """
    said = {
        "stages": (task.stages, len(manifest.seated)),
        "replicas": (task.replicas, manifest.replicas),
        "micro-batches": (task.microbatches, manifest.microbatches),
        "redundancy": (task.redundancy, manifest.audit.redundancy),
    }
    for what, (chain, own) in said.items():
        if chain != own:
            return f"its {what} are {chain} on chain and {own} in its manifest"
    if task.depth > manifest.audit.depth:
        return f"it may be {task.depth} steps ahead of its audits, and its manifest says {manifest.audit.depth}"
    if (manifest.precision == BF16) != bool(task.kernel):
        names = "a" if task.kernel else "no"
        return f"its precision is {manifest.precision}, and on chain it names {names} kernel class"
    return None
