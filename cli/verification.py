"""`tdml-chain verify`: a proof file against a block that somebody trusts, without any peer."""

import time
from pathlib import Path
from typing import Any

from tdml_p2p.errors import FAILED, USAGE, UserError

TRUSTING_HOURS = 37.0
"""Two thirds of the time that 200,000 blocks of unbonding take at one block a second."""


def verified(file: Path, trust: str, trusting_hours: float) -> dict[str, Any]:
    """Return what the proof in `file` shows to whoever trusts a block; raise `UserError`."""
    from chain.blocks import Refused
    from chain.codec import DecodeError
    from chain.light import Trust
    from chain.proofs import check, from_text
    from chain.views import plain

    try:
        trusted = Trust.parse(trust)
    except ValueError as error:
        raise UserError(f"{error}.", "tdml-chain block latest shows height and hash", USAGE) from None
    try:
        proof = from_text(file.read_text("ascii"))
        proven = check(proof, trusted, time.time_ns() // 1_000_000, int(trusting_hours * 3_600_000))
    except FileNotFoundError:
        raise UserError(f"There is no file {file}.", "tdml-chain proof writes one", USAGE) from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.", "see its permissions", USAGE) from None
    except UnicodeDecodeError:
        raise UserError(f"{file} is no proof file: it is not text.", "tdml-chain proof writes one", FAILED) from None
    except (DecodeError, Refused) as error:
        hint = "nothing is proven: ask for another proof, or check what you trust"
        raise UserError(f"The proof does not hold: {error}.", hint, FAILED) from None
    header = proof.block.header
    return {
        "valid": True,
        "kind": proven.kind,
        "key": proven.key,
        "present": proven.record is not None,
        "record": None if proven.record is None else plain(proven.record),
        "height": proven.height,
        "block_hash": header.hash.hex(),
        "chain_id": header.chain_id.hex(),
        "timestamp": header.timestamp,
    }
