"""Deterministic virtual-time simulation of consensus and the oracle that judges it."""
