"""The ledger: pure rules, consensus and storage. Knows nothing of libp2p or torch."""
