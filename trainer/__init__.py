"""The machine learning: stages, steps, comparison, data, checkpoints. Knows nothing of libp2p or of the chain."""
