"""What needs nobody's word: a proof file against a block that somebody trusts, and a remote peer's answers."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tdml_p2p.errors import FAILED, USAGE, UserError

if TYPE_CHECKING:
    from chain.light import Trust

_ASK = "ask somebody you trust for height and hash: tdml-chain block latest shows them"
TRUSTING_HOURS = 37.0
"""Two thirds of the time that 200,000 blocks of unbonding take at one block a second."""


def trust_of(text: str) -> "Trust":
    """Return the trust that HEIGHT:HASH says; raise `UserError`."""
    from chain.light import Trust

    if not text:
        raise UserError("--trust is missing: nothing can be verified without a block that you trust.", _ASK, USAGE)
    try:
        return Trust.parse(text)
    except ValueError as error:
        raise UserError(f"{error}.", _ASK, USAGE) from None


def verified(file: Path, trust: str, trusting_hours: float) -> dict[str, Any]:
    """Return what the proof in `file` shows to whoever trusts a block; raise `UserError`."""
    from chain.blocks import Refused
    from chain.codec import DecodeError
    from chain.proofs import MAX_FILE_BYTES, check, from_text
    from chain.views import plain

    trusted = trust_of(trust)
    try:
        with file.open("rb") as stream:
            text = stream.read(MAX_FILE_BYTES + 1).decode("ascii")
        proof = from_text(text)
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
