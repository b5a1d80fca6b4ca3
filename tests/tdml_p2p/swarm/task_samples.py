"""What a task on chain says of a run, as its client posts it."""

from typing import Any

from trainer.manifest import TaskManifest


def terms_of(manifest: TaskManifest, **more: Any) -> dict[str, Any]:
    """Return the fields of a task that must be as in the manifest, some of them changed."""
    terms = {
        "stages": len(manifest.seated),
        "replicas": manifest.replicas,
        "microbatches": manifest.microbatches,
        "redundancy": manifest.audit.redundancy,
        "depth": manifest.audit.depth,
        "kernel": b"",
    }
    return terms | more
