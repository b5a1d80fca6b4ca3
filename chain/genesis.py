"""The genesis of a network: its digest is the chain id, its JSON form travels and is kept on disk."""

import json
from functools import cached_property
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from chain.bounds import params_of, problem
from chain.codec import AccountId, Hash, Record, Uint, encode
from chain.hashing import digest
from chain.keys import account_of, peer_id
from chain.params import Params

MAX_ISSUED = 2**63 - 1


class Allocation(Record, frozen=True):
    """Balance of an account at the start."""

    account: AccountId
    amount: Uint


class GenesisValidator(Record, frozen=True):
    """A validator at the start: its stake, issued beside its balance, and the tip of its hash onion."""

    account: AccountId
    stake: Annotated[int, Meta(ge=1, le=2**62)]
    onion_tip: Hash


class Genesis(Record, frozen=True, dict=True):
    """Everything that defines a network. `faucet` is what the faucet may give in all."""

    name: Annotated[bytes, Meta(max_length=64)]
    timestamp: Uint
    """Milliseconds since the Unix epoch."""
    params: Params
    accounts: Annotated[tuple[Allocation, ...], Meta(max_length=100_000)]
    validators: Annotated[tuple[GenesisValidator, ...], Meta(min_length=1, max_length=256)]
    faucet: Uint = 0

    @cached_property
    def chain_id(self) -> bytes:
        """The 32-byte digest that names the network."""
        return digest("genesis", encode(self))

    @property
    def issued(self) -> int:
        """All base units that ever exist."""
        staked = sum(validator.stake for validator in self.validators)
        return staked + self.faucet + sum(allocation.amount for allocation in self.accounts)


def check(genesis: Genesis) -> None:
    """Raise `ValueError`, saying why, for a genesis that no chain can start from."""
    accounts = [validator.account for validator in genesis.validators]
    if len(set(accounts)) != len(accounts):
        raise ValueError("a validator is named twice")
    if genesis.issued > MAX_ISSUED:
        raise ValueError("more base units are issued than amounts can count")
    if all(validator.stake < genesis.params.min_stake for validator in genesis.validators):
        raise ValueError("no validator has the least stake")
    if (found := problem(genesis.params)) is not None:
        raise ValueError(found)
    try:
        genesis.name.decode()
    except UnicodeDecodeError:
        raise ValueError("the name is not UTF-8 text") from None


def to_json(genesis: Genesis) -> str:
    """Return the JSON text of a genesis: peer ids for accounts, strings for amounts, hex for hashes."""
    document = {
        "name": genesis.name.decode("utf-8", "replace"),
        "timestamp": genesis.timestamp,
        "chain_id": genesis.chain_id.hex(),
        "faucet": str(genesis.faucet),
        "params": msgspec.structs.asdict(genesis.params),
        "accounts": [{"account": peer_id(a.account), "amount": str(a.amount)} for a in genesis.accounts],
        "validators": [
            {"account": peer_id(v.account), "stake": str(v.stake), "onion_tip": v.onion_tip.hex()}
            for v in genesis.validators
        ],
    }
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


class _Allocation(msgspec.Struct):
    account: str
    amount: str | int


class _Validator(msgspec.Struct):
    account: str
    stake: str | int
    onion_tip: str


class _Document(msgspec.Struct):
    """The JSON form, field by field."""

    name: str
    timestamp: int
    params: dict[str, Any]
    accounts: list[_Allocation]
    validators: list[_Validator]
    faucet: str | int
    chain_id: str | None = None


def from_json(text: str) -> Genesis:
    """Return the genesis in `text`; raise `ValueError` saying what is wrong, also for a false chain id."""
    try:
        document = msgspec.convert(json.loads(text), _Document)
        genesis = _genesis_of(document)
    except (TypeError, KeyError, OverflowError, msgspec.ValidationError, RecursionError) as error:
        raise ValueError(f"a field is missing or wrong: {error}") from None
    check(genesis)
    if document.chain_id not in (None, genesis.chain_id.hex()):
        raise ValueError("its content does not hash to its chain_id")
    return genesis


def _genesis_of(document: _Document) -> Genesis:
    genesis = Genesis(
        name=document.name.encode(),
        timestamp=document.timestamp,
        params=params_of(document.params),
        accounts=tuple(Allocation(account_of(a.account), int(a.amount)) for a in document.accounts),
        validators=tuple(
            GenesisValidator(account_of(v.account), int(v.stake), bytes.fromhex(v.onion_tip))
            for v in document.validators
        ),
        faucet=int(document.faucet),
    )
    # a Struct's constructor checks nothing: bounds are checked by reading the encoding back
    return msgspec.msgpack.decode(encode(genesis), type=Genesis)
