"""Seconds of the most expensive blocks that hostile proposers, clients and workers can bring about.

Each shape is a state and a block on it, as large as the parameters and the ledger's own bounds allow. For
each: seconds to check the signatures, to execute (hooks, new state and its root included) and to commit to
`chain.db`, medians of several runs, beside a reference loop of one million additions.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.support.shape import Shape
from bench.support.shapes import SHAPES
from chain.blocks import Block, Certificate, Header, VoteKind, transactions_root
from chain.codec import encode
from chain.hashing import ZERO
from chain.ledger import Executed, execute
from chain.state import State
from chain.store import Store
from chain.transactions import Transaction


def reference() -> float:
    """Return the seconds of one million additions: how fast this machine is just now."""
    start = time.perf_counter()
    number = 0
    for value in range(1_000_000):
        number += value
    return time.perf_counter() - start


def commit(shape: Shape, before: State, transactions: tuple[Transaction, ...], executed: Executed) -> float:
    """Return the seconds that the store takes for the block."""
    header = Header(
        shape.genesis.chain_id, executed.state.height, ZERO, shape.keys[0].account, 1, executed.state.chain.timestamp,
        transactions_root(transactions), ZERO, executed.state.root, before.validators().hash,
        executed.state.validators().hash, ZERO, executed.state.seed, before.leader_seed,
    )  # fmt: skip
    block = Block(header, transactions, None)
    certificate = Certificate(
        VoteKind.FINALIZE, shape.genesis.chain_id, header.height, 1, block.hash, bytes(32), (bytes(64),)
    )
    with tempfile.TemporaryDirectory() as folder:
        store = Store.open(Path(folder) / "chain.db", shape.genesis)
        start = time.perf_counter()
        store.commit(block, certificate, before, executed)
        seconds = time.perf_counter() - start
        store.close()
    return seconds


def measure(name: str, runs: int, scale: float) -> dict[str, Any]:
    """Return the medians of one shape."""
    make, number = SHAPES[name]
    shape = make(int(number * scale))
    state = shape.state()
    transactions = shape.transactions(state)
    context = shape.context(state)
    times: dict[str, list[float]] = {"signatures": [], "execute": [], "commit": [], "reference": []}
    for _ in range(runs):
        fresh = State(state.tables, state.tree)
        times["reference"].append(reference())
        start = time.perf_counter()
        signed = all(transaction.is_signed() for transaction in transactions)
        times["signatures"].append(time.perf_counter() - start)
        start = time.perf_counter()
        executed = execute(fresh, context, transactions)
        executed.state.validators()
        times["execute"].append(time.perf_counter() - start)
        times["commit"].append(commit(shape, state, transactions, executed))
    reasons = [receipt.reason for receipt in executed.receipts]
    return {
        "number": int(number * scale),
        "transactions": len(transactions),
        "bytes": sum(len(encode(transaction)) for transaction in transactions),
        "signed": signed,
        "refused": {reason: reasons.count(reason) for reason in sorted(set(reasons)) if reason},
        "events": len(executed.events),
        "changed": sum(map(len, executed.changes.values())),
        "seconds": {key: round(statistics.median(values), 4) for key, values in times.items()},
    }


def main() -> None:
    """Measure all shapes, or those named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shapes", nargs="*", default=list(SHAPES))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    arguments = parser.parse_args()
    found = {name: measure(name, arguments.runs, arguments.scale) for name in arguments.shapes}
    if arguments.json:
        print(json.dumps({"bench": "worst block", "runs": arguments.runs, "shapes": found}))
        return
    print(f"{'shape':<16}{'signatures':>12}{'execute':>12}{'commit':>12}{'reference':>12}")
    for name, shape in found.items():
        print(f"{name:<16}" + "".join(f"{seconds:>12.4f}" for seconds in shape["seconds"].values()))


if __name__ == "__main__":
    main()
