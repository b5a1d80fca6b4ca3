"""Everything that touches the network or starts things: the peer and its services."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tdml_p2p.api import SwarmRun, SwarmStep, train_on_swarm
    from tdml_p2p.config import TrainConfig

__all__ = ["SwarmRun", "SwarmStep", "TrainConfig", "train_on_swarm"]


def __getattr__(name: str) -> Any:
    """Return what is offered here, imported when it is used first: the network takes seconds."""
    if name not in __all__:
        raise AttributeError(f"module 'tdml_p2p' has no attribute {name!r}")
    if name == "TrainConfig":
        from tdml_p2p.config import TrainConfig

        return TrainConfig
    from tdml_p2p import api

    return getattr(api, name)
