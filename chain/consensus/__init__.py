"""Single-shot Simplex, one instance per height, weighted by stake; events in, effects out."""

from chain.consensus.effects import (
    Accuse,
    Broadcast,
    Build,
    Decide,
    Effect,
    HeightConfig,
    SetTimer,
    Sign,
    Timers,
    Validate,
)
from chain.consensus.machine import HORIZON, Consensus

__all__ = [
    "HORIZON",
    "Accuse",
    "Broadcast",
    "Build",
    "Consensus",
    "Decide",
    "Effect",
    "HeightConfig",
    "SetTimer",
    "Sign",
    "Timers",
    "Validate",
]
