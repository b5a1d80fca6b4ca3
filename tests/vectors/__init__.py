"""JSON vectors of what other implementations must agree on: `python -m tests.vectors` writes them."""
