"""The body of `POST /transactions`: a closed union of what an owner may sign through a running peer."""

from typing import Annotated, Any, assert_never

import msgspec
from msgspec import Meta

from chain.bounds import params_of
from chain.keys import account_of
from chain.transactions import Bond, Faucet, Payload, RotateKey, Transfer, Unbond, Unjail, VoteParams, Withdraw

MAX_BODY_BYTES = 4096
Amount = Annotated[str, Meta(pattern=r"^[0-9]{1,18}$")]
"""Base units, as a decimal string: JSON numbers lose digits beyond 2**53."""


class _Request(msgspec.Struct, frozen=True, tag_field="kind", forbid_unknown_fields=True):
    pass


class BondRequest(_Request, frozen=True, tag="bond"):
    """Lock an amount as stake."""

    amount: Amount


class UnbondRequest(_Request, frozen=True, tag="unbond"):
    """Start to release an amount of stake."""

    amount: Amount


class TransferRequest(_Request, frozen=True, tag="transfer"):
    """Send an amount to a peer."""

    to: Annotated[str, Meta(max_length=128)]
    amount: Amount


class FaucetRequest(_Request, frozen=True, tag="faucet"):
    """Ask for the faucet's grant."""


class UnjailRequest(_Request, frozen=True, tag="unjail"):
    """Return to the validator set."""


class WithdrawRequest(_Request, frozen=True, tag="withdraw"):
    """Move released stake to the balance."""


class RotateRequest(_Request, frozen=True, tag="rotate-key"):
    """Move the account to a successor that has signed for it; hash and signature in hex."""

    successor: Annotated[str, Meta(max_length=128)]
    onion_tip: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$")]
    proof: Annotated[str, Meta(pattern=r"^[0-9a-f]{128}$")]


class VoteRequest(_Request, frozen=True, tag="vote-params"):
    """Stand for these parameters, all of them by name."""

    params: dict[str, Any]


TransactionRequest = (
    BondRequest | UnbondRequest | TransferRequest | FaucetRequest | UnjailRequest | WithdrawRequest
    | RotateRequest | VoteRequest
)  # fmt: skip


def parse_transaction(body: bytes) -> Payload:
    """Return the payload that a request's JSON asks for; raise `ValueError` in one plain phrase."""
    request: TransactionRequest
    try:
        request = msgspec.json.decode(body, type=TransactionRequest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"The request is not a transaction: {str(error).rstrip('.')}") from None
    match request:
        case BondRequest(amount):
            return Bond(_positive(amount))
        case UnbondRequest(amount):
            return Unbond(_positive(amount))
        case TransferRequest(to, amount):
            return Transfer(account_of(to), _positive(amount))
        case FaucetRequest():
            return Faucet()
        case UnjailRequest():
            return Unjail()
        case WithdrawRequest():
            return Withdraw()
        case RotateRequest(successor, onion_tip, proof):
            return RotateKey(account_of(successor), bytes.fromhex(onion_tip), bytes.fromhex(proof))
        case VoteRequest(params):
            return VoteParams(params_of(params))
        case _:
            assert_never(request)


def _positive(amount: str) -> int:
    value = int(amount)
    if value == 0:
        raise ValueError("The amount is zero")
    return value
