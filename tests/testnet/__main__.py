"""`python -m tests.testnet MANIFEST`, or `--draw SEED [--minutes N]` for drawn ones; prints a verdict a line."""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import trio

from tests.testnet.manifest import Manifest, ManifestError, Shape, drawn, load
from tests.testnet.run import cleaned, run


def one(manifest: Manifest, keep: bool) -> bool:
    """Run a testnet and print its verdict; its files stay if it failed or shall be kept."""
    folder = Path(tempfile.mkdtemp(prefix="tdml-net-"))
    verdict = trio.run(run, manifest, folder)
    print(json.dumps(verdict), flush=True)
    if verdict["ok"] and not keep:
        cleaned(folder)
    return bool(verdict["ok"])


def main() -> int:
    """Run what was asked for; 1 when a testnet failed, 2 for a manifest that is none."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("manifest", nargs="?", type=Path)
    parser.add_argument("--draw", type=int, metavar="SEED", help="draw testnets from this seed on")
    parser.add_argument("--minutes", type=float, default=0.0, help="go on with the next seeds for so long")
    parser.add_argument("--keep", action="store_true", help="leave homes and logs")
    options = parser.parse_args()
    if options.manifest is not None:
        try:
            return 0 if one(load(options.manifest), options.keep) else 1
        except ManifestError as error:
            print(error, file=sys.stderr)
            return 2
    seed, end = options.draw or 0, time.monotonic() + 60 * options.minutes
    while True:
        if not one(drawn(seed, Shape()), options.keep):
            print(f"replay: python -m tests.testnet --draw {seed}", file=sys.stderr)
            return 1
        seed += 1
        if time.monotonic() >= end:
            return 0


if __name__ == "__main__":
    sys.exit(main())
