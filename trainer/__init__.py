"""The machine learning: stages, steps, comparison, data, checkpoints; no network, no chain."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.run import LocalRun, RunSettings

__all__ = ["LocalRun", "RunSettings"]


def __getattr__(name: str) -> Any:
    """Return what is offered here, imported when it is used first: torch takes seconds."""
    if name not in __all__:
        raise AttributeError(f"module 'trainer' has no attribute {name!r}")
    from trainer import run

    return getattr(run, name)
