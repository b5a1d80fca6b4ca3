"""The machine learning: stages, steps, comparison, data, checkpoints; no network, no chain."""
