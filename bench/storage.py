"""What a long chain costs a store: size, restart, replay of a state, catching up with a database.

Builds a chain of blocks with one validator and a transfer in every tenth of them, then measures in a fresh
process each time how long it takes from opening the files to the first block that can be built. Prints one
JSON object. `--blocks` 100,000 is what the target (restart below 2 s) speaks of.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from chain.blocks import Vote, VoteKind, certify, vote_bytes
from chain.codec import encode
from chain.engine_blocks import Draft, Tip, assemble
from chain.engine_files import Files
from chain.genesis import Allocation, Genesis, GenesisValidator
from chain.hashing import digest
from chain.keys import PrivateKey
from chain.params import Params
from chain.randomness import onion_of
from chain.state import genesis_state
from chain.store import Store
from chain.transactions import Transaction, Transfer, Unsigned, sign

KEY = PrivateKey(digest("bench storage"))
STARTED_MS = 1_700_000_000_000
BATCH = 500
ACCOUNTS = 1000


def genesis() -> Genesis:
    """Return a network of one validator and some accounts."""
    accounts = (KEY.account, *(digest("resident", index.to_bytes(4, "big")) for index in range(ACCOUNTS)))
    return Genesis(
        b"bench",
        STARTED_MS,
        Params(),
        tuple(Allocation(account, 10**9) for account in accounts),
        (GenesisValidator(KEY.account, 10**6, onion_of(KEY).tip),),
    )


def transfer(tip: Tip, height: int) -> Transaction:
    """Return a signed transfer for the block of a height."""
    nonce, to = tip.state.account(KEY.account).nonce, digest("resident", (height % ACCOUNTS).to_bytes(4, "big"))
    return sign(KEY, Unsigned(1, tip.chain_id, KEY.account, nonce, 0, 10**9, 0, b"", Transfer(to, 1)))


def build(path: Path, blocks: int, keep: int = 0) -> dict[str, float]:
    """Write a chain and return what a block costs."""
    made = genesis()
    store = Store.open(path, made)
    store.keep = keep
    tip, begun = Tip(made.chain_id, genesis_state(made)), time.perf_counter()
    for first in range(1, blocks + 1, BATCH):
        with store.batch():
            for height in range(first, min(first + BATCH, blocks + 1)):
                tip = extend(store, tip, [transfer(tip, height)] if height % 10 == 0 else [])
    took = time.perf_counter() - begun
    store.close()
    size = path.stat().st_size
    return {"build_blocks_per_second": round(blocks / took), "bytes_per_block_on_disk": round(size / blocks)}


def extend(store: Store, tip: Tip, transactions: list[Transaction]) -> Tip:
    """Make, finalize and store the next block."""
    validator = tip.state.validator(KEY.account)
    assert validator is not None
    reveal = onion_of(KEY, validator.onion).below(validator.onion_tip)
    block, executed = assemble(tip, Draft(KEY.account, 1, tip.timestamp + 1000, reveal), transactions)
    signers = tip.state.validators()
    said = (VoteKind.FINALIZE, tip.chain_id, block.height, 1, block.hash)
    certificate = certify([Vote(*said, KEY.account, KEY.sign(vote_bytes(*said)))], signers)
    store.commit(block, certificate, tip.state, executed)
    return Tip(tip.chain_id, executed.state, block.header, certificate, signers)


def restart(home: Path) -> dict[str, float]:
    """Return the seconds from opening the files to the tip, and to one more block that is durable."""
    begun = time.perf_counter()
    files = Files(home, genesis(), None)
    tip = files.tip()
    files.recent()
    ready = time.perf_counter() - begun
    onion_of(KEY)
    begun = time.perf_counter()
    extend(files.store, tip, [])
    first = time.perf_counter() - begun
    files.close()
    return {"height": tip.height, "open_seconds": ready, "first_block_seconds": first}


def measure(blocks: int, repeats: int) -> dict[str, object]:
    """Build once, restart several times, each in a process of its own."""
    folder = Path(tempfile.mkdtemp(prefix="tdml-bench-"))
    try:
        built = build(folder / "chain.db", blocks)
        runs = [_child(folder) for _ in range(repeats)]
        pruned = folder / "pruned.db"
        build(pruned, min(blocks, 5000), keep=1000)
        state = Files(folder, genesis(), None).tip().state
        rows = sum(len(encode(record)) for table in state.tables.values() for record in table.values())
        pruned_bytes = pruned.stat().st_size
    finally:
        shutil.rmtree(folder)
    return {
        "blocks": blocks,
        **built,
        "restart_seconds": {
            "median": round(statistics.median(run["open_seconds"] for run in runs), 3),
            "most": round(max(run["open_seconds"] for run in runs), 3),
        },
        "first_block_seconds": round(statistics.median(run["first_block_seconds"] for run in runs), 4),
        "state_bytes": rows,
        "pruned_to_1000_of_5000_bytes": pruned_bytes,
    }


def _child(home: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.storage", "--restart", str(home)]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def main() -> None:
    """Measure, and print the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON, as is always done")
    parser.add_argument("--blocks", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--restart", type=Path, help="measure one restart of this home and end")
    options = parser.parse_args()
    found = restart(options.restart) if options.restart else measure(options.blocks, options.repeats)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
