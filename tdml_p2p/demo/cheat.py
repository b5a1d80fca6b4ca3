"""Entry point of the demonstration's dishonest peer: an ordinary peer with a faulty stage installed."""

import argparse
import json
import sys
from pathlib import Path

import trio

from tdml_p2p.config import PeerConfig
from tdml_p2p.demo.faults import ATTACKS, STEP_ATTACKS, faulty_factory
from tdml_p2p.errors import UserError
from tdml_p2p.peer import run_start


def main() -> int:
    """Start the peer of `--home` whose stages run `--attack` from step `--from-step` on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--join", required=True)
    parser.add_argument("--listen", default="/ip4/127.0.0.1/tcp/0")
    parser.add_argument("--attack", choices=sorted((*ATTACKS, *STEP_ATTACKS)), required=True)
    parser.add_argument("--from-step", type=int, required=True)
    options = parser.parse_args()
    config = PeerConfig(home=options.home, join=(options.join,), listen=(options.listen,), threads=1)
    factory = faulty_factory(options.attack, options.from_step)
    try:
        return trio.run(lambda: run_start(config, _print, stage_factory=factory))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _print(event: dict[str, object]) -> None:
    print(json.dumps(event), flush=True)


if __name__ == "__main__":
    sys.exit(main())
